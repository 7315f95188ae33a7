// A register of floats, for the width that is being compiled. No include guard: once a width.
//
// Arithmetic is GCC's vector extension; what it cannot say is said in intrinsics.
namespace FASTPPO_ISA {

constexpr int LANES = FASTPPO_LANES;
typedef float Floats __attribute__((vector_size(4 * FASTPPO_LANES)));
typedef double HalfDoubles __attribute__((vector_size(4 * FASTPPO_LANES)));
typedef float HalfFloats __attribute__((vector_size(2 * FASTPPO_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * FASTPPO_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * FASTPPO_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * FASTPPO_LANES)));

constexpr float LOWEST = -std::numeric_limits<float>::max();

static inline Floats all(float value) { return value - Floats{}; }
// b where either is NaN. GCC makes four instructions of the comparison where there is one.
static inline Floats larger(Floats a, Floats b) {
#if FASTPPO_LANES == 16
  // (GCC 12 warns of its own header at the form without a mask.)
  return (Floats)_mm512_maskz_max_ps((__mmask16)-1, (__m512)a, (__m512)b);
#elif FASTPPO_LANES == 8
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
static inline Floats at_least(Floats a, float least) { return larger(all(least), a); }
static inline Floats at_least(Floats a, Floats least) { return larger(least, a); }

// A register of floats as doubles takes two.
struct Doubles {
  HalfDoubles a = {}, b = {};
  Doubles operator+(const Doubles& o) const { return {a + o.a, b + o.b}; }
  Doubles operator-(const Doubles& o) const { return {a - o.a, b - o.b}; }
  Doubles operator*(const Doubles& o) const { return {a * o.a, b * o.b}; }
  Doubles operator-(double o) const { return {a - o, b - o}; }
  Doubles operator+(double o) const { return {a + o, b + o}; }
  Doubles operator*(double o) const { return {a * o, b * o}; }
};
// (GCC 12 warns of its own header at the forms without a mask.)
static inline Doubles doubles(const Floats& v) {
#if FASTPPO_LANES == 16
  const __mmask8 every = (__mmask8)-1;
  const __m256 a = _mm512_maskz_extractf32x8_ps(every, (__m512)v, 0);
  const __m256 b = _mm512_maskz_extractf32x8_ps(every, (__m512)v, 1);
  return {(HalfDoubles)_mm512_maskz_cvtps_pd(every, a), (HalfDoubles)_mm512_maskz_cvtps_pd(every, b)};
#elif FASTPPO_LANES == 8
  return {
      (HalfDoubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)),
      (HalfDoubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1))};
#else
  HalfFloats a, b;
  std::memcpy(&a, &v, sizeof a);
  std::memcpy(&b, (const char*)&v + sizeof a, sizeof b);
  return {__builtin_convertvector(a, HalfDoubles), __builtin_convertvector(b, HalfDoubles)};
#endif
}
static inline Floats floats(const Doubles& v) {
  const HalfFloats a = __builtin_convertvector(v.a, HalfFloats);
  const HalfFloats b = __builtin_convertvector(v.b, HalfFloats);
  Floats both;
  std::memcpy(&both, &a, sizeof a);
  std::memcpy((char*)&both + sizeof a, &b, sizeof b);
  return both;
}

static inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

static inline Words load_halves(const uint16_t* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, Words);
}
static inline void store_halves(uint16_t* p, Words w) {
  Halves h = __builtin_convertvector(w, Halves);
  std::memcpy(p, &h, sizeof h);
}

// Two registers of logits.
struct Pair {
  Floats a, b;
};

