// A decoder layer of Llama's kind on one new token a row, in one call: a step of decoding.
//
// Two norms, seven products, rotary positions, attention and a gated unit take 25 calls of small
// operators in PyTorch, which for a few rows cost as much as the products themselves.
#define FASTPPO_FILE "decoder_layer.cpp"
#include "every_isa.h"

#include "gated_unit.h"

namespace FASTPPO_ISA {

// x cos + rotate_half(x) sin, as transformers' apply_rotary_pos_emb; `out` may be x.
void rotate_head(const float* x, const float* cos, const float* sin, int64_t size, float* out) {
  const int64_t half = size / 2;
  int64_t d = 0;
  for (; d + LANES <= half; d += LANES) {
    const Floats a = load(x + d), b = load(x + half + d);
    store(out + d, a * load(cos + d) - b * load(sin + d));
    store(out + half + d, b * load(cos + half + d) + a * load(sin + half + d));
  }
  for (; d < half; d++) {
    const float a = x[d], b = x[half + d];
    out[d] = a * cos[d] - b * sin[d];
    out[half + d] = b * cos[half + d] + a * sin[half + d];
  }
}

}  // namespace FASTPPO_ISA

#ifdef FASTPPO_LAST_ISA
static void product(FastppoFewRows own, const float* x, float* out, int64_t n) {
  own.x = x, own.out = out, own.n = n;
  fastppo_few_rows(&own);
}

static void add(float* out, const float* x, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] += x[i];
}

extern "C" void fastppo_decoder_layer(const FastppoDecoderLayer* layer) {
  const FastppoDecoderLayer& a = *layer;
  const auto rotate = FASTPPO_PICK(rotate_head);
  FastppoDecodeAttention own = a.attention;
  const int64_t rows = own.rows, width = a.q.inputs, wide = a.gate.outputs;
  const int64_t size = own.size, last = own.places - 1;
  float* normed = a.work;
  float* query = normed + rows * width;
  float* key = query + rows * a.q.outputs;
  float* value = key + rows * a.k.outputs;
  float* gate = value + rows * a.v.outputs;
  float* up = gate + rows * std::max(wide, a.q.outputs);

  fastppo_rms_norm(a.x, a.norm, a.eps, rows, width, normed);
  product(a.q, normed, query, rows);
  product(a.k, normed, key, rows);
  product(a.v, normed, value, rows);
  if (a.q_norm) fastppo_rms_norm(query, a.q_norm, a.head_eps, rows * own.heads, size, query);
  if (a.k_norm) fastppo_rms_norm(key, a.k_norm, a.head_eps, rows * own.kv_heads, size, key);
  for (int64_t row = 0; row < rows; row++) {
    const float *cos = a.cos + row * a.rotary_row, *sin = a.sin + row * a.rotary_row;
    float* q = query + row * a.q.outputs;
    for (int64_t head = 0; head < own.heads; head++)
      rotate(q + head * size, cos, sin, size, q + head * size);
    float* keys = (float*)own.keys + row * own.key_row + last * size;
    float* values = (float*)own.values + row * own.value_row + last * size;
    for (int64_t head = 0; head < own.kv_heads; head++) {
      rotate(key + (row * own.kv_heads + head) * size, cos, sin, size, keys + head * own.key_head);
      std::memcpy(
          values + head * own.value_head, value + (row * own.kv_heads + head) * size,
          size * sizeof(float));
    }
  }
  // The products before it have been read: attention's result takes the place of the gate.
  own.query = query, own.out = gate;
  fastppo_decode_attention(&own);
  product(a.o, gate, a.out, rows);
  add(a.out, a.x, rows * width);

  fastppo_rms_norm(a.out, a.post_norm, a.eps, rows, width, normed);
  product(a.gate, normed, gate, rows);
  product(a.up, normed, up, rows);
  fastppo_gated_unit(gate, up, rows * wide, gate);
  product(a.down, gate, normed, rows);
  add(a.out, normed, rows * width);
}
#endif
