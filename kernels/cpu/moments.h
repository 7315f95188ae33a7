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

// Of the n values whose weight is not 0 (whiten.cpp); a null weight counts all.
FastppoMoments moments_of(const float* x, const float* weight, int64_t n);
