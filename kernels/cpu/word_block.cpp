// Logits of a block of words for all tokens, a word a row and a token a column: what they add to each
// token's normaliser and entropy, and their exponentials, which a GEMM turns into
// sum_v exp((u_v - shift) / tau) W_v; and, where those are known, their gradient. See
// fastppo/ops/word_blocks.py.
//
// A lane is a token, so nothing is reduced across a register and no token's result depends on another.
// Every token has a `shift` that its logits are compared with: the largest of the first block, and a
// new one where a logit is larger by far. So a block is read once, not once more for its largest.
#define FASTPPO_FILE "word_block.cpp"
#include "every_isa.h"

#include "row.h"

namespace FASTPPO_ISA {

constexpr int64_t WORDS = 16;   // at a time, which stay in the first cache
constexpr float HEADROOM = 24;  // exponent up to which a logit may be above the shift

static inline bool any_larger(Floats a, Floats b) {
#if FASTPPO_LANES == 16
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif FASTPPO_LANES == 8
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#else
  for (int i = 0; i < LANES; i++)
    if (a[i] > b[i]) return true;
  return false;
#endif
}

static inline void add_to(double* total, Floats v) {
  for (int i = 0; i < LANES; i++) total[i] += (double)v[i];
}

// What makes exponentials of differences, of whole tiles of tokens.
static void set_scales(const FastppoWordBlock& a, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; n++) {
    const ExpScale scale(a.tau[n]);
    a.factor[n] = scale.factor;
    a.least[n] = scale.least;
  }
}

// Calls `function` with each token that is not ignored and whose word is in the block, and the word.
template <class Function>
static void each_sampled(const FastppoWordBlock& a, int64_t first, int64_t last, Function function) {
  for (int64_t n = first; n < std::min(last, a.n); n++) {
    const int64_t w = a.token[n] - a.first_word;
    if (w >= 0 && w < a.words && a.token[n] != a.ignore_index) function(n, w);
  }
}

static void note_sampled(const FastppoWordBlock& a, int64_t first, int64_t last) {
  each_sampled(a, first, last, [&](int64_t n, int64_t w) {
    a.sampled[n] = softcapped_one(a.x[w * a.x_stride + n] + (a.bias ? a.bias[w] : 0.0f), a.softcap);
  });
}

// Some neighbouring tokens of a block.
template <bool BIAS, bool SOFTCAP, bool KEEP>
struct Lanes {
  const FastppoWordBlock& a;
  int64_t first;  // token
  float* x;
  LaneScale scale;

  Lanes(const FastppoWordBlock& a, int64_t first)
      : a(a), first(first), x(a.x + first), scale{load(a.factor + first), load(a.least + first)} {}

  // Logit of word w before its softcap.
  inline Floats logit(int64_t w) const {
    const Floats own = load(x + w * a.x_stride);
    return BIAS ? own + a.bias[w] : own;
  }
  inline Floats capped(int64_t w) const { return softcapped<SOFTCAP>(logit(w), a.softcap); }

  // Everything so far in terms of a new shift, of the tokens whose `top` is above what they have.
  // `done` words of this block have been replaced by their exponentials.
  void raise(Floats top, Floats limit, int64_t done) const {
    Floats factor = all(1.0f);
    for (int i = 0; i < LANES; i++) {
      if (!(top[i] > limit[i])) continue;
      const int64_t n = first + i;
      const double delta = (double)a.shift[n] - (double)top[i], change = std::exp(delta / a.tau[n]);
      a.sum_shifted_exp[n] = (a.sum_shifted_exp[n] + delta * a.sum_exp[n]) * change;
      a.sum_exp[n] *= change;
      a.shift[n] = top[i];
      factor[i] = (float)change;
      if (KEEP && a.first_word > 0 && n < a.n) {
        float* slope = a.slope + n * a.slope_stride;
        for (int64_t d = 0; d < a.size; d++) slope[d] *= factor[i];
      }
    }
    if (KEEP)
      for (int64_t w = 0; w < done; w++) store(x + w * a.x_stride, load(x + w * a.x_stride) * factor);
  }

  inline Floats limit() const { return load(a.shift + first) + HEADROOM * load(a.tau + first); }

  // The largest logits of some words, into row_max.
  void note_largest(int64_t from, int64_t to) const {
    Floats top = load(a.row_max + first);
    for (int64_t w = from; w < to; w++) top = larger(capped(w), top);
    store(a.row_max + first, top);
  }

