// The CPU kernels over many shapes, with nothing around them: built with the address and
// undefined-behaviour sanitizers, it ends with 0 if no kernel touches what is not its own.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "abi.h"
#include "moments.h"

extern "C" {
int fastppo_use_isa(int);
void fastppo_policy_loss(const FastppoRows*, const FastppoGradient*, const FastppoLoss*);
void fastppo_token_logprobs(const FastppoRows*, const FastppoStatistics*);
void fastppo_token_logprobs_backward(
    const FastppoRows*, const FastppoGradient*, const FastppoStatistics*, const float*, const float*);
void fastppo_score_tokens(const FastppoRows*, const void*, int64_t, const FastppoScores*);
void fastppo_sum_rows(const float*, int64_t, int64_t, int64_t, int64_t, float*);
void fastppo_token_kl(const float*, const float*, float*, float*, int64_t, float, int);
void fastppo_token_kl_backward(const float*, const float*, int64_t, int64_t, float*);
void fastppo_value_loss(
    const float*, const float*, const float*, const float*, float, int64_t, float*, float*, float*);
void fastppo_moments(const float*, const float*, int64_t, float*);
void fastppo_whiten(const float*, const float*, const float*, int64_t, int, float*);
void fastppo_gae(
    const float*, const float*, const int64_t*, int64_t, const float*, double, double, float*, float*);
void fastppo_advantages(const FastppoAdvantages*);
void fastppo_decoder_layer(const FastppoDecoderLayer*);
void fastppo_rms_norm_backward(
    const float*, const float*, const float*, float, int64_t, int64_t, float*);
void fastppo_gated_unit_backward(
    const float*, const float*, const float*, int64_t, float*, float*);
void fastppo_word_block(const FastppoWordBlock*);
void fastppo_word_gradient(const FastppoWordBlock*, const FastppoWordSlopes*);
void fastppo_word_block_end(const FastppoWordBlock*, const FastppoStatistics*, const float*);
}

using Bytes = std::vector<unsigned char>;

