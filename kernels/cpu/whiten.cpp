// Moments in two stages, merged in one order, and whitening with them.
#include "moments.h"

#define FASTPPO_FILE "whiten.cpp"
#include "every_isa.h"

#include "vector.h"

namespace FASTPPO_ISA {

// Moments of n values: two passes, since a block stays in the cache; a division a token would cost
// more. Values of weight 0 are not read; a null weight counts all.
static FastppoMoments moments_block(const float* x, const float* weight, int64_t n) {
  FastppoMoments found;
  Floats count = {};
  Doubles total = {}, squares = {};
  const int64_t whole = n - n % LANES;
  float rest[LANES] = {}, live[LANES] = {};
  for (int64_t i = whole; i < n; i++) {
    live[i - whole] = !weight || weight[i] != 0;
    rest[i - whole] = live[i - whole] ? x[i] : 0.0f;
  }
  for (int64_t i = 0; i < whole; i += LANES) {
    if (weight) {
      const Ints on = load(weight + i) != 0.0f;
      count += on ? all(1.0f) : Floats{};
      total = total + doubles(on ? load(x + i) : Floats{});
    } else {
      total = total + doubles(load(x + i));
    }
  }
  found.count = (weight ? sum(count) : (double)whole) + sum(load(live));
  if (found.count == 0) return found;
  found.mean = (sum(total) + sum(load(rest))) / found.count;
  for (int64_t i = 0; i < whole; i += LANES) {
    Doubles away = doubles(load(x + i)) - found.mean;
    if (weight) {
      const Ints on = load(weight + i) != 0.0f;
      away = doubles(on ? load(x + i) : Floats{}) - doubles(on ? all(1.0f) : Floats{}) * found.mean;
    }
    squares = squares + away * away;
  }
  const Doubles away = doubles(load(rest)) - doubles(load(live)) * found.mean;
  found.m2 = sum(squares + away * away);
  return found;
}

static void whiten_block(
    const float* x, const float* weight, double mean, double scale, double back, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const Floats found = floats((doubles(load(x + i)) - mean) * scale + back);
    store(y + i, weight ? (load(weight + i) != 0.0f ? found : Floats{}) : found);
  }
  for (; i < n; i++) y[i] = weight && weight[i] == 0 ? 0.0f : (float)((x[i] - mean) * scale + back);
}

}  // namespace FASTPPO_ISA

#ifdef FASTPPO_LAST_ISA
FastppoMoments moments_of(const float* x, const float* weight, int64_t n) {
  return FASTPPO_PICK(moments_block)(x, weight, n);
}

static FastppoMoments all_moments(const float* x, const float* weight, int64_t n) {
  const FastppoBlocks blocks(n);
  FastppoMoments part[FASTPPO_BLOCKS], all;
#pragma omp parallel for schedule(static) if (n > FASTPPO_ALONE)
  for (int64_t p = 0; p < blocks.count; p++) {
    const int64_t i = p * blocks.size;
    part[p] = moments_of(x + i, weight ? weight + i : nullptr, std::min(blocks.size, n - i));
  }
  for (int64_t p = 0; p < blocks.count; p++) all.merge(part[p]);
  return all;
}

// (count, mean, m2) of the values whose weight is not 0.
extern "C" void fastppo_moments(const float* x, const float* weight, int64_t n, float* out) {
  const FastppoMoments all = all_moments(x, weight, n);
  out[0] = (float)all.count;
  out[1] = (float)all.mean;
  out[2] = (float)all.m2;
}

// By the moments (3,), or by their own where those are null.
extern "C" void fastppo_whiten(
    const float* x, const float* weight, const float* moments, int64_t n, int shift_mean, float* y) {
  FastppoMoments all;
  if (moments) {
    all.count = moments[0];
    all.mean = moments[1];
    all.m2 = moments[2];
  } else {
    all = all_moments(x, weight, n);
  }
  const auto block = FASTPPO_PICK(whiten_block);
  const double scale = all.scale(), back = shift_mean ? 0.0 : all.mean;
  const FastppoBlocks blocks(n);
#pragma omp parallel for schedule(static) if (n > FASTPPO_ALONE)
  for (int64_t p = 0; p < blocks.count; p++) {
    const int64_t i = p * blocks.size;
    block(x + i, weight ? weight + i : nullptr, all.mean, scale, back, std::min(blocks.size, n - i),
          y + i);
  }
}
#endif
