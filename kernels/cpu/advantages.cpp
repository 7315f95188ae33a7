// From scores and log-probs to whitened advantages: the KL-shaped reward, GAE, returns.
//
// Sequence by sequence; where something is whitened, the moments of the sequences are merged in their
// order in between.
#include "gae.h"
#include "moments.h"
#include "surrogate.h"

static void rewards(const FastppoAdvantages& a, int64_t b) {
  const int64_t start = a.offsets[b], end = a.offsets[b + 1];
  for (int64_t t = start; t < end; t++) {
    a.kl[t] = a.exact_kl ? a.exact_kl[t]
                         : kl_and_slope(a.logprob[t], a.ref[t], a.limit, a.kl_kind).value;
    a.reward[t] = -a.kl_coef * a.kl[t] + (a.extra ? a.extra[t] : 0.0f);
  }
  if (end > start) a.reward[end - 1] += a.score[b];
}

static FastppoMoments merged(const FastppoMoments* part, int64_t batch) {
  FastppoMoments all;
  for (int64_t b = 0; b < batch; b++) all.merge(part[b]);
  return all;
}

extern "C" void fastppo_advantages(const FastppoAdvantages* given) {
  const FastppoAdvantages& a = *given;
  auto* part = (FastppoMoments*)a.part;
  const int64_t n = a.offsets[a.batch];
#pragma omp parallel if (n > FASTPPO_ALONE)
  {
    FastppoMoments of_rewards;
    double scale = 1;
    if (a.whiten_rewards) {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < a.batch; b++) {
        rewards(a, b);
        part[b] = moments_of(a.reward + a.offsets[b], nullptr, a.offsets[b + 1] - a.offsets[b]);
      }
      of_rewards = merged(part, a.batch);  // by every thread alike
      scale = of_rewards.scale();
#pragma omp barrier
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < a.batch; b++) {
      const int64_t start = a.offsets[b], end = a.offsets[b + 1];
      if (a.whiten_rewards) {
        for (int64_t t = start; t < end; t++)
          a.reward[t] = (float)((a.reward[t] - of_rewards.mean) * scale + of_rewards.mean);
      } else {
        rewards(a, b);
      }
      gae_sequence(
          [&](int64_t t) { return (double)a.reward[t]; }, a.value, start, end,
          a.bootstrap ? a.bootstrap[b] : 0.0f, a.gamma, a.lam, a.advantage, a.returns);
      if (a.whiten_advantages) part[b] = moments_of(a.advantage + start, nullptr, end - start);
    }
    if (a.whiten_advantages) {
      const FastppoMoments all = merged(part, a.batch);
      const double shrink = all.scale();
#pragma omp for schedule(static)
      for (int64_t b = 0; b < a.batch; b++)
        for (int64_t t = a.offsets[b]; t < a.offsets[b + 1]; t++)
          a.advantage[t] = (float)((a.advantage[t] - all.mean) * shrink);
    }
  }
}