  // Words from `start` up to `end`, at most WORDS.
  void add(int64_t start, int64_t end) const {
    float kept[BIAS || SOFTCAP ? WORDS * LANES : 1];
    Floats top = all(LOWEST);
    for (int64_t w = start; w < end; w++) {
      const Floats u = capped(w);
      if (BIAS || SOFTCAP) store(kept + (w - start) * LANES, u);
      top = larger(u, top);
    }
    store(a.row_max + first, larger(top, load(a.row_max + first)));
    if (any_larger(top, limit())) raise(top, limit(), start);
    const Floats shift = load(a.shift + first);
    Floats sum_exp = {}, sum_shifted_exp = {};
    for (int64_t w = start; w < end; w++) {
      const Floats u = BIAS || SOFTCAP ? load(kept + (w - start) * LANES) : logit(w);
      const Floats d = scale.difference(u, shift);
      const Floats e = exp_of(d, scale);
      sum_exp += e;
      sum_shifted_exp += d * e;
      if (KEEP) store(x + w * a.x_stride, SOFTCAP ? e * tanh_slope_of(logit(w) / a.softcap) : e);
    }
    add_to(a.sum_exp + first, sum_exp);
    add_to(a.sum_shifted_exp + first, sum_shifted_exp);
  }
};

// Tokens from `first` up to `last` of the block; words in the outer loop, as memory has them.
template <bool BIAS, bool SOFTCAP, bool KEEP>
static void some_tokens(const FastppoWordBlock& a, int64_t first, int64_t last) {
  using Own = Lanes<BIAS, SOFTCAP, KEEP>;
  const auto each = [&](auto function) {
    for (int64_t start = 0; start < a.words; start += WORDS)
      for (int64_t n = first; n < last; n += LANES)
        function(Own(a, n), start, std::min(start + WORDS, a.words));
  };
  if (a.first_word == 0) {
    set_scales(a, first, last);
    each([](const Own& own, int64_t start, int64_t end) { own.note_largest(start, end); });
    for (int64_t n = first; n < last; n += LANES)
      Own(a, n).raise(load(a.row_max + n), all(LOWEST), 0);
  }
  each([](const Own& own, int64_t start, int64_t end) { own.add(start, end); });
}

// Whole tiles of tokens.
void word_block_tokens(const FastppoWordBlock& a, int64_t first, int64_t last) {
  note_sampled(a, first, last);
  const auto kept = [&](auto bias, auto softcap) {
    constexpr bool BIAS = decltype(bias)::value, SOFTCAP = decltype(softcap)::value;
    a.slope ? some_tokens<BIAS, SOFTCAP, true>(a, first, last)
            : some_tokens<BIAS, SOFTCAP, false>(a, first, last);
  };
  const auto capped = [&](auto bias) {
    a.softcap != 0 ? kept(bias, std::true_type{}) : kept(bias, std::false_type{});
  };
  a.bias ? capped(std::true_type{}) : capped(std::false_type{});
}

// The results of a token whose words are through. Its row of `slope` becomes d logprob / d hidden:
// (W_token s_token - slope / sum_exp) / tau, with s the softcap's slope and W_token in `own`.
void word_block_end(const FastppoWordBlock& a, const FastppoStatistics& into, const float* own, int64_t n) {
  float* slope = a.slope ? a.slope + n * a.slope_stride : nullptr;
  if (a.token[n] == a.ignore_index) {
    into.logprob[n] = into.entropy[n] = into.row_max[n] = into.sum_exp[n] = 0;
    if (slope) std::memset(slope, 0, a.size * sizeof *slope);
    return;
  }
  const double tau = a.tau[n];
  Statistics row{a.shift[n], a.sum_exp[n], a.sum_shifted_exp[n]};
  const double sum_exp = row.safe_sum_exp();
  row.move_max(a.row_max[n], tau);
  into.logprob[n] = row.logprob(a.sampled[n], tau);
  into.entropy[n] = row.entropy(tau);
  into.row_max[n] = row.row_max;
  into.sum_exp[n] = (float)row.sum_exp;
  if (!slope) return;
  // A sampled word that is masked cannot be made likelier.
  const bool possible = !(into.logprob[n] == -std::numeric_limits<float>::infinity());
  double of_token = possible && a.token[n] >= 0 && a.token[n] < a.vocab ? 1 / tau : 0.0;
  if (a.softcap != 0) {
    const double t = std::max(a.sampled[n], -a.softcap) / a.softcap;
    of_token *= 1 - t * t;
  }
  const float token = (float)of_token, others = possible ? (float)(1 / (sum_exp * tau)) : 0.0f;
  for (int64_t d = 0; d < a.size; d++) slope[d] = own[n * a.size + d] * token - slope[d] * others;
}

