// KL to the reference from the sampled token alone, and its slope.
#define FASTPPO_FILE "token_kl.cpp"
#include "every_isa.h"

#include "vector.h"

namespace FASTPPO_ISA {

// exp(e) - 1 and exp(e) - 1 - e, to a few eps of themselves. Where they would cancel, for |e| < 1, by
// the series of e; elsewhere e = n ln 2 + r with |r| <= ln 2 / 2, and the series of r.
struct Expm1 {
  Floats value, minus_arg;
};
static inline Expm1 expm1_of(Floats e) {
  const float magic = 12582912.0f;  // 1.5 2^23: adding it rounds to an integer
  // Further out the result is -1 or infinite.
  e = e < -104.0f ? all(-104.0f) : e > 90.0f ? all(90.0f) : e;
  const Floats shifted = e * 1.44269504f + magic, n = shifted - magic;
  const Ints near = (Ints)((Words)e & 0x7fffffffu) < (Ints)all(1.0f);
  const Floats r = near ? e : e - n * 0.693359375f - n * -2.12194440e-4f;
  Floats q = all(1.0f / 3628800);
  q = q * r + 1.0f / 362880;
  q = q * r + 1.0f / 40320;
  q = q * r + 1.0f / 5040;
  q = q * r + 1.0f / 720;
  q = q * r + 1.0f / 120;
  q = q * r + 1.0f / 24;
  q = q * r + 1.0f / 6;
  q = q * r + 0.5f;
  q = q * r * r;
  // 2^n in two factors, each of which is a normal number.
  const Ints whole = (Ints)shifted - (Ints)all(magic), half = whole >> 1;
  const Floats a = (Floats)((half + 127) << 23), b = (Floats)((whole - half + 127) << 23);
  const Floats far = (r + q) * a * b + (a * b - 1.0f);
  return {near ? r + q : far, near ? q : far - e};
}

template <int KIND>
static inline void token_kl_some(
    const float* logprob, const float* ref, float* kl, float* slope, float limit) {
  const Floats lp = load(logprob), diff = lp - load(ref);
  const Floats size = (Floats)((Words)diff & 0x7fffffffu);
  Floats value, derivative;
  if constexpr (KIND == FASTPPO_K1) {
    value = diff;
    derivative = all(1.0f);
  } else if constexpr (KIND == FASTPPO_ABS) {
    value = size;
    derivative = diff > 0.0f ? all(1.0f) : diff < 0.0f ? all(-1.0f) : diff;
  } else if constexpr (KIND == FASTPPO_K2) {
    value = diff * diff * 0.5f;
    derivative = diff;
  } else {
    Floats e = -diff;
    e = e < -limit ? all(-limit) : e > limit ? all(limit) : e;
    const Expm1 found = expm1_of(e);
    value = e < -104.0f ? -1.0f - e : found.minus_arg;
    derivative = size <= limit ? -found.value : diff == diff ? Floats{} : diff;
    value = diff == diff ? value : diff;
  }
  // Masked vocabulary: a log-prob of -inf gives 0.
  const Ints masked = lp == all(-std::numeric_limits<float>::infinity());
  store(kl, masked ? Floats{} : value);
  if (slope) store(slope, masked ? Floats{} : derivative);
}

template <int KIND>
static void token_kl_of(
    const float* logprob, const float* ref, float* kl, float* slope, int64_t n, float limit) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    token_kl_some<KIND>(logprob + i, ref + i, kl + i, slope ? slope + i : nullptr, limit);
  if (i == n) return;
  float in[2][LANES] = {}, out[2][LANES];
  std::memcpy(in[0], logprob + i, (n - i) * sizeof(float));
  std::memcpy(in[1], ref + i, (n - i) * sizeof(float));
  token_kl_some<KIND>(in[0], in[1], out[0], out[1], limit);
  std::memcpy(kl + i, out[0], (n - i) * sizeof(float));
  if (slope) std::memcpy(slope + i, out[1], (n - i) * sizeof(float));
}

static void token_kl_block(
    const float* logprob, const float* ref, float* kl, float* slope, int64_t n, float limit,
    int kind) {
  const auto run = kind == FASTPPO_K1    ? token_kl_of<FASTPPO_K1>
                   : kind == FASTPPO_ABS ? token_kl_of<FASTPPO_ABS>
                   : kind == FASTPPO_K2  ? token_kl_of<FASTPPO_K2>
                                         : token_kl_of<FASTPPO_K3>;
  run(logprob, ref, kl, slope, n, limit);
}

}  // namespace FASTPPO_ISA

#ifdef FASTPPO_LAST_ISA
constexpr int64_t TOKENS = 4096;

// `slope` may be null. Blocks begin at multiples of 4096, so that a token's result does not depend
// on the number of threads.
extern "C" void fastppo_token_kl(
    const float* logprob, const float* ref, float* kl, float* slope, int64_t n, float limit, int kind) {
  const auto block = FASTPPO_PICK(token_kl_block);
#pragma omp parallel for schedule(static) if (n > FASTPPO_ALONE)
  for (int64_t i = 0; i < n; i += TOKENS)
    block(logprob + i, ref + i, kl + i, slope ? slope + i : nullptr, std::min(TOKENS, n - i), limit,
          kind);
}

// slope * grad, 0 where the slope is, whatever the gradient there. `step` 0: one gradient for all.
extern "C" void fastppo_token_kl_backward(
    const float* slope, const float* grad, int64_t step, int64_t n, float* out) {
#pragma omp parallel for schedule(static) if (n > FASTPPO_ALONE)
  for (int64_t i = 0; i < n; i++) out[i] = slope[i] == 0 ? 0.0f : slope[i] * grad[i * step];
}
#endif
