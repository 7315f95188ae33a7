// One row of logits: its normaliser and entropy in one sweep, its gradient in the next.
//
//     z = u / tau with u = x, or softcap tanh(x / softcap);  p = softmax(z)
//     row_max = max u,  sum_exp = sum exp((u - row_max) / tau),
//     sum_shifted_exp = sum (u - row_max) exp((u - row_max) / tau)
//
// A row goes through in blocks that stay in the first cache: the largest logit of a block first, then
// exponentials of differences from the largest so far. The loss keeps those exponentials in a row of
// its own, which the second cache holds, so that the gradient costs a multiplication a logit and no
// second exponential. Sums within a block are floats, side by side; across blocks they are doubles.
#include "vector.h"

namespace FASTPPO_ISA {

constexpr int64_t BLOCK = 2048;

struct Statistics {
  float row_max = LOWEST;
  double sum_exp = 0, sum_shifted_exp = 0;

  // Everything so far in terms of a new largest logit.
  inline void move_max(float top, double tau) {
    double delta = (double)row_max - (double)top;
    double rescale = std::exp(delta / tau);
    sum_shifted_exp = (sum_shifted_exp + delta * sum_exp) * rescale;
    sum_exp *= rescale;
    row_max = top;
  }
  inline double safe_sum_exp() const { return sum_exp == 0 ? 1.0 : sum_exp; }
  inline float logprob(float u, double tau) const {
    if (sum_exp == 0) return -std::numeric_limits<float>::infinity();
    return (float)(((double)u - (double)row_max) / tau - std::log(sum_exp));
  }
  inline float entropy(double tau) const {
    return (float)(std::log(safe_sum_exp()) - sum_shifted_exp / safe_sum_exp() / tau);
  }
};

// A register of logits from the end of a row: what lies behind it is masked vocabulary.
template <class T>
static inline Floats read_tail(const typename T::Storage* p, int64_t count) {
  float lanes[LANES];
  typename T::Storage some[LANES] = {};
  std::memcpy(some, p, count * sizeof *p);
  store(lanes, T::read(some));
  for (int64_t i = count; i < LANES; i++) lanes[i] = -std::numeric_limits<float>::infinity();
  return load(lanes);
}

template <class T>
static inline void write_tail(typename T::Storage* p, Floats v, int64_t count) {
  typename T::Storage some[LANES];
  T::write(some, v);
  std::memcpy(p, some, count * sizeof *p);
}

// u; masked vocabulary stays -inf.
template <bool SOFTCAP>
static inline Floats softcapped(Floats x, float softcap) {
  if (!SOFTCAP) return x;
  Floats u = tanh_of(x / softcap) * softcap;
  return x == -std::numeric_limits<float>::infinity() ? x : u;
}

static inline float softcapped_one(float x, float softcap) {
  return softcap == 0 || std::isinf(x) ? x : softcap * std::tanh(x / softcap);
}

// What a row leaves behind for its gradient: exp((u - running_max) / tau) of every logit, and of every
// block its running_max, the largest logit of the row up to and with that block.
struct SavedExponentials {
  float* exponential;
  float* running_max;
};

// Registers of a row from `start` on, two at a time in the order of T::read_two as long as four are
// left, then one by one: every sweep over a block sees its logits in this order.
constexpr int64_t STEP = 4 * LANES;

// The lines of the logits that come next are asked for while there is arithmetic to do: the
// processor's own prefetching ends where a page does. Past the end of memory it does nothing.
constexpr int64_t AHEAD = 2 * BLOCK;

template <int64_t BYTES>
static inline void prefetch(const void* p) {
  for (int64_t i = 0; i < BYTES; i += 64) __builtin_prefetch((const char*)p + i);
}

template <class T, bool SOFTCAP, bool SAVE>
static inline Statistics statistics(
    const typename T::Storage* x, int64_t vocab, float softcap, double tau, SavedExponentials saved) {
  Statistics row;
  const ExpScale scale(tau);
  float capped[SOFTCAP ? BLOCK + STEP : 1];
  for (int64_t start = 0, block = 0; start < vocab; start += BLOCK, block++) {
    const int64_t count = std::min(BLOCK, vocab - start);
    const auto* from = x + start;
    auto one = [&](int64_t i) {
      return i + LANES <= count ? T::read(from + i) : read_tail<T>(from + i, count - i);
    };
    Floats top[4] = {all(LOWEST), all(LOWEST), all(LOWEST), all(LOWEST)};
    auto note_max = [&](Floats x, int64_t i, int k) {
      Floats u = softcapped<SOFTCAP>(x, softcap);
      if (SOFTCAP) store(capped + i, u);
      top[k] = larger(u, top[k]);
    };
    int64_t i = 0;
    for (; i + STEP <= count; i += STEP) {
      Pair p = T::read_two(from + i), q = T::read_two(from + i + 2 * LANES);
      note_max(p.a, i, 0);
      note_max(p.b, i + LANES, 1);
      note_max(q.a, i + 2 * LANES, 2);
      note_max(q.b, i + 3 * LANES, 3);
    }
    for (; i < count; i += LANES) note_max(one(i), i, 0);
    const float block_max = max_of(larger(larger(top[0], top[1]), larger(top[2], top[3])));
    if (block_max > row.row_max) row.move_max(block_max, tau);

    const float running_max = row.row_max;
    Floats sum_exp[4] = {}, sum_shifted_exp[4] = {};
    auto add = [&](Floats u, int64_t i, int k) {
      Floats d = scale.difference(u, running_max);
      Floats e = exp_of(d, scale);
      sum_exp[k] += e;
      sum_shifted_exp[k] += d * e;
      if (SAVE) store(saved.exponential + start + i, e);  // the row is longer by a register
    };
    auto two = [&](int64_t i) {
      return SOFTCAP ? Pair{load(capped + i), load(capped + i + LANES)} : T::read_two(from + i);
    };
    for (i = 0; i + STEP <= count; i += STEP) {
      prefetch<STEP * sizeof *x>(from + i + AHEAD);
      Pair p = two(i), q = two(i + 2 * LANES);
      add(p.a, i, 0);
      add(p.b, i + LANES, 1);
      add(q.a, i + 2 * LANES, 2);
      add(q.b, i + 3 * LANES, 3);
    }
    for (; i < count; i += LANES) add(SOFTCAP ? load(capped + i) : one(i), i, 0);
    if (SAVE) saved.running_max[block] = running_max;
    row.sum_exp += sum(sum_exp[0] + sum_exp[1] + sum_exp[2] + sum_exp[3]);
    row.sum_shifted_exp +=
        sum(sum_shifted_exp[0] + sum_shifted_exp[1] + sum_shifted_exp[2] + sum_shifted_exp[3]);
  }
  return row;
}

// dL/dz_v = g (1[v = token] - p_v) - h p_v (log p_v + H),  log p_v = (u_v - row_max) / tau - log sum_exp
// as 1[v = token] g - p_v (a + b (u_v - row_max)), all divided by tau.
struct Slopes {
  float g, a, b;
  Slopes(double g, double h, double entropy, double sum_exp, double tau)
      : g(clean(g / tau)),
        a(clean((g + h * (entropy - std::log(sum_exp))) / tau)),
        b(clean(h / (tau * tau))) {}
  // A NaN with nothing in its lower half: see BFloat16::two.
  static inline float clean(double x) {
    return x == x ? (float)x : std::numeric_limits<float>::quiet_NaN();
  }
};

// Where a gradient comes from and goes to; `out` may be `x`, and `u_sampled` was read before.
template <class T, class O>
struct Gradient {
  const typename T::Storage* x;
  typename O::Storage* out;
  int64_t vocab, token;
  float u_sampled, softcap;
  double tau;
  float row_max;
  double sum_exp;
  Slopes slopes;
  SavedExponentials saved;
};

// The gradient of one row. With SAVED the exponentials are there, else they are computed again.
template <class T, class O, bool SOFTCAP, bool ENTROPY, bool SAVED, bool STREAM>
static inline void write_gradient(const Gradient<T, O>& row) {
  const ExpScale scale(row.tau);
  const Slopes slopes = row.slopes;
  const float row_max = row.row_max;
  for (int64_t start = 0, block = 0; start < row.vocab; start += BLOCK, block++) {
    const int64_t count = std::min(BLOCK, row.vocab - start);
    const auto* from = row.x + start;
    auto* to = row.out + start;
    const double rescale =
        SAVED ? std::exp(((double)row.saved.running_max[block] - row_max) / row.tau) : 1.0;
    const float factor = (float)(rescale / row.sum_exp), slope_of_exp = -factor * slopes.a;
    auto value = [&](Floats x, int64_t i) {
      if (SAVED && !SOFTCAP && !ENTROPY) return load(row.saved.exponential + start + i) * slope_of_exp;
      Floats u = softcapped<SOFTCAP>(x, row.softcap);
      Floats d = scale.difference(u, row_max);
      Floats e = SAVED ? load(row.saved.exponential + start + i) : exp_of(d, scale);
      Floats dx = ENTROPY ? -(e * factor) * (slopes.a + slopes.b * d) : e * slope_of_exp;
      return SOFTCAP ? dx * tanh_slope_of(x / row.softcap) : dx;
    };
    auto two = [&](int64_t i) {
      Pair x = T::read_two(from + i);
      write_two<T, O, STREAM>(to + i, {value(x.a, i), value(x.b, i + LANES)});
    };
    int64_t i = 0;
    for (; i + STEP <= count; i += STEP) {
      two(i);
      two(i + 2 * LANES);
    }
    for (; i + LANES <= count; i += LANES) O::write(to + i, value(T::read(from + i), i));
    if (i < count) write_tail<O>(to + i, value(read_tail<T>(from + i, count - i), i), count - i);
  }
  if (row.token >= 0 && row.token < row.vocab) {
    const double d = std::max((double)row.u_sampled - row_max, (double)scale.least);
    const double p = d == scale.least ? 0.0 : std::exp(d / row.tau) / row.sum_exp;
    double dx = slopes.g - p * (slopes.a + (ENTROPY ? slopes.b * d : 0.0));
    if (SOFTCAP) {
      double t = std::max(row.u_sampled, -row.softcap) / row.softcap;
      dx *= 1 - t * t;
    }
    write_tail<O>(row.out + row.token, all((float)dx), 1);
  }
  if (STREAM) streams_end();
}

// With what is known only now as template arguments.
template <class T, class O, bool SOFTCAP, bool SAVED>
static inline void gradient(const Gradient<T, O>& row, bool entropy, bool streams) {
  streams = streams && (uintptr_t)row.out % 64 == 0;  // rows that begin a line: most vocabularies'
  if (entropy) {
    streams ? write_gradient<T, O, SOFTCAP, true, SAVED, true>(row)
            : write_gradient<T, O, SOFTCAP, true, SAVED, false>(row);
  } else {
    streams ? write_gradient<T, O, SOFTCAP, false, SAVED, true>(row)
            : write_gradient<T, O, SOFTCAP, false, SAVED, false>(row);
  }
}

template <class O>
static inline void fill_zero(typename O::Storage* out, int64_t vocab) {
  std::memset(out, 0, vocab * sizeof *out);
}

// A thread's row of exponentials, kept from call to call.
struct Workspace {
  float* memory = nullptr;
  int64_t size = 0;
  ~Workspace() { std::free(memory); }
  SavedExponentials of(int64_t vocab) {
    const int64_t row = (vocab + LANES) / 16 * 16 + 16, blocks = vocab / BLOCK + 2;
    if (size < row + blocks) {
      std::free(memory);
      size = (row + blocks + 15) / 16 * 16;
      memory = (float*)std::aligned_alloc(64, size * sizeof(float));
      if (memory == nullptr) {  // C has no way to tell Python
        std::fprintf(stderr, "fastppo: no memory for a row of %lld floats\n", (long long)size);
        std::abort();
      }
    }
    return {memory, memory + row};
  }
};

static inline SavedExponentials workspace(int64_t vocab) {
  static thread_local Workspace own;
  return own.of(vocab);
}

struct RowPlace {
  int64_t row, token;
  double tau;
  bool live;
};

// What the host said of row `own` of a chunk.
static inline RowPlace place(const FastppoRows& rows, int64_t own) {
  const int64_t row = rows.first_row + own;
  const int64_t token = rows.token[row];
  const bool live = token != rows.ignore_index && !(rows.live && rows.live[row] == 0);
  return {row, token, rows.temperature ? rows.temperature[row] : rows.tau, live};
}

// u of the sampled token; NaN for one that is no word, so that it shows.
template <class T>
static inline float sampled(const typename T::Storage* x, const FastppoRows& rows, int64_t token) {
  if (token < 0 || token >= rows.vocab) return std::numeric_limits<float>::quiet_NaN();
  return softcapped_one(read_tail<T>(x + token, 1)[0], rows.softcap);
}

// Calls `function` with the kinds of logit and output, and whether there is a softcap, as types.
template <class Function>
static inline void with_kinds(int dtype, int out_dtype, bool softcap, Function function) {
  auto capped = [&](auto t, auto o) {
    softcap ? function(t, o, std::true_type{}) : function(t, o, std::false_type{});
  };
  if (dtype == FASTPPO_BF16) return capped(BFloat16{}, BFloat16{});
  if (dtype == FASTPPO_F16) return capped(Float16{}, Float16{});
  if (out_dtype == FASTPPO_BF16) return capped(Float32{}, BFloat16{});
  if (out_dtype == FASTPPO_F16) return capped(Float32{}, Float16{});
  return capped(Float32{}, Float32{});
}

}  // namespace FASTPPO_ISA