// The gradient of the logits of whole tiles of tokens: see Slopes of row.h.
template <bool BIAS, bool SOFTCAP>
static void some_gradients(const FastppoWordBlock& a, const FastppoWordSlopes& s, int64_t first, int64_t last) {
  const Floats zero = {};
  for (int64_t start = 0; start < a.words; start += WORDS)
    for (int64_t n = first; n < last; n += LANES) {
      const Lanes<BIAS, SOFTCAP, false> own(a, n);
      const Floats row_max = load(a.row_max + n), of_exp = load(s.of_exp + n), of_shifted = load(s.of_shifted_exp + n);
      // Neither is there in an ignored row, whose hidden state may be anything.
      const auto dead = (of_exp == zero) & (of_shifted == zero);
      for (int64_t w = start; w < std::min(start + WORDS, a.words); w++) {
        const Floats d = own.scale.difference(own.capped(w), row_max);
        Floats dx = exp_of(d, own.scale) * (of_exp + of_shifted * d);
        if (SOFTCAP) dx = dx * tanh_slope_of(own.logit(w) / a.softcap);
        store(s.out + w * a.x_stride + n, dead ? zero : dx);
      }
    }
}

void word_gradient_tokens(const FastppoWordBlock& a, const FastppoWordSlopes& s, int64_t first, int64_t last) {
  set_scales(a, first, last);  // blocks may come in any order
  note_sampled(a, first, last);
  const auto capped = [&](auto bias) {
    constexpr bool BIAS = decltype(bias)::value;
    a.softcap != 0 ? some_gradients<BIAS, true>(a, s, first, last)
                   : some_gradients<BIAS, false>(a, s, first, last);
  };
  a.bias ? capped(std::true_type{}) : capped(std::false_type{});
  each_sampled(a, first, last, [&](int64_t n, int64_t w) {
    const double d = std::max((double)a.sampled[n] - a.row_max[n], (double)a.least[n]);
    const double e = d == a.least[n] ? 0.0 : std::exp(d / a.tau[n]);
    double dx = s.of_token[n] + e * (s.of_exp[n] + s.of_shifted_exp[n] * d);
    if (a.softcap != 0) {
      const double t = std::max(a.sampled[n], -a.softcap) / a.softcap;
      dx *= 1 - t * t;
    }
    s.out[w * a.x_stride + n] = (float)dx;
  });
}

}  // namespace FASTPPO_ISA

#ifdef FASTPPO_LAST_ISA
#ifdef _OPENMP
#include <omp.h>
#endif

// Calls `tokens` with each thread's tiles: the first token and the end.
template <class Tokens>
static void by_tiles(const FastppoWordBlock& a, Tokens tokens) {
  const int64_t tiles = (a.n + FASTPPO_TOKENS - 1) / FASTPPO_TOKENS;
#pragma omp parallel if (a.n * a.words > FASTPPO_ALONE)
  {
    int64_t own = 0, threads = 1;
#ifdef _OPENMP
    own = omp_get_thread_num(), threads = omp_get_num_threads();
#endif
    tokens(tiles * own / threads * FASTPPO_TOKENS, tiles * (own + 1) / threads * FASTPPO_TOKENS);
  }
}

extern "C" void fastppo_word_block(const FastppoWordBlock* a) {
  const auto tokens = FASTPPO_PICK(word_block_tokens);
  by_tiles(*a, [&](int64_t first, int64_t last) { tokens(*a, first, last); });
}

extern "C" void fastppo_word_gradient(const FastppoWordBlock* a, const FastppoWordSlopes* s) {
  const auto tokens = FASTPPO_PICK(word_gradient_tokens);
  by_tiles(*a, [&](int64_t first, int64_t last) { tokens(*a, *s, first, last); });
}

extern "C" void fastppo_word_block_end(
    const FastppoWordBlock* a, const FastppoStatistics* into, const float* own) {
  const auto end = FASTPPO_PICK(word_block_end);
#pragma omp parallel for schedule(static) if (a->n * a->size > FASTPPO_ALONE)
  for (int64_t n = 0; n < a->n; n++) end(*a, *into, own, n);
}
#endif
