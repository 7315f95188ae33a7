// What passes between fastppo/ops/backends/native.py and the kernels: plain structs, no torch
// headers. fastppo/ops/native_library.py has the same fields in the same order; fastppo_sizeof lets it check that.
#pragma once

#include <cstdint>

enum FastppoIsa { FASTPPO_PORTABLE = 0, FASTPPO_AVX2 = 1, FASTPPO_AVX512 = 2 };
enum FastppoDtype { FASTPPO_F32 = 0, FASTPPO_BF16 = 1, FASTPPO_F16 = 2 };
enum FastppoKl { FASTPPO_K1 = 0, FASTPPO_ABS = 1, FASTPPO_K2 = 2, FASTPPO_K3 = 3 };

// Rows of logits, `first_row` of the whole onwards; what is one a token is whole.
struct FastppoRows {
  const void* x;
  int64_t x_stride;  // in logits; neighbours within a row lie side by side
  int64_t n;
  int64_t vocab;
  int64_t first_row;
  const int64_t* token;
  const float* live;         // null: all rows; else rows of 0 take no part
  const float* temperature;  // null: `tau` for all
  int64_t ignore_index;
  int32_t dtype;
  float tau;
  float softcap;  // 0: none
  int32_t padding;
};

struct FastppoGradient {
  void* out;  // of the logits' dtype or, where they are float32, of `dtype`; null: none wanted
  int64_t stride;
  int32_t dtype;
  int32_t stream;  // write past the caches: the memory is not wanted again soon
};

struct FastppoLoss {
  const float* behaviour;
  const float* advantage;
  const float* weight;
  const float* ref;         // null: no reference
  const float* importance;  // null: 1
  float* logprob;
  float* entropy;
  float* kl;
  float* term;  // (FASTPPO_TERMS, whole N): PolicyMetrics in its order, the loss last
  int64_t term_stride;
  float kl_coef;
  float entropy_coef;
  float grad_scale;
  float clip_low;
  float clip_high;
  float dual_clip;  // 0: none
  float limit;
  int32_t kl_kind;
};

struct FastppoStatistics {
  float* logprob;
  float* entropy;
  float* row_max;
  float* sum_exp;
};

// Float32 logits of the words from `first_word` on, for all tokens. What is one a token is of
// FASTPPO_TOKENS a tile, the last one too, as is x_stride; slopes are (n, size).
struct FastppoWordBlock {
  float* x;  // (words, x_stride)
  int64_t x_stride;
  int64_t n;
  int64_t words;
  int64_t first_word;
  int64_t vocab;
  const int64_t* token;  // (n,)
  int64_t ignore_index;
  const float* bias;  // of these words; null: none
  const float* tau;
  float* factor;   // what makes an exponential of a difference, see ExpScale
  float* least;
  float* shift;    // LOWEST at first
  float* row_max;  // likewise
  float* sampled;  // NaN at first
  double* sum_exp;
  double* sum_shifted_exp;
  float* slope;  // null: no exponentials are wanted
  int64_t slope_stride;
  int64_t size;
  float softcap;  // 0: none
  int32_t padding;
};

// d / d logit_v of a token is exp((u_v - row_max) / tau) (of_exp + of_shifted_exp (u_v - row_max)), and
// of_token more where v was sampled; one a token, of whole tiles, and 0 in the ignored. Gradients go to
// `out`, which has the block's x_stride and may be its x.
struct FastppoWordSlopes {
  float* out;  // (words, x_stride)
  const float* of_exp;
  const float* of_shifted_exp;
  const float* of_token;
};

struct FastppoScores {
  float* logprob;
  float* ref_logprob;
  float* entropy;
  float* kl;
};

struct FastppoAdvantages {
  const float* score;
  const float* logprob;
  const float* ref;
  const float* exact_kl;  // null: estimated from the two log-probs
  const float* extra;     // null: none
  const float* value;
  const int64_t* offsets;
  const float* bootstrap;  // null: 0
  float* advantage;
  float* returns;
  float* reward;
  float* kl;
  void* part;  // FastppoMoments (batch,)
  int64_t batch;
  double gamma;
  double lam;
  float kl_coef;
  float limit;
  int32_t kl_kind;
  int32_t whiten_rewards;
  int32_t whiten_advantages;
  int32_t padding;
};

struct FastppoFewRows {
  const float* x;      // (n, inputs), side by side
  const void* weight;  // (outputs, inputs) of `dtype`
  int64_t weight_stride;
  const float* bias;  // null: none
  float* out;         // (n, outputs), side by side
  int64_t n;
  int64_t inputs;
  int64_t outputs;
  int32_t dtype;
  int32_t padding;
};

struct FastppoDecodeAttention {
  const float* query;  // (rows, heads, size), side by side
  const void* keys;    // (rows, kv_heads, places, size) of `dtype`, places side by side
  const void* values;  // (rows, kv_heads, places, value_size) of `dtype`, places side by side
  int64_t key_row;     // from one row to the next, in numbers
  int64_t key_head;
  int64_t value_row;
  int64_t value_head;
  const int64_t* first;  // (rows,): the first place that a row attends to; it attends to the last
  float* out;            // (rows, heads, value_size), side by side
  int64_t rows;
  int64_t heads;
  int64_t kv_heads;
  int64_t places;
  int64_t size;
  int64_t value_size;
  float scale;
  float softcap;  // 0: none
  int32_t dtype;
  int32_t padding;
};

// float32 alone. Of the products only weight, bias and sizes are read; of the attention not query
// and out. Keys and values are written at the last place.
struct FastppoDecoderLayer {
  FastppoFewRows q;
  FastppoFewRows k;
  FastppoFewRows v;
  FastppoFewRows o;
  FastppoFewRows gate;
  FastppoFewRows up;
  FastppoFewRows down;
  FastppoDecodeAttention attention;
  const float* x;          // (rows, width), side by side
  const float* norm;       // (width,): before the attention
  const float* post_norm;  // (width,): before the gated unit
  const float* q_norm;     // (size,): of each head's queries; null: none
  const float* k_norm;     // (size,)
  const float* cos;        // (rows, size), `rotary_row` from one row to the next
  const float* sin;
  float* out;   // (rows, width), side by side
  float* work;  // rows * (width + outputs of q, k, v and up + the more of q's outputs and gate's)
  int64_t rotary_row;
  float eps;
  float head_eps;
};

extern "C" {
void fastppo_few_rows(const FastppoFewRows*);
void fastppo_decode_attention(const FastppoDecodeAttention*);
void fastppo_gated_unit(const float*, const float*, int64_t, float*);
void fastppo_rms_norm(const float*, const float*, float, int64_t, int64_t, float*);
}

constexpr int FASTPPO_TERMS = 17;
constexpr int64_t FASTPPO_TOKENS = 32;
// Logits below which starting threads costs more than they save.
constexpr int64_t FASTPPO_ALONE = 1 << 15;


// Tokens go through in blocks, whose sums are merged in their order: never more blocks than this,
// so that their sums fit on the stack.
constexpr int64_t FASTPPO_BLOCKS = 256;
struct FastppoBlocks {
  int64_t size, count;
  explicit FastppoBlocks(int64_t n) {
    size = (n + FASTPPO_BLOCKS - 1) / FASTPPO_BLOCKS;
    size = size < 4096 ? 4096 : size;
    count = (n + size - 1) / size;
  }
};

extern "C" int fastppo_isa();
