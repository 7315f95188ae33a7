// Two policies' rows read together: log-probs, entropy and the exact KL.
#define FASTPPO_FILE "score_tokens.cpp"
#include "every_isa.h"

#include "row.h"

namespace FASTPPO_ISA {

constexpr float LEAST_SHIFT = -1e37f;

// KL = sum p (z - z_ref) - LSE(z) + LSE(z_ref); sum_diff_exp = sum p' (d - d_ref) with p' and both
// d in terms of the largest logits so far.
struct PolicyPair {
  Statistics actor, ref;
  double sum_diff_exp = 0;
  bool forbidden = false;  // the actor allows a word that the reference masks

  inline void move_actor_max(float top, double tau) {
    double delta = (double)actor.row_max - (double)top;
    sum_diff_exp = (sum_diff_exp + delta * actor.sum_exp) * std::exp(delta / tau);
    actor.move_max(top, tau);
  }
  inline void move_ref_max(float top, double tau) {
    sum_diff_exp -= ((double)ref.row_max - (double)top) * actor.sum_exp;
    ref.move_max(top, tau);
  }
};

template <class T, bool SOFTCAP>
static inline PolicyPair read_pair(
    const typename T::Storage* x, const typename T::Storage* y, int64_t vocab, float softcap,
    double tau) {
  PolicyPair row;
  const ExpScale scale(tau);
  float capped[2][BLOCK + STEP];
  for (int64_t start = 0; start < vocab; start += BLOCK) {
    const int64_t count = std::min(BLOCK, vocab - start), stepped = count / STEP * STEP;
    Floats top = all(LOWEST), ref_top = all(LOWEST);
    // In the order of `statistics`, so that a row's numbers are those of token_logprobs to the bit.
    auto note_max = [&](Floats x, Floats y, int64_t i) {
      Floats u = softcapped<SOFTCAP>(x, softcap), v = softcapped<SOFTCAP>(y, softcap);
      store(capped[0] + i, u);
      store(capped[1] + i, v);
      top = larger(u, top);
      ref_top = larger(v, ref_top);
    };
    int64_t i = 0;
    for (; i < stepped; i += 2 * LANES) {
      Pair p = T::read_two(x + start + i), q = T::read_two(y + start + i);
      note_max(p.a, q.a, i);
      note_max(p.b, q.b, i + LANES);
    }
    for (; i < count; i += LANES) {
      auto one = [&](const typename T::Storage* from) {
        return i + LANES <= count ? T::read(from + i) : read_tail<T>(from + i, count - i);
      };
      note_max(one(x + start), one(y + start), i);
    }
    if (max_of(top) > row.actor.row_max) row.move_actor_max(max_of(top), tau);
    if (max_of(ref_top) > row.ref.row_max) row.move_ref_max(max_of(ref_top), tau);
    const float running_max = row.actor.row_max, ref_running_max = row.ref.row_max;
    Floats sum_exp[4] = {}, sum_shifted_exp[4] = {}, ref_sum_exp[4] = {}, sum_diff_exp = {};
    Ints forbidden = {};
    for (i = 0; i < count; i += LANES) {
      const int k = i < stepped ? i / LANES % 4 : 0;
      Floats u = load(capped[0] + i), v = load(capped[1] + i);
      Floats d = scale.difference(u, running_max), c = scale.difference(v, ref_running_max);
      Floats e = exp_of(d, scale);
      sum_exp[k] += e;
      sum_shifted_exp[k] += d * e;
      ref_sum_exp[k] += exp_of(c, scale);
      Ints masked = v == -std::numeric_limits<float>::infinity();
      forbidden |= masked & (u > -std::numeric_limits<float>::infinity());
      // Not `c`, which is held where its exponential is 0: how far the reference is off has no end.
      Floats ref_shift = at_least(v - ref_running_max, LEAST_SHIFT);
      sum_diff_exp += e * (masked ? Floats{} : d - ref_shift);
    }
    row.actor.sum_exp += sum(sum_exp[0] + sum_exp[1] + sum_exp[2] + sum_exp[3]);
    row.actor.sum_shifted_exp +=
        sum(sum_shifted_exp[0] + sum_shifted_exp[1] + sum_shifted_exp[2] + sum_shifted_exp[3]);
    row.ref.sum_exp += sum(ref_sum_exp[0] + ref_sum_exp[1] + ref_sum_exp[2] + ref_sum_exp[3]);
    row.sum_diff_exp += sum(sum_diff_exp);
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
      const PolicyPair row =
          read_pair<T, decltype(softcap)::value>(x, y, rows.vocab, rows.softcap, at.tau);
      logprob = row.actor.logprob(sampled<T>(x, rows, at.token), at.tau);
      ref_logprob = row.ref.logprob(sampled<T>(y, rows, at.token), at.tau);
      entropy = row.actor.entropy(at.tau);
      kl = (float)(row.sum_diff_exp / row.actor.safe_sum_exp() / at.tau -
                   std::log(row.actor.safe_sum_exp()) + std::log(row.ref.safe_sum_exp()));
      if (row.forbidden) kl = std::numeric_limits<float>::infinity();
      if (row.actor.sum_exp == 0) kl = 0;
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
