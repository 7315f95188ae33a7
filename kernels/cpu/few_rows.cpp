// A linear layer of few rows (a step of decoding): it takes as long as its weight takes to read.
//
// A library's GEMM packs the weight first, which pays where hundreds of rows use it again.
#define FASTPPO_FILE "few_rows.cpp"
#include "every_isa.h"

#include "vector.h"

namespace FASTPPO_ISA {

// Outputs and rows that share what was read: their sums stay in registers, of which AVX-512 has 32.
constexpr int OUTPUTS = LANES == 16 ? 4 : 2;
constexpr int ROWS = 4;

// V outputs of N rows; meanwhile it fetches FETCH weights of the next V outputs, from the `fetch`th.
//
// Every sum has an order of its own, whatever is computed beside it: a row's result is the same in
// any batch, and for any number of threads.
template <class T, int V, int N, int FETCH = V>
static void dot(const FastppoFewRows& a, int64_t v, int64_t n, int64_t fetch = 0) {
  const auto* w = (const typename T::Storage*)a.weight + v * a.weight_stride;
  const auto* next = w + (V + fetch) * a.weight_stride;
  const float* x = a.x + n * a.inputs;
  Floats sum[V][N] = {};
  int64_t d = 0;
  for (; d + LANES <= a.inputs; d += LANES) {
    for (int i = 0; i < FETCH; i++) __builtin_prefetch(next + i * a.weight_stride + d);
    Floats factor[N];
    for (int j = 0; j < N; j++) factor[j] = load(x + j * a.inputs + d);
    for (int i = 0; i < V; i++) {
      const Floats own = T::read(w + i * a.weight_stride + d);
      for (int j = 0; j < N; j++) sum[i][j] += own * factor[j];
    }
  }
  if (d < a.inputs) {
    for (int i = 0; i < V; i++) {
      const Floats own = read_some<T>(w + i * a.weight_stride + d, a.inputs - d);
      for (int j = 0; j < N; j++)
        sum[i][j] += own * read_some<Float32>(x + j * a.inputs + d, a.inputs - d);
    }
  }
  for (int i = 0; i < V; i++)
    for (int j = 0; j < N; j++)
      a.out[(n + j) * a.outputs + v + i] = tree_sum(sum[i][j]) + (a.bias ? a.bias[v + i] : 0.0f);
}

template <class T, int V>
static void outputs(const FastppoFewRows& a, int64_t v) {
  // Each group of rows fetches a part, so that memory is read all the time.
  constexpr int HALF = (V + 1) / 2;
  const int64_t groups = a.n / ROWS;
  int64_t n = 0;
  for (int64_t group = 0; group < groups; group++, n += ROWS) {
    if (groups == 1) dot<T, V, ROWS>(a, v, n);
    else if (groups < V) dot<T, V, ROWS, HALF>(a, v, n, group % 2 * (V - HALF));
    else dot<T, V, ROWS, 1>(a, v, n, group % V);
  }
  switch (a.n - n) {
    case 3: return dot<T, V, 3>(a, v, n);
    case 2: return dot<T, V, 2>(a, v, n);
    case 1: return dot<T, V, 1>(a, v, n);
  }
}

// OUTPUTS of them, the `block`th of their kind.
void few_rows_block(const FastppoFewRows& a, int64_t block) {
  const auto with = [&](auto t) {
    using T = decltype(t);
    const int64_t v = block * OUTPUTS;
    if (v + OUTPUTS <= a.outputs) return outputs<T, OUTPUTS>(a, v);
    for (int64_t last = v; last < a.outputs; last++) outputs<T, 1>(a, last);
  };
  if (a.dtype == FASTPPO_F32) return with(Float32{});
  if (a.dtype == FASTPPO_BF16) return with(BFloat16{});
  with(Float16{});
}

int64_t few_rows_blocks(const FastppoFewRows& a) { return (a.outputs + OUTPUTS - 1) / OUTPUTS; }

}  // namespace FASTPPO_ISA

#ifdef FASTPPO_LAST_ISA
extern "C" void fastppo_few_rows(const FastppoFewRows* a) {
  const auto block = FASTPPO_PICK(few_rows_block);
  const int64_t blocks = FASTPPO_PICK(few_rows_blocks)(*a);
#pragma omp parallel for schedule(static) if (a->outputs * a->inputs > FASTPPO_ALONE)
  for (int64_t own = 0; own < blocks; own++) block(*a, own);
}
#endif
