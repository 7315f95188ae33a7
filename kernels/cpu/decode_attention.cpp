// Attention of one new token a row over the row's own cached keys: a step of decoding.
//
// A library's attention is given a mask, and reads and rounds by how the rows of a batch are padded.
// Here a row reads from its first token on, and every sum has an order that the row alone decides.
#define FASTPPO_FILE "decode_attention.cpp"
#include "every_isa.h"

#include "vector.h"

namespace FASTPPO_ISA {

// Query heads that share the keys and values that were read, and keys that share the queries.
constexpr int HEADS = 4;
constexpr int KEYS = 2;

template <class T, int G, int K>
static inline void dots(
    const float* q, const typename T::Storage* k, int64_t size, float scale, float* score,
    int64_t stride) {
  Floats sum[G][K] = {};
  int64_t d = 0;
  for (; d + LANES <= size; d += LANES) {
    Floats key[K];
    for (int j = 0; j < K; j++) key[j] = T::read(k + j * size + d);
    for (int g = 0; g < G; g++) {
      const Floats own = load(q + g * size + d);
      for (int j = 0; j < K; j++) sum[g][j] += own * key[j];
    }
  }
  if (d < size) {
    for (int g = 0; g < G; g++) {
      const Floats own = read_some<Float32>(q + g * size + d, size - d);
      for (int j = 0; j < K; j++) sum[g][j] += own * read_some<T>(k + j * size + d, size - d);
    }
  }
  for (int g = 0; g < G; g++)
    for (int j = 0; j < K; j++) score[g * stride + j] = tree_sum(sum[g][j]) * scale;
}

// Scores to probabilities, in place; returns 1 / their sum. `n` is filled up to whole registers.
static inline float soften(float* score, int64_t n, int64_t filled, float softcap) {
  for (int64_t j = n; j < filled; j++) score[j] = LOWEST;
  if (softcap > 0.0f) {
    for (int64_t j = 0; j < filled; j += LANES)
      store(score + j, tanh_of(load(score + j) / softcap) * softcap);
    for (int64_t j = n; j < filled; j++) score[j] = LOWEST;
  }
  Floats top = load(score);
  for (int64_t j = LANES; j < filled; j += LANES) top = larger(top, load(score + j));
  const float row_max = max_of(top);
  const ExpScale scale(1.0);
  Floats sum = {};
  for (int64_t j = 0; j < filled; j += LANES) {
    const Floats e = exp_of(scale.difference(load(score + j), row_max), scale);
    store(score + j, e);
    sum += e;
  }
  return 1.0f / tree_sum(sum);
}

template <class T, int G>
static void heads(const FastppoDecodeAttention& a, int64_t row, int64_t kv, int64_t head) {
  using Storage = typename T::Storage;
  const int64_t first = a.first[row], n = a.places - first;
  const int64_t filled = (n + LANES - 1) / LANES * LANES;
  const float* q = a.query + (row * a.heads + head) * a.size;
  const auto* k = (const Storage*)a.keys + row * a.key_row + kv * a.key_head + first * a.size;
  const auto* v =
      (const Storage*)a.values + row * a.value_row + kv * a.value_head + first * a.value_size;
  float* score = (float*)std::malloc(G * filled * sizeof(float));
  int64_t j = 0;
  for (; j + KEYS <= n; j += KEYS)
    dots<T, G, KEYS>(q, k + j * a.size, a.size, a.scale, score + j, filled);
  for (; j < n; j++) dots<T, G, 1>(q, k + j * a.size, a.size, a.scale, score + j, filled);
  float share[G];
  for (int g = 0; g < G; g++) share[g] = soften(score + g * filled, n, filled, a.softcap);
  float* out = a.out + (row * a.heads + head) * a.value_size;
  int64_t d = 0;
  for (; d + 2 * LANES <= a.value_size; d += 2 * LANES) {
    Floats sum[G][2] = {};
    for (j = 0; j < n; j++) {
      const Floats x = T::read(v + j * a.value_size + d);
      const Floats y = T::read(v + j * a.value_size + d + LANES);
      for (int g = 0; g < G; g++) {
        sum[g][0] += x * score[g * filled + j];
        sum[g][1] += y * score[g * filled + j];
      }
    }
    for (int g = 0; g < G; g++)
      for (int i = 0; i < 2; i++)
        store(out + g * a.value_size + d + i * LANES, sum[g][i] * share[g]);
  }
  for (; d < a.value_size; d += LANES) {
    const int64_t count = std::min<int64_t>(LANES, a.value_size - d);
    Floats sum[G] = {};
    for (j = 0; j < n; j++) {
      const Floats x = read_some<T>(v + j * a.value_size + d, count);
      for (int g = 0; g < G; g++) sum[g] += x * score[g * filled + j];
    }
    for (int g = 0; g < G; g++) {
      const Floats own = sum[g] * share[g];
      std::memcpy(out + g * a.value_size + d, &own, count * sizeof(float));
    }
  }
  std::free(score);
}

template <class T>
static void key_head(const FastppoDecodeAttention& a, int64_t row, int64_t kv) {
  const int64_t group = a.heads / a.kv_heads;
  int64_t g = 0;
  for (; g + HEADS <= group; g += HEADS) heads<T, HEADS>(a, row, kv, kv * group + g);
  switch (group - g) {
    case 3: return heads<T, 3>(a, row, kv, kv * group + g);
    case 2: return heads<T, 2>(a, row, kv, kv * group + g);
    case 1: return heads<T, 1>(a, row, kv, kv * group + g);
  }
}

// One key head of one row.
void decode_attention_block(const FastppoDecodeAttention& a, int64_t block) {
  const int64_t row = block / a.kv_heads, kv = block % a.kv_heads;
  if (a.dtype == FASTPPO_F32) return key_head<Float32>(a, row, kv);
  if (a.dtype == FASTPPO_BF16) return key_head<BFloat16>(a, row, kv);
  key_head<Float16>(a, row, kv);
}

}  // namespace FASTPPO_ISA

#ifdef FASTPPO_LAST_ISA
extern "C" void fastppo_decode_attention(const FastppoDecodeAttention* a) {
  const auto block = FASTPPO_PICK(decode_attention_block);
  const int64_t blocks = a->rows * a->kv_heads;
#pragma omp parallel for schedule(dynamic) if (blocks * a->places * a->size > FASTPPO_ALONE)
  for (int64_t own = 0; own < blocks; own++) block(*a, own);
}
#endif
