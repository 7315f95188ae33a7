// KL to the reference from the sampled token alone, and its slope.
#include "surrogate.h"

extern "C" void fastppo_token_kl(
    const float* logprob, const float* ref, float* kl, float* slope, int64_t n, float limit, int kind) {
#pragma omp parallel for schedule(static) if (n > FASTPPO_ALONE)
  for (int64_t i = 0; i < n; i++) {
    const FastppoSlope found = kl_and_slope(logprob[i], ref[i], limit, kind);
    kl[i] = found.value;
    slope[i] = found.slope;
  }
}
