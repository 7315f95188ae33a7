// The critic's clipped loss, its gradient and its sums.
#define FASTPPO_FILE "value_loss.cpp"
#include "every_isa.h"

#include "vector.h"

#ifndef FASTPPO_VALUE_LOSS
#define FASTPPO_VALUE_LOSS
// The sums of ValueMetrics in their order, the loss last.
constexpr int SUMS = 7;

struct FastppoValues {
  const float *value, *old, *target, *weight;
  float clip;  // 0: none
  float* grad;
};
#endif

namespace FASTPPO_ISA {

// What a register of tokens adds to the sums; counts of at most a block's tokens are exact floats.
struct ValueSums {
  Floats count = {}, clipped = {};
  Doubles error, value, target, target_square, loss;
};

// A lane of weight 0 is not read: whatever stands there counts as 0.
__attribute__((always_inline)) static inline Floats value_loss_some(
    const float* value, const float* old, const float* target, const float* weight, float clip,
    ValueSums& sums) {
  const Floats w = load(weight);
  const Ints live = w != 0.0f;
  const Floats v = live ? load(value) : Floats{}, r = live ? load(target) : Floats{};
  const Floats away = v - r, error = away * away;
  Floats larger_error = error;
  Ints clipped = {};
  if (clip > 0) {
    const Floats center = live ? load(old) : Floats{}, low = center - clip, high = center + clip;
    Floats held = v < low ? low : v;
    held = held > high ? high : held;
    const Floats clipped_error = (held - r) * (held - r);
    // Where the clipped error is the larger one, the value was clipped: no gradient.
    clipped = clipped_error > error;
    larger_error = clipped ? clipped_error : error;
  }
  sums.count += live ? all(1.0f) : Floats{};
  sums.clipped += clipped ? all(1.0f) : Floats{};
  sums.error = sums.error + doubles(error);
  sums.value = sums.value + doubles(v);
  sums.target = sums.target + doubles(r);
  sums.target_square = sums.target_square + doubles(r) * doubles(r);
  sums.loss = sums.loss + doubles(w) * doubles(larger_error) * 0.5;
  return clipped ? Floats{} : w * away;
}

// The gradient of a block of tokens, and their sums.
static void value_loss_block(const FastppoValues& a, int64_t n, double* out) {
  ValueSums sums;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    store(a.grad + i, value_loss_some(
        a.value + i, a.old + i, a.target + i, a.weight + i, a.clip, sums));
  if (i < n) {
    float in[4][LANES] = {}, grad[LANES];
    const float* from[] = {a.value, a.old, a.target, a.weight};
    for (int k = 0; k < 4; k++) std::memcpy(in[k], from[k] + i, (n - i) * sizeof(float));
    store(grad, value_loss_some(in[0], in[1], in[2], in[3], a.clip, sums));
    std::memcpy(a.grad + i, grad, (n - i) * sizeof(float));
  }
  out[0] = sum(sums.count);
  out[1] = sum(sums.clipped);
  out[2] = sum(sums.error);
  out[3] = sum(sums.value);
  out[4] = sum(sums.target);
  out[5] = sum(sums.target_square);
  out[6] = sum(sums.loss);
}

}  // namespace FASTPPO_ISA

#ifdef FASTPPO_LAST_ISA
// The loss into `loss`, the other sums into `metrics`. Blocks do not depend on the number of threads.
extern "C" void fastppo_value_loss(
    const float* value, const float* old, const float* target, const float* weight, float clip,
    int64_t n, float* grad, float* metrics, float* loss) {
  const auto block = FASTPPO_PICK(value_loss_block);
  const FastppoBlocks blocks(n);
  double part[FASTPPO_BLOCKS][SUMS];
#pragma omp parallel for schedule(static) if (n > FASTPPO_ALONE)
  for (int64_t p = 0; p < blocks.count; p++) {
    const int64_t i = p * blocks.size;
    const FastppoValues own{value + i, old + i, target + i, weight + i, clip, grad + i};
    block(own, std::min(blocks.size, n - i), part[p]);
  }
  double sums[SUMS] = {};
  for (int64_t p = 0; p < blocks.count; p++)
    for (int k = 0; k < SUMS; k++) sums[k] += part[p][k];
  for (int k = 0; k < SUMS - 1; k++) metrics[k] = (float)sums[k];
  *loss = (float)sums[SUMS - 1];
}
#endif
