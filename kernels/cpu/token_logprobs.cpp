// Log-prob of the sampled token and entropy of rows of logits; and, later, their gradient.
#define FASTPPO_FILE "token_logprobs.cpp"
#include "every_isa.h"

#include "row.h"

namespace FASTPPO_ISA {

void token_logprobs_row(const FastppoRows& rows, const FastppoStatistics& into, int64_t own) {
  const RowPlace at = place(rows, own);
  if (!at.live) {
    into.logprob[at.row] = into.entropy[at.row] = 0;
    into.row_max[at.row] = into.sum_exp[at.row] = 0;
    return;
  }
  with_kinds(rows.dtype, rows.dtype, rows.softcap != 0, [&](auto t, auto, auto softcap) {
    using T = decltype(t);
    const auto* x = (const typename T::Storage*)rows.x + own * rows.x_stride;
    const float u = sampled<T>(x, rows, at.token);
    const Statistics row = statistics<T, decltype(softcap)::value, false>(
        x, rows.vocab, rows.softcap, at.tau, SavedExponentials{});
    into.logprob[at.row] = row.logprob(u, at.tau);
    into.entropy[at.row] = row.entropy(at.tau);
    into.row_max[at.row] = row.row_max;
    into.sum_exp[at.row] = (float)row.sum_exp;
  });
}

// dL/dlogits for g = dL/dlogprob and h = dL/dentropy; null is 0.
void token_logprobs_backward_row(
    const FastppoRows& rows, const FastppoGradient& grad, const FastppoStatistics& stats,
    const float* g_N, const float* h_N, int64_t own) {
  const RowPlace at = place(rows, own);
  with_kinds(rows.dtype, grad.dtype, rows.softcap != 0, [&](auto t, auto o, auto softcap) {
    using T = decltype(t);
    using O = decltype(o);
    const auto* x = (const typename T::Storage*)rows.x + own * rows.x_stride;
    auto* out = (typename O::Storage*)grad.out + own * grad.stride;
    if (!at.live) return fill_zero<O>(out, rows.vocab);
    const bool possible =
        !(stats.logprob[at.row] == -std::numeric_limits<float>::infinity());
    const double sum_exp = stats.sum_exp[at.row] == 0 ? 1.0 : stats.sum_exp[at.row];
    const float h = h_N ? h_N[at.row] : 0.0f;
    const Slopes slopes(
        g_N && possible ? g_N[at.row] : 0.0, h, stats.entropy[at.row], sum_exp, at.tau);
    const float u = sampled<T>(x, rows, at.token);
    gradient<T, O, decltype(softcap)::value, false>(
        {x, out, rows.vocab, at.token, u, rows.softcap, at.tau, stats.row_max[at.row], sum_exp, slopes,
         SavedExponentials{}},
        h != 0, grad.stream);
  });
}

}  // namespace FASTPPO_ISA

#ifdef FASTPPO_LAST_ISA
extern "C" void fastppo_token_logprobs(const FastppoRows* rows, const FastppoStatistics* into) {
  const auto row = FASTPPO_PICK(token_logprobs_row);
  const int64_t n = rows->n;
#pragma omp parallel for schedule(static) if (n * rows->vocab > FASTPPO_ALONE)
  for (int64_t own = 0; own < n; own++) row(*rows, *into, own);
}

extern "C" void fastppo_token_logprobs_backward(
    const FastppoRows* rows, const FastppoGradient* grad, const FastppoStatistics* stats,
    const float* g_N, const float* h_N) {
  const auto row = FASTPPO_PICK(token_logprobs_backward_row);
  const int64_t n = rows->n;
#pragma omp parallel for schedule(static) if (n * rows->vocab > FASTPPO_ALONE)
  for (int64_t own = 0; own < n; own++) row(*rows, *grad, *stats, g_N, h_N, own);
}
#endif
