// silu(gate) up and its gradients in one pass each: in PyTorch two passes forward and four backward.
#define FASTPPO_FILE "gated_unit.cpp"
#include "every_isa.h"

#include "gated_unit.h"

namespace FASTPPO_ISA {

// silu'(g) = s (1 + g (1 - s)), with s the sigmoid of g.
void gate_slopes(
    const float* dy, const float* gate, const float* up, int64_t count, float* d_gate,
    float* d_up) {
  const ExpScale scale(1.0);
  for (int64_t d = 0; d < count; d += LANES) {
    const int64_t left = std::min<int64_t>(LANES, count - d);
    const auto read = [&](const float* x) {
      return left == LANES ? load(x + d) : read_some<Float32>(x + d, left);
    };
    const Floats y = read(dy), g = read(gate), u = read(up), s = sigmoid_of(g, scale);
    const Floats of_up = y * (g * s), of_gate = y * u * (s * (1.0f + g * (1.0f - s)));
    std::memcpy(d_up + d, &of_up, left * sizeof(float));
    std::memcpy(d_gate + d, &of_gate, left * sizeof(float));
  }
}

}  // namespace FASTPPO_ISA

#ifdef FASTPPO_LAST_ISA
// Elements of a part: a multiple of every vector width, so that a number is the same in any part.
constexpr int64_t FASTPPO_PART = 1 << 12;

extern "C" void fastppo_gated_unit(
    const float* gate, const float* up, int64_t count, float* out) {
  const auto unit = FASTPPO_PICK(gate_unit);
#pragma omp parallel for schedule(static) if (count > FASTPPO_ALONE)
  for (int64_t at = 0; at < count; at += FASTPPO_PART)
    unit(gate + at, up + at, std::min(FASTPPO_PART, count - at), out + at);
}

extern "C" void fastppo_gated_unit_backward(
    const float* dy, const float* gate, const float* up, int64_t count, float* d_gate,
    float* d_up) {
  const auto slopes = FASTPPO_PICK(gate_slopes);
#pragma omp parallel for schedule(static) if (count > FASTPPO_ALONE)
  for (int64_t at = 0; at < count; at += FASTPPO_PART)
    slopes(
        dy + at, gate + at, up + at, std::min(FASTPPO_PART, count - at), d_gate + at, d_up + at);
}
#endif
