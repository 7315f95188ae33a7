// Generalised advantage estimation over packed sequences, a sequence a thread.
#include "gae.h"

extern "C" void fastppo_gae(
    const float* reward, const float* value, const int64_t* offsets, int64_t batch,
    const float* bootstrap, double gamma, double lam, float* advantage, float* returns) {
#pragma omp parallel for schedule(static) if (offsets[batch] > FASTPPO_ALONE)
  for (int64_t b = 0; b < batch; b++)
    gae_sequence(
        [&](int64_t t) { return (double)reward[t]; }, value, offsets[b], offsets[b + 1],
        bootstrap ? bootstrap[b] : 0.0f, gamma, lam, advantage, returns);
}
