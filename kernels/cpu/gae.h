// Generalised advantage estimation of one sequence, from its end.
#pragma once

#include "abi.h"

// reward(t) gives the reward of token t of the whole.
template <class Reward>
static inline void gae_sequence(
    Reward reward, const float* value, int64_t start, int64_t end, float after, double gamma,
    double lam, float* advantage, float* returns) {
  double following = after, carry = 0;
  for (int64_t t = end - 1; t >= start; t--) {
    carry = reward(t) + gamma * following - value[t] + gamma * lam * carry;
    following = value[t];
    advantage[t] = (float)carry;
    returns[t] = (float)(carry + value[t]);
  }
}
