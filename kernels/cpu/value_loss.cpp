// The critic's clipped loss, its gradient and its sums.
#include <cmath>

#include "abi.h"

// The sums of ValueMetrics in their order, the loss last, of a block of tokens each: (parts, 7).
constexpr int SUMS = 7;
constexpr int64_t TOKENS = 4096;

extern "C" int64_t fastppo_value_loss_parts(int64_t n) { return (n + TOKENS - 1) / TOKENS; }

extern "C" void fastppo_value_loss(
    const float* value, const float* old, const float* target, const float* weight, float clip,
    int64_t n, float* grad, double* part, float* out) {
  const int64_t parts = fastppo_value_loss_parts(n);
#pragma omp parallel for schedule(static) if (n > FASTPPO_ALONE)
  for (int64_t p = 0; p < parts; p++) {
    double sums[SUMS] = {};
    const int64_t end = (p + 1) * TOKENS < n ? (p + 1) * TOKENS : n;
    for (int64_t i = p * TOKENS; i < end; i++) {
      const float w = weight[i];
      grad[i] = 0;
      if (w == 0) continue;
      const float v = value[i], r = target[i];
      const float error = (v - r) * (v - r);
      float larger_error = error;
      bool clipped = false;
      if (clip > 0) {
        float clipped_value = v < old[i] - clip ? old[i] - clip : v;
        clipped_value = clipped_value > old[i] + clip ? old[i] + clip : clipped_value;
        const float clipped_error = (clipped_value - r) * (clipped_value - r);
        // Where the clipped error is the larger one, the value was clipped: no gradient.
        clipped = clipped_error > error;
        larger_error = clipped ? clipped_error : error;
      }
      grad[i] = clipped ? 0.0f : w * (v - r);
      const double terms[SUMS] = {
          1, clipped ? 1.0 : 0.0, error, v, r, (double)r * r, 0.5 * w * larger_error};
      for (int k = 0; k < SUMS; k++) sums[k] += terms[k];
    }
    for (int k = 0; k < SUMS; k++) part[p * SUMS + k] = sums[k];
  }
  double sums[SUMS] = {};
  for (int64_t p = 0; p < parts; p++)
    for (int k = 0; k < SUMS; k++) sums[k] += part[p * SUMS + k];
  for (int k = 0; k < SUMS; k++) out[k] = (float)sums[k];
}
