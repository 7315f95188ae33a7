// The per-token loss of PPO and KL's estimates: a few operations a token, in float32.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "abi.h"

// exp(e) - 1 - e; by its series near 0, where the difference cancels.
static inline float expm1_minus_arg(float e) { return (float)(std::expm1((double)e) - (double)e); }

struct FastppoSlope {
  float value, slope;
};

// k and dk/dlogprob; both 0 where the sampled token is masked vocabulary (logprob -inf).
static inline FastppoSlope kl_and_slope(float logprob, float ref, float limit, int kind) {
  if (logprob == -std::numeric_limits<float>::infinity()) return {0, 0};
  float diff = logprob - ref;
  if (kind == FASTPPO_K1) return {diff, 1};
  if (kind == FASTPPO_ABS) return {std::fabs(diff), diff > 0 ? 1.0f : diff < 0 ? -1.0f : diff};
  if (kind == FASTPPO_K2) return {diff * diff / 2, diff};
  float e = -diff < -limit ? -limit : -diff > limit ? limit : -diff;
  float slope = std::fabs(diff) <= limit ? -std::expm1(e) : diff == diff ? 0.0f : diff;
  return {expm1_minus_arg(e), slope};
}

struct FastppoSurrogate {
  float loss, slope, ratio, log_ratio;
  bool clipped, low, high, dual, clamped;
};

// max(-A rho, -A clip(rho)), or the dual clip's bound; its slope in the log ratio.
static inline FastppoSurrogate surrogate(
    float logprob, float behaviour, float advantage, const FastppoLoss& loss) {
  // A sampled token of masked vocabulary has ratio 0, whatever the clamp would make of it.
  const bool masked = logprob == -std::numeric_limits<float>::infinity();
  const float low = 1.0f - loss.clip_low, high = 1.0f + loss.clip_high, limit = loss.limit;
  const float raw = masked ? -limit : logprob - behaviour;
  const float log_ratio = raw < -limit ? -limit : raw > limit ? limit : raw;
  const float ratio = masked ? 0.0f : std::exp(log_ratio);
  const float clipped_ratio = ratio < low ? low : ratio > high ? high : ratio;
  FastppoSurrogate found;
  found.ratio = ratio;
  found.log_ratio = log_ratio;
  found.clamped = std::fabs(raw) > limit && !masked;
  found.high = advantage > 0 && ratio > high;
  found.low = advantage < 0 && ratio < low;
  found.dual = false;
  const float unclipped = -advantage * ratio, clipped_loss = -advantage * clipped_ratio;
  found.loss = unclipped > clipped_loss || unclipped != unclipped ? unclipped : clipped_loss;
  if (loss.dual_clip > 0 && advantage < 0) {
    const float bound = -loss.dual_clip * advantage;
    found.loss = found.loss > bound ? bound : found.loss;
    found.dual = ratio > loss.dual_clip;
  }
  found.clipped = found.low || found.high || found.dual;
  found.slope = found.clipped || found.clamped || masked ? 0.0f : unclipped;
  return found;
}
