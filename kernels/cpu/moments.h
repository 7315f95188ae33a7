// Count, mean and sum of squared deviations, merged in one order, in double.
#pragma once

#include <cmath>

#include "abi.h"

constexpr double FASTPPO_EPS = 1e-8;  // inside the root, as in TRL

struct FastppoMoments {
  double count = 0, mean = 0, m2 = 0;

  // Chan, Golub, LeVeque 1979.
  inline void merge(const FastppoMoments& more) {
    if (more.count == 0) return;
    const double both = count + more.count, delta = more.mean - mean;
    m2 += more.m2 + delta * delta * count * more.count / both;
    mean += delta * more.count / both;
    count = both;
  }
  inline double variance() const { return count > 1 ? m2 / (count - 1) : 0.0; }
  inline double scale() const { return 1.0 / std::sqrt(variance() + FASTPPO_EPS); }
};

// Moments of x[from, to): two passes, since a block stays in the cache; a division a token would
// cost more.
static inline FastppoMoments moments_of(
    const float* x, const float* weight, int64_t from, int64_t to) {
  FastppoMoments found;
  double total = 0;
  for (int64_t i = from; i < to; i++) {
    const bool live = !weight || weight[i] != 0;
    found.count += live;
    total += live ? x[i] : 0.0f;
  }
  if (found.count == 0) return found;
  found.mean = total / found.count;
  for (int64_t i = from; i < to; i++) {
    const double d = !weight || weight[i] != 0 ? x[i] - found.mean : 0.0;
    found.m2 += d * d;
  }
  return found;
}
