// Moments in two stages, merged in one order, and whitening with them.
#include "moments.h"

constexpr int64_t TOKENS = 4096;

extern "C" int64_t fastppo_moments_parts(int64_t n) { return (n + TOKENS - 1) / TOKENS; }

// (count, mean, m2) of the tokens whose weight is not 0; a null weight counts all.
extern "C" void fastppo_moments(
    const float* x, const float* weight, int64_t n, FastppoMoments* part, float* out) {
  const int64_t parts = fastppo_moments_parts(n);
#pragma omp parallel for schedule(static) if (n > FASTPPO_ALONE)
  for (int64_t p = 0; p < parts; p++)
    part[p] = moments_of(x, weight, p * TOKENS, (p + 1) * TOKENS < n ? (p + 1) * TOKENS : n);
  FastppoMoments all;
  for (int64_t p = 0; p < parts; p++) all.merge(part[p]);
  out[0] = (float)all.count;
  out[1] = (float)all.mean;
  out[2] = (float)all.m2;
}

extern "C" void fastppo_whiten(
    const float* x, const float* weight, const float* moments, int64_t n, int shift_mean, float* y) {
  FastppoMoments all;
  all.count = moments[0];
  all.mean = moments[1];
  all.m2 = moments[2];
  const double scale = all.scale(), back = shift_mean ? 0.0 : all.mean;
#pragma omp parallel for schedule(static) if (n > FASTPPO_ALONE)
  for (int64_t i = 0; i < n; i++)
    y[i] = weight && weight[i] == 0 ? 0.0f : (float)((x[i] - all.mean) * scale + back);
}
