// PPO's loss of rows of logits and its gradient, in one sweep there and one back.
//
// Every per-token loss reaches the logits through two scalars, g = dL/dlogprob and h = dL/dentropy:
// another loss is another `surrogate`.
#include "surrogate.h"

#define FASTPPO_FILE "policy_loss.cpp"
#include "every_isa.h"

#include "row.h"

namespace FASTPPO_ISA {

template <class T, class O, bool SOFTCAP>
static inline void policy_loss_of(
    const FastppoRows& rows, const FastppoGradient& grad, const FastppoLoss& loss, int64_t own) {
  const auto* x = (const typename T::Storage*)rows.x + own * rows.x_stride;
  auto* out = (typename O::Storage*)grad.out + (grad.out ? own * grad.stride : 0);
  const RowPlace at = place(rows, own);
  float* term = loss.term + at.row;
  const int64_t stride = loss.term_stride;
  const float weight = loss.weight[at.row];
  if (!at.live || weight == 0) {
    loss.logprob[at.row] = loss.entropy[at.row] = loss.kl[at.row] = 0;
    for (int i = 0; i < FASTPPO_TERMS; i++) term[i * stride] = 0;
    if (grad.out) fill_zero<O>(out, rows.vocab);
    return;
  }
  const float u = sampled<T>(x, rows, at.token);
  SavedExponentials saved = {};
  if (grad.out) saved = workspace(rows.vocab);
  const Statistics row =
      grad.out ? statistics<T, SOFTCAP, true>(x, rows.vocab, rows.softcap, at.tau, saved)
               : statistics<T, SOFTCAP, false>(x, rows.vocab, rows.softcap, at.tau, saved);
  const float logprob = row.logprob(u, at.tau), entropy = row.entropy(at.tau);

  FastppoSurrogate found = surrogate(logprob, loss.behaviour[at.row], loss.advantage[at.row], loss);
  if (loss.importance) {
    found.loss *= loss.importance[at.row];
    found.slope *= loss.importance[at.row];
  }
  float g = weight * found.slope;
  FastppoSlope kl = {0, 0};
  float kl_loss = 0;
  if (loss.ref) {
    kl = kl_and_slope(logprob, loss.ref[at.row], loss.limit, loss.kl_kind);
    if (loss.kl_coef != 0) {
      g += weight * loss.kl_coef * kl.slope;
      kl_loss = weight * loss.kl_coef * kl.value;
    }
  }
  // The row of a masked sample takes no part in the loss, so its entropy passes no gradient.
  const bool possible = !(logprob == -std::numeric_limits<float>::infinity());
  const float h = possible && loss.entropy_coef != 0 ? -weight * loss.entropy_coef : 0.0f;
  const float surrogate_loss = weight * found.loss, entropy_loss = h * entropy;
  const float terms[FASTPPO_TERMS] = {
      1, found.ratio, found.ratio, std::fabs(found.log_ratio), found.clipped ? 1.0f : 0.0f,
      found.clamped ? 1.0f : 0.0f, expm1_minus_arg(found.log_ratio), -found.log_ratio, entropy,
      kl.value, surrogate_loss, kl_loss, entropy_loss, found.low ? 1.0f : 0.0f,
      found.high ? 1.0f : 0.0f, found.dual ? 1.0f : 0.0f,
      surrogate_loss + kl_loss + entropy_loss};
  loss.logprob[at.row] = logprob;
  loss.entropy[at.row] = entropy;
  loss.kl[at.row] = kl.value;
  for (int i = 0; i < FASTPPO_TERMS; i++) term[i * stride] = terms[i];
  if (!grad.out) return;

  const double scale = loss.grad_scale;
  const Slopes slopes(possible ? g * scale : 0.0, h * scale, entropy, row.safe_sum_exp(), at.tau);
  gradient<T, O, SOFTCAP, true>(
      {x, out, rows.vocab, at.token, u, rows.softcap, at.tau, row.row_max, row.safe_sum_exp(), slopes,
       saved},
      h != 0, grad.stream);
}

void policy_loss_row(
    const FastppoRows& rows, const FastppoGradient& grad, const FastppoLoss& loss, int64_t own) {
  with_kinds(rows.dtype, grad.dtype, rows.softcap != 0, [&](auto t, auto o, auto softcap) {
    policy_loss_of<decltype(t), decltype(o), decltype(softcap)::value>(rows, grad, loss, own);
  });
}

}  // namespace FASTPPO_ISA

#ifdef FASTPPO_LAST_ISA
extern "C" void fastppo_policy_loss(
    const FastppoRows* rows, const FastppoGradient* grad, const FastppoLoss* loss) {
  const auto row = FASTPPO_PICK(policy_loss_row);
  const int64_t n = rows->n;
#pragma omp parallel for schedule(static) if (n * rows->vocab > FASTPPO_ALONE)
  for (int64_t own = 0; own < n; own++) row(*rows, *grad, *loss, own);
}
#endif
