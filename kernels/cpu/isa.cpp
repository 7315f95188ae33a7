// Which vector width runs: the widest that the processor has, or the one that FASTPPO_CPU names.
#include <cstdlib>
#include <cstring>

#include "abi.h"

static int widest() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return FASTPPO_AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return FASTPPO_AVX2;
#endif
  return FASTPPO_PORTABLE;
}

static int current = -1;

// Gives back what runs from now on; -1 where the processor cannot.
extern "C" int fastppo_use_isa(int wanted) {
  if (wanted > widest()) return -1;
  return current = wanted < 0 ? widest() : wanted;
}

extern "C" int fastppo_isa() { return current < 0 ? fastppo_use_isa(-1) : current; }

extern "C" int64_t fastppo_sizeof(int which) {
  const int64_t sizes[] = {
      sizeof(FastppoRows), sizeof(FastppoGradient), sizeof(FastppoLoss), sizeof(FastppoStatistics),
      sizeof(FastppoScores), sizeof(FastppoAdvantages), sizeof(FastppoFewRows), sizeof(FastppoDecodeAttention),
      sizeof(FastppoDecoderLayer), sizeof(FastppoWordBlock), sizeof(FastppoWordSlopes)};
  return which < (int)(sizeof sizes / sizeof *sizes) ? sizes[which] : 0;
}