// Three kinds of logit: how they are read and written, a register of them or two. The two that
// `read_two` gives need not be in the order of memory; `write_two` below puts them back.
struct Float32 {
  using Storage = float;
  static inline Floats read(const float* p) { return load(p); }
  static inline void write(float* p, Floats v) { store(p, v); }
  static inline Pair read_two(const float* p) { return {load(p), load(p + LANES)}; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static inline Floats read(const uint16_t* p) { return (Floats)(load_halves(p) << 16); }
  // To the nearest, ties to even, in the upper half. A NaN may have any lower half and would round
  // into another number, so it is made anew.
  static inline Words rounded(Floats v) {
    Words w = (Words)v;
    Words up = w + 0x7fffu + ((w >> 16) & 1u);
    return v == v ? up : w | 0x400000u;
  }
  static inline void write(uint16_t* p, Floats v) { store_halves(p, rounded(v) >> 16); }
  // Even and odd neighbours: a shift and a mask where their order would cost a shuffle each.
  static inline Pair read_two(const uint16_t* p) {
    Words w;
    std::memcpy(&w, p, sizeof w);
    return {(Floats)(w << 16), (Floats)(w & 0xffff0000u)};
  }
  // The inverse, for values whose NaN, if any, have nothing in their lower halves.
  static inline Words two(Pair v) {
    Words a = (Words)v.a, b = (Words)v.b;
    a += 0x7fffu + ((a >> 16) & 1u);
    b += 0x7fffu + ((b >> 16) & 1u);
    return (a >> 16) | (b & 0xffff0000u);
  }
};

struct Float16 {
  using Storage = uint16_t;
  // Exponent and mantissa moved into place, then 2^112 corrects the exponent's offset, denormals
  // included; what had the largest exponent is an infinity or NaN.
  static inline Pair read_two(const uint16_t* p) { return {read(p), read(p + LANES)}; }
  static inline Floats read(const uint16_t* p) {
    Words h = load_halves(p);
    Words sign = (h & 0x8000u) << 16, rest = (h & 0x7fffu) << 13;
    Floats scaled = (Floats)rest * 0x1p112f;
    Words odd = (Words)scaled | 0x7f800000u;
    return (Floats)(sign | (rest >= (0x7c00u << 13) ? odd : (Words)scaled));
  }
  // To the nearest, ties to even, by the rounding of a float addition where the result is denormal.
  static inline void write(uint16_t* p, Floats v) {
    Words w = (Words)v, sign = (w >> 16) & 0x8000u, rest = w & 0x7fffffffu;
    Words normal = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    Words small = (Words)((Floats)rest + 0.5f) - 0x3f000000u;
    Words result = rest < (113u << 23) ? small : normal;
    // Above 65504 by half a step or more: infinite.
    result = rest >= 0x477ff000u ? Words{} + 0x7c00u : result;
    result = rest > 0x7f800000u ? Words{} + 0x7e00u : result;
    store_halves(p, result | sign);
  }
};

// Past the caches, without reading the line first: `p` is aligned to a register.
static inline void stream(float* p, Floats v) {
#if FASTPPO_LANES == 16
  _mm512_stream_ps(p, (__m512)v);
#elif FASTPPO_LANES == 8
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}

static inline void streams_end() {
#if FASTPPO_LANES > 4
  _mm_sfence();  // such stores wait for nobody
#endif
}

// Two registers that `T::read_two` gave the order of, as O; past the caches where STREAM.
template <class T, class O, bool STREAM>
static inline void write_two(typename O::Storage* p, Pair v) {
  float* to = (float*)p;
  if constexpr (std::is_same<T, BFloat16>::value) {
    STREAM ? stream(to, (Floats)BFloat16::two(v)) : store(to, (Floats)BFloat16::two(v));
  } else if constexpr (sizeof *p == 4 && STREAM) {
    stream(to, v.a);
    stream(to + LANES, v.b);
  } else if constexpr (STREAM) {
    typename O::Storage both[2 * LANES];
    O::write(both, v.a);
    O::write(both + LANES, v.b);
    stream(to, load((const float*)both));
  } else {
    O::write(p, v.a);
    O::write(p + LANES, v.b);
  }
}

// What turns a difference of logits into an exponent of 2, and the difference below which that
// exponential is 0: there the exponent is -127, whose bits are those of 0.
struct ExpScale {
  float factor, least;
  explicit ExpScale(double tau) : factor((float)(1.4426950408889634 / tau)) {
    least = std::isfinite(factor) ? (float)(-127.0 * 0.6931471805599453 * tau) : 0.0f;
  }
  // u - row_max, held where its exponential is 0: there 0 * d is 0, and 0 * inf would be NaN.
  inline Floats difference(Floats u, float row_max) const { return at_least(u - row_max, least); }
};

// The same where each lane has a temperature of its own.
struct LaneScale {
  Floats factor, least;
  inline Floats difference(Floats u, Floats shift) const { return at_least(u - shift, least); }
};

// exp(d / tau) for `least` <= d / tau < 88. Relative error below 3.3e-7 + 6e-8 |d / tau| (the second part
// is that of rounding d / tau to a float) down to the smallest normal number, then 0.
// 2^t = 2^n 2^f, n the nearest integer; a polynomial of degree 5 for f in [-1/2, 1/2], fitted to
// relative error 9.2e-8 with 2^0 exact. NaN stays NaN.
template <class Scale>
static inline Floats exp_of(Floats d, const Scale& scale) {
  // 1.5 2^23, so that adding it rounds to an integer; and 127, so that the low bits of the sum are
  // the exponent of 2^n as a float has it.
  const float magic = 12582912.0f + 127.0f;
  Floats shifted = d * scale.factor + magic;
  Floats f = d * scale.factor - (shifted - magic);
  Floats p = all(0.001326472731307149f);
  p = p * f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.0f;
  return p * (Floats)((Words)shifted << 23);
}

// Odd, and accurate near 0, where the quotient of exponentials cancels.
static inline Floats tanh_of(Floats y) {
  const ExpScale scale(1.0);
  Floats a = (Floats)((Words)y & 0x7fffffffu);
  Floats e = exp_of(at_least(a * -2.0f, scale.least), scale);
  Floats quotient = (1.0f - e) / (1.0f + e);
  Floats s = a * a;
  // The minimax polynomial of Cephes' tanhf.
  Floats series = a + a * s * (-0.333332819f + s * (0.133314422f + s * (-0.0537397155f +
                                                  s * (0.0206390888f - s * 0.00570498873f))));
  Floats t = a < 0.625f ? series : quotient;
  return (Floats)((Words)t | ((Words)y & 0x80000000u));
}

// 1 - tanh^2 as 4 e / (1 + e)^2: good to an eps of itself, where the difference is to an eps of 1.
static inline Floats tanh_slope_of(Floats y) {
  const ExpScale scale(1.0);
  Floats a = (Floats)((Words)y & 0x7fffffffu);
  Floats e = exp_of(at_least(a * -2.0f, scale.least), scale);
  return 4.0f * e / ((1.0f + e) * (1.0f + e));
}

// In one order whatever the width of the loop around it.
static inline double sum(Floats v) {
  double total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}
static inline double sum(const Doubles& v) {
  double total = 0;
  for (int i = 0; i < LANES / 2; i++) total += v.a[i];
  for (int i = 0; i < LANES / 2; i++) total += v.b[i];
  return total;
}
static inline float max_of(Floats v) {
  float top = v[0];
  for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
  return top;
}
// A tree, so that its depth and not its length delays the next sum.
static inline float tree_sum(Floats v) {
#if defined(__clang__)  // which has no shuffle by a variable, and makes one of the loop
  for (int half = LANES / 2; half; half /= 2) {
    Floats other;
    for (int i = 0; i < LANES; i++) other[i] = v[i ^ half];
    v += other;
  }
#else
  Ints lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  for (int half = LANES / 2; half; half /= 2) v += __builtin_shuffle(v, lane ^ half);
#endif
  return v[0];
}

// The first `count` numbers of T's storage; lanes beyond them are 0.
template <class T>
static inline Floats read_some(const typename T::Storage* p, int64_t count) {
  typename T::Storage some[LANES] = {};
  std::memcpy(some, p, count * sizeof *p);
  return T::read(some);
}

}  // namespace FASTPPO_ISA
