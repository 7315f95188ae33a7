// x weight / sqrt(mean(x^2) + eps), row by row: in PyTorch six passes, each with its own call.
#define FASTPPO_FILE "rms_norm.cpp"
#include "every_isa.h"

#include "vector.h"

namespace FASTPPO_ISA {

void rms_norm_row(const float* x, const float* weight, float eps, int64_t size, float* out) {
  Floats sum[2] = {};
  int64_t d = 0;
  for (; d + 2 * LANES <= size; d += 2 * LANES)
    for (int i = 0; i < 2; i++) {
      const Floats own = load(x + d + i * LANES);
      sum[i] += own * own;
    }
  double total = FASTPPO_ISA::sum(sum[0] + sum[1]);
  for (; d < size; d++) total += (double)x[d] * x[d];
  const float factor = (float)(1.0 / std::sqrt(total / (double)size + eps));
  for (d = 0; d + LANES <= size; d += LANES)
    store(out + d, load(x + d) * factor * load(weight + d));
  for (; d < size; d++) out[d] = x[d] * factor * weight[d];
}

// dx = f w dy - x f^3 sum(x w dy) / size, with f = 1 / sqrt(mean(x^2) + eps).
void rms_norm_slopes(
    const float* dy, const float* x, const float* weight, float eps, int64_t size, float* dx) {
  Floats squares[2] = {}, products[2] = {};
  int64_t d = 0;
  for (; d + 2 * LANES <= size; d += 2 * LANES)
    for (int i = 0; i < 2; i++) {
      const int64_t at = d + i * LANES;
      const Floats own = load(x + at);
      squares[i] += own * own;
      products[i] += own * (load(weight + at) * load(dy + at));
    }
  double square = FASTPPO_ISA::sum(squares[0] + squares[1]);
  double product = FASTPPO_ISA::sum(products[0] + products[1]);
  for (; d < size; d++) {
    square += (double)x[d] * x[d];
    product += (double)x[d] * weight[d] * dy[d];
  }
  const double exact = 1.0 / std::sqrt(square / (double)size + eps);
  const float factor = (float)exact;
  const float slope = (float)(exact * exact * exact * product / (double)size);
  for (d = 0; d + LANES <= size; d += LANES)
    store(dx + d, load(dy + d) * load(weight + d) * factor - load(x + d) * slope);
  for (; d < size; d++) dx[d] = dy[d] * weight[d] * factor - x[d] * slope;
}

}  // namespace FASTPPO_ISA

#ifdef FASTPPO_LAST_ISA
extern "C" void fastppo_rms_norm(
    const float* x, const float* weight, float eps, int64_t rows, int64_t size, float* out) {
  const auto row = FASTPPO_PICK(rms_norm_row);
#pragma omp parallel for schedule(static) if (rows * size > FASTPPO_ALONE)
  for (int64_t own = 0; own < rows; own++)
    row(x + own * size, weight, eps, size, out + own * size);
}

extern "C" void fastppo_rms_norm_backward(
    const float* dy, const float* x, const float* weight, float eps, int64_t rows, int64_t size,
    float* dx) {
  const auto row = FASTPPO_PICK(rms_norm_slopes);
#pragma omp parallel for schedule(static) if (rows * size > FASTPPO_ALONE)
  for (int64_t own = 0; own < rows; own++)
    row(dy + own * size, x + own * size, weight, eps, size, dx + own * size);
}
#endif
