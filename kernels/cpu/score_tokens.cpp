// Two policies' rows read together: log-probs, entropy and the exact KL.
#define FASTPPO_FILE "score_tokens.cpp"
#include "every_isa.h"

#include "row.h"

namespace FASTPPO_ISA {

constexpr float FARTHEST = -1e37f;

// KL = sum p (z - z_ref) - LSE(z) + LSE(z_ref); gap = sum p' (d - d_ref) with p' and both d in terms
// of the largest logits so far.
struct Both {
  Statistics mine, theirs;
  double gap = 0;
  bool forbidden = false;  // the actor allows a word that the reference masks

  inline void raise_mine(float top, double tau) {
    double delta = (double)mine.highest - (double)top;
    gap = (gap + delta * mine.total) * std::exp(delta / tau);
    mine.raise(top, tau);
  }
  inline void raise_theirs(float top, double tau) {
    gap -= ((double)theirs.highest - (double)top) * mine.total;
    theirs.raise(top, tau);
  }
};

template <class T, bool SOFTCAP>
static inline Both read_both(
    const typename T::Storage* x, const typename T::Storage* y, int64_t vocab, float softcap,
    double tau) {
  Both row;
  const Bits bits(tau);
  float bent[2][BLOCK + STEP];
  for (int64_t start = 0; start < vocab; start += BLOCK) {
    const int64_t count = std::min(BLOCK, vocab - start), stepped = count / STEP * STEP;
    Floats top = all(LOWEST), ref_top = all(LOWEST);
    // In the order of `statistics`, so that a row's numbers are those of token_logprobs to the bit.
    auto see = [&](Floats x, Floats y, int64_t i) {
      Floats u = bend<SOFTCAP>(x, softcap), v = bend<SOFTCAP>(y, softcap);
      store(bent[0] + i, u);
      store(bent[1] + i, v);
      top = larger(u, top);
      ref_top = larger(v, ref_top);
    };
    int64_t i = 0;
    for (; i < stepped; i += 2 * LANES) {
      Pair p = T::read_two(x + start + i), q = T::read_two(y + start + i);
      see(p.a, q.a, i);
      see(p.b, q.b, i + LANES);
    }
    for (; i < count; i += LANES) {
      auto one = [&](const typename T::Storage* from) {
        return i + LANES <= count ? T::read(from + i) : read_tail<T>(from + i, count - i);
      };
      see(one(x + start), one(y + start), i);
    }
    if (max_of(top) > row.mine.highest) row.raise_mine(max_of(top), tau);
    if (max_of(ref_top) > row.theirs.highest) row.raise_theirs(max_of(ref_top), tau);
    const float reference = row.mine.highest, ref_reference = row.theirs.highest;
    Floats total[4] = {}, weighted[4] = {}, ref_total[4] = {}, gap = {};
    Ints forbidden = {};
    for (i = 0; i < count; i += LANES) {
      const int k = i < stepped ? i / LANES % 4 : 0;
      Floats u = load(bent[0] + i), v = load(bent[1] + i);
      Floats d = bits.difference(u, reference), c = bits.difference(v, ref_reference);
      Floats e = exp_of(d, bits);
      total[k] += e;
      weighted[k] += d * e;
      ref_total[k] += exp_of(c, bits);
      Ints masked = v == -std::numeric_limits<float>::infinity();
      forbidden |= masked & (u > -std::numeric_limits<float>::infinity());
      // Not `c`, which is held where its exponential is 0: how far the reference is off has no end.
      Floats far = at_least(v - ref_reference, FARTHEST);
      gap += e * (masked ? Floats{} : d - far);
    }
    row.mine.total += sum(total[0] + total[1] + total[2] + total[3]);
    row.mine.weighted += sum(weighted[0] + weighted[1] + weighted[2] + weighted[3]);
    row.theirs.total += sum(ref_total[0] + ref_total[1] + ref_total[2] + ref_total[3]);
    row.gap += sum(gap);
    for (int lane = 0; lane < LANES; lane++) row.forbidden |= forbidden[lane] != 0;
  }
  return row;
}

void score_tokens_row(
    const FastppoRows& rows, const void* ref_x, int64_t ref_stride, const FastppoScores& into,
    int64_t own) {
  const RowPlace at = place(rows, own);
  float logprob = 0, ref_logprob = 0, entropy = 0, kl = 0;
  if (at.live) {
    with_kinds(rows.dtype, rows.dtype, rows.softcap != 0, [&](auto t, auto, auto softcap) {
      using T = decltype(t);
      const auto* x = (const typename T::Storage*)rows.x + own * rows.x_stride;
      const auto* y = (const typename T::Storage*)ref_x + own * ref_stride;
      const Both row =
          read_both<T, decltype(softcap)::value>(x, y, rows.vocab, rows.softcap, at.tau);
      logprob = row.mine.logprob(sampled<T>(x, rows, at.token), at.tau);
      ref_logprob = row.theirs.logprob(sampled<T>(y, rows, at.token), at.tau);
      entropy = row.mine.entropy(at.tau);
      kl = (float)(row.gap / row.mine.some() / at.tau - std::log(row.mine.some()) +
                   std::log(row.theirs.some()));
      if (row.forbidden) kl = std::numeric_limits<float>::infinity();
      if (row.mine.total == 0) kl = 0;
    });
  }
  into.logprob[at.row] = logprob;
  into.ref_logprob[at.row] = ref_logprob;
  into.entropy[at.row] = entropy;
  into.kl[at.row] = kl;
}

}  // namespace FASTPPO_ISA

#ifdef FASTPPO_LAST_ISA
extern "C" void fastppo_score_tokens(
    const FastppoRows* rows, const void* ref_x, int64_t ref_stride, const FastppoScores* into) {
  const auto row = FASTPPO_PICK(score_tokens_row);
  const int64_t n = rows->n;
#pragma omp parallel for schedule(static) if (n * rows->vocab > FASTPPO_ALONE)
  for (int64_t own = 0; own < n; own++) row(*rows, ref_x, ref_stride, *into, own);
}
#endif