static unsigned state = 1;
static float random_float() { return (float)((state = state * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1.0f; }

static std::vector<float> floats(int64_t n) {
  std::vector<float> v(n);
  for (float& x : v) x = 4 * random_float();
  return v;
}

// Logits of a dtype, in memory of exactly their size: one byte further is somebody else's.
static Bytes logits(int64_t count, int dtype) {
  const int64_t item = dtype == FASTPPO_F32 ? 4 : 2;
  Bytes bytes(count * item);
  for (int64_t i = 0; i < count; i++) {
    float x = 4 * random_float();
    uint32_t w;
    std::memcpy(&w, &x, 4);
    // Any pattern is a number of 16 bits to read; these are finite in both kinds.
    uint16_t half = (uint16_t)(w >> 16) & 0xbfff;
    std::memcpy(&bytes[i * item], item == 4 ? (void*)&x : (void*)&half, item);
  }
  return bytes;
}

static void rows_of_logits(int64_t n, int64_t vocab, int dtype, int out_dtype, float softcap, bool stream) {
  const int64_t item = dtype == FASTPPO_F32 ? 4 : 2, out_item = out_dtype == FASTPPO_F32 ? 4 : 2;
  Bytes x = logits(n * vocab, dtype), y = logits(n * vocab, dtype), out(n * vocab * out_item);
  std::vector<int64_t> token(n);
  for (int64_t i = 0; i < n; i++) token[i] = i % 5 == 4 ? -100 : (i * 7919) % vocab;
  auto behaviour = floats(n), advantage = floats(n), weight = floats(n), ref = floats(n);
  std::vector<float> logprob(n), entropy(n), kl(n), highest(n), total(n), term(FASTPPO_TERMS * n);
  if (n > 1) weight[1] = 0;
  FastppoRows rows = {x.data(), vocab, n, vocab, 0, token.data(), nullptr, nullptr, -100, dtype, 0.7f, softcap, 0};
  FastppoGradient grad = {out.data(), vocab, out_dtype, stream};
  FastppoLoss loss = {
      behaviour.data(), advantage.data(), weight.data(), ref.data(), nullptr, logprob.data(),
      entropy.data(), kl.data(), term.data(), n, 0.1f, 0.01f, 1, 0.2f, 0.2f, 3, 20, FASTPPO_K3};
  fastppo_policy_loss(&rows, &grad, &loss);
  FastppoStatistics stats = {logprob.data(), entropy.data(), highest.data(), total.data()};
  fastppo_token_logprobs(&rows, &stats);
  fastppo_token_logprobs_backward(&rows, &grad, &stats, advantage.data(), weight.data());
  FastppoScores scores = {logprob.data(), ref.data(), entropy.data(), kl.data()};
  fastppo_score_tokens(&rows, y.data(), vocab, &scores);
  if (dtype == out_dtype) {
    grad.out = x.data();
    fastppo_policy_loss(&rows, &grad, &loss);
  }
  grad.out = nullptr;
  fastppo_policy_loss(&rows, &grad, &loss);
  std::vector<float> sums(FASTPPO_TERMS);
  fastppo_sum_rows(term.data(), n, FASTPPO_TERMS, n, 2, sums.data());
  (void)item;
}

static void tokens(int64_t n, int64_t batch) {
  auto a = floats(n), b = floats(n), c = floats(n), d = floats(n);
  std::vector<float> e(n), f(n), g(n), h(n), out(7);
  for (int kind = 0; kind < 4; kind++)
    fastppo_token_kl(a.data(), b.data(), e.data(), f.data(), n, 20, kind);
  for (int64_t step = 0; step < 2; step++)
    fastppo_token_kl_backward(a.data(), step ? b.data() : out.data(), step, n, e.data());
  for (const float clip : {0.0f, 0.2f})
    fastppo_value_loss(
        a.data(), b.data(), c.data(), d.data(), clip, n, e.data(), out.data(), out.data() + 6);
  for (const float* weight : {(const float*)nullptr, (const float*)b.data()}) {
    fastppo_moments(a.data(), weight, n, out.data());
    fastppo_whiten(a.data(), weight, out.data(), n, 0, e.data());
    fastppo_whiten(a.data(), weight, nullptr, n, 1, e.data());
  }
  std::vector<FastppoMoments> moments(batch);
  std::vector<int64_t> offsets(batch + 1);
  for (int64_t i = 0; i <= batch; i++) offsets[i] = i * n / batch;
  auto score = floats(batch);
  fastppo_gae(a.data(), b.data(), offsets.data(), batch, score.data(), 0.99, 0.95, e.data(), f.data());
  for (int whiten = 0; whiten < 2; whiten++) {
    FastppoAdvantages all = {
        score.data(), a.data(), b.data(), nullptr, c.data(), d.data(), offsets.data(), nullptr,
        e.data(), f.data(), g.data(), h.data(), moments.data(), batch, 0.99, 0.95, 0.1f, 20,
        FASTPPO_K1, whiten, 1, 0};
    fastppo_advantages(&all);
  }
}

static void few_rows(int64_t n, int64_t inputs, int64_t outputs, int dtype) {
  auto x = floats(n * inputs), bias = floats(outputs);
  // The last row of a weight whose rows lie apart ends where its memory ends.
  const int64_t stride = inputs + 3, held = (outputs - 1) * stride + inputs;
  Bytes weight = logits(held, dtype);
  std::vector<float> out(n * outputs);
  FastppoFewRows all = {x.data(), weight.data(), stride, bias.data(), out.data(),
                        n, inputs, outputs, dtype, 0};
  fastppo_few_rows(&all);
  all.bias = nullptr;
  fastppo_few_rows(&all);
}

static void decoder_layer(int64_t rows, int64_t width, int64_t wide, int64_t size, bool head_norms) {
  const int64_t heads = 4, kv_heads = 2, places = 5, slots = rows + 1;
  std::vector<std::vector<float>> kept;
  const auto linear = [&](int64_t inputs, int64_t outputs) {
    kept.push_back(floats(outputs * inputs));
    return FastppoFewRows{nullptr, kept.back().data(), inputs, nullptr, nullptr, 0, inputs, outputs,
                          FASTPPO_F32, 0};
  };
  const int64_t queries = heads * size, keys_and_values = kv_heads * size;
  FastppoDecoderLayer all = {};
  all.q = linear(width, queries), all.k = linear(width, keys_and_values);
  all.v = linear(width, keys_and_values), all.o = linear(queries, width);
  all.gate = linear(width, wide), all.up = linear(width, wide), all.down = linear(wide, width);
  auto x = floats(rows * width), norm = floats(width), head_norm = floats(size);
  auto cos = floats(rows * size), keys = floats(slots * kv_heads * places * size), values = keys;
  std::vector<float> out(rows * width);
  std::vector<float> work(
      rows * (width + queries + 2 * keys_and_values + wide + (queries > wide ? queries : wide)));
  std::vector<int64_t> first(rows);
  for (int64_t row = 0; row < rows; row++) first[row] = row % places;
  const int64_t head = places * size, slot = kv_heads * head;
  all.attention = {nullptr, keys.data(), values.data(), slot, head, slot, head, first.data(), nullptr,
                   rows, heads, kv_heads, places, size, size, 0.5f, 0.0f, FASTPPO_F32, 0};
  all.x = x.data(), all.out = out.data(), all.work = work.data();
  all.norm = all.post_norm = norm.data(), all.eps = all.head_eps = 1e-5f;
  all.q_norm = all.k_norm = head_norms ? head_norm.data() : nullptr;
  all.cos = all.sin = cos.data(), all.rotary_row = size;
  fastppo_decoder_layer(&all);
}

static void norms_and_units(int64_t rows, int64_t size) {
  auto x = floats(rows * size), other = floats(rows * size), dy = floats(rows * size);
  auto weight = floats(size);
  std::vector<float> out(rows * size), second(rows * size);
  fastppo_rms_norm(x.data(), weight.data(), 1e-5f, rows, size, out.data());
  fastppo_rms_norm_backward(dy.data(), x.data(), weight.data(), 1e-5f, rows, size, out.data());
  fastppo_gated_unit(x.data(), other.data(), rows * size, out.data());
  fastppo_gated_unit_backward(
      dy.data(), x.data(), other.data(), rows * size, out.data(), second.data());
}

static void word_blocks(int64_t n, int64_t vocab, int64_t size, float softcap, bool biased, bool slopes) {
  const int64_t stride = (n + FASTPPO_TOKENS - 1) / FASTPPO_TOKENS * FASTPPO_TOKENS, most = 7;
  auto bias = floats(vocab), slope = floats(n * size), own = floats(n * size);
  std::vector<float> tau(stride, 0.7f), factor(stride), least(stride), sampled(stride);
  std::vector<float> shift(stride, -3.4e38f), highest(stride, -3.4e38f);
  std::vector<double> total(stride), shifted(stride);
  std::vector<int64_t> token(n);
  for (int64_t i = 0; i < n; i++) token[i] = i % 5 == 4 ? -100 : (i * 7919) % vocab;
  std::vector<float> logprob(n), entropy(n), row_max(n), sum_exp(n);
  FastppoWordBlock block = {
      nullptr, stride, n, 0, 0, vocab, token.data(), -100, nullptr, tau.data(), factor.data(),
      least.data(), shift.data(), highest.data(), sampled.data(), total.data(), shifted.data(),
      slopes ? slope.data() : nullptr, size, size, softcap, 0};
  for (int64_t first = 0; first < vocab; first += most) {
    block.first_word = first;
    block.words = std::min(most, vocab - first);
    auto x = floats(block.words * stride);
    for (float& logit : x) logit *= 1 + first;  // so that later ones are larger by far
    block.x = x.data();
    block.bias = biased ? bias.data() + first : nullptr;
    fastppo_word_block(&block);
  }
  FastppoStatistics into = {logprob.data(), entropy.data(), row_max.data(), sum_exp.data()};
  fastppo_word_block_end(&block, &into, own.data());
  auto of_exp = floats(stride), of_shifted_exp = floats(stride), of_token = floats(stride);
  for (int64_t i = 0; i < n; i++)
    if (token[i] == -100) of_exp[i] = of_shifted_exp[i] = of_token[i] = 0;
  for (int64_t first = 0; first < vocab; first += most) {
    auto out = floats(most * stride);  // beside the logits, or in their place
    FastppoWordSlopes gradient = {out.data(), of_exp.data(), of_shifted_exp.data(), of_token.data()};
    block.first_word = first;
    block.words = std::min(most, vocab - first);
    auto x = floats(block.words * stride);
    block.x = x.data();
    block.bias = biased ? bias.data() + first : nullptr;
    if (slopes) gradient.out = x.data();
    fastppo_word_gradient(&block, &gradient);
  }
}

int main() {
  int widths = 0;
  for (int isa = FASTPPO_PORTABLE; isa <= FASTPPO_AVX512; isa++) {
    if (fastppo_use_isa(isa) < 0) continue;
    widths++;
    for (int64_t vocab : {1, 3, 15, 16, 17, 64, 100, 2047, 2048, 2049, 4500, 6144})
      for (int dtype : {FASTPPO_F32, FASTPPO_BF16, FASTPPO_F16})
        for (int out_dtype : {FASTPPO_F32, FASTPPO_BF16, FASTPPO_F16}) {
          if (dtype != FASTPPO_F32 && dtype != out_dtype) continue;
          for (float softcap : {0.0f, 30.0f})
            for (bool stream : {false, true})
              for (int64_t n : {0, 1, 6}) rows_of_logits(n, vocab, dtype, out_dtype, softcap, stream);
        }
    for (int64_t n : {0, 1, 2, 3, 4, 5, 9})
      for (int64_t inputs : {1, 7, 16, 33, 256})
        for (int64_t outputs : {1, 3, 4, 5, 150})
          for (int dtype : {FASTPPO_F32, FASTPPO_BF16, FASTPPO_F16}) few_rows(n, inputs, outputs, dtype);
    for (int64_t rows : {0, 1, 3, 40})
      for (int64_t size : {1, 15, 16, 33, 1001}) norms_and_units(rows, size);
    for (int64_t n : {1, 31, 32, 70})
      for (int64_t vocab : {1, 7, 40, 100})
        for (float softcap : {0.0f, 30.0f})
          for (bool biased : {false, true})
            for (bool slopes : {false, true}) word_blocks(n, vocab, 5, softcap, biased, slopes);
    for (int64_t rows : {1, 3, 4})
      for (int64_t wide : {1, 40, 200})
        for (int64_t size : {2, 20, 64})
          for (bool head_norms : {false, true}) decoder_layer(rows, 24, wide, size, head_norms);
  }
  for (int64_t n : {1, 2, 4095, 4096, 4097, 70000})
    for (int64_t batch : {1, 3}) tokens(n, batch);
  std::printf("%d vector widths, nothing found\n", widths);
}
