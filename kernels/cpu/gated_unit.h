// silu(gate) up: the unit in the middle of a gated MLP.
#include "vector.h"

namespace FASTPPO_ISA {

// 1 / (1 + exp(-x)), by the exponential of -|x|, which does not overflow.
static inline Floats sigmoid_of(Floats x, const ExpScale& scale) {
  const Floats size = (Floats)((Words)x & 0x7fffffffu);
  const Floats e = exp_of(at_least(-size, scale.least), scale);
  return x >= 0.0f ? 1.0f / (1.0f + e) : e / (1.0f + e);
}

// `out` may be `gate`.
static inline void gate_unit(const float* gate, const float* up, int64_t count, float* out) {
  const ExpScale scale(1.0);
  int64_t d = 0;
  for (; d + LANES <= count; d += LANES) {
    const Floats g = load(gate + d);
    store(out + d, g * sigmoid_of(g, scale) * load(up + d));
  }
  if (d < count) {
    const Floats g = read_some<Float32>(gate + d, count - d);
    const Floats u = read_some<Float32>(up + d, count - d);
    const Floats own = g * sigmoid_of(g, scale) * u;
    std::memcpy(out + d, &own, (count - d) * sizeof(float));
  }
}

}  // namespace FASTPPO_ISA
