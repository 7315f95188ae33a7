"""A policy loss within the operators: its gradient in log-prob and entropy, and its metrics.

Every per-token loss reaches the logits through two scalars, g = dL/dlogprob and h = dL/dentropy.
The losses themselves are those of `fastppo.ops.losses`, differentiated by autograd over vectors
(N,). The kernels over logits have PPO's clip fused (`kernels/policy_loss.py` and
`kernels/cpu/surrogate.h`), held to it by tests/ops/test_losses.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from fastppo.ops.arguments import LossArguments, RowArguments, live_rows
from fastppo.ops.checks import show
from fastppo.ops.losses import POLICY_LOSSES, TokenLoss
from fastppo.ops.losses.kl import kl, kl_and_slope
from fastppo.ops.losses.tokens import importance_ratio, tokens
from fastppo.ops.metrics import Entry, Metrics

if TYPE_CHECKING:
    from fastppo.ops.backends import Statistics, TokenKernels
    from fastppo.ops.rows import Chunks

# A caller's own loss: log-probs and entropies of some tokens, and which those are.
OwnLoss = Callable[[Tensor, Tensor, slice], Tensor]
# What each loss takes of LossArguments.
_SETTINGS: Final = {
    name: tuple(set(inspect.signature(loss).parameters) & set(LossArguments._fields))
    for name, loss in POLICY_LOSSES.items()
}


class PolicyMetrics(Metrics):
    """Sums over the live tokens of a batch, as 0-d tensors; `merge` adds those of two batches.

    `count` is the number of live tokens; divide the `*_sum` fields by it to get means. `surrogate`,
    `kl_loss` and `entropy_loss` include the loss weights: they add up to the loss.
    """

    _maxima = ("ratio_max",)

    count = Entry()
    ratio_sum = Entry()  # of the ratio that the loss used
    ratio_max = Entry()  # a maximum, not a sum; 0 without live tokens
    log_ratio_abs_sum = Entry()  # |logprob - behaviour_logprob|, clamped: 0 on the behaviour policy
    clipped_sum = Entry()  # tokens on which a clip of the loss (or the dual clip) acted
    clamped_sum = Entry()  # tokens whose log ratio met log_ratio_limit
    approx_kl_sum = Entry()  # k3 of behaviour to policy: ratio - 1 - log ratio, >= 0
    policy_kl_sum = Entry()  # behaviour_logprob - logprob, clamped; TRL's policykl
    entropy_sum = Entry()
    kl_sum = Entry()  # policy to reference, of the loss's kind; 0 without a reference
    surrogate = Entry()  # sum of weight * importance weight * clipped loss
    kl_loss = Entry()  # sum of weight * kl_coef * kl
    entropy_loss = Entry()  # minus the sum of weight * entropy_coef * entropy
    clipped_low_sum = Entry()  # of clipped_sum, those where the lower clip acted
    clipped_high_sum = Entry()  # those where the upper clip acted
    dual_clipped_sum = Entry()  # those where the bound on large ratios acted


TERMS: Final = len(PolicyMetrics._fields) + 1  # the metrics, and the loss last
RATIO_MAX: Final = PolicyMetrics._fields.index("ratio_max")  # the one that is no sum


def _with_vectors(loss: LossArguments, change: Callable[[Tensor], Tensor]) -> LossArguments:
    """The loss arguments with each of their vectors (N,) changed."""

    def changed(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else change(vector)

    return loss._replace(
        behaviour_logprob_N=changed(loss.behaviour_logprob_N),
        advantage_N=change(loss.advantage_N),
        weight_N=change(loss.weight_N),
        ref_logprob_N=changed(loss.ref_logprob_N),
        importance_weight_N=changed(loss.importance_weight_N),
        kl_weight_N=changed(loss.kl_weight_N),
        entropy_weight_N=changed(loss.entropy_weight_N),
    )


def filled(loss: LossArguments, live_N: Tensor, dtype: torch.dtype) -> LossArguments:
    """The loss arguments in `dtype`, with finite values at tokens that are not live."""

    def coefficient(value: float | Tensor) -> float | Tensor:
        return value.to(dtype) if isinstance(value, Tensor) else value

    return _with_vectors(loss, lambda x_N: torch.where(live_N, x_N, 0).to(dtype))._replace(
        kl_coef=coefficient(loss.kl_coef), entropy_coef=coefficient(loss.entropy_coef)
    )


def loss_at(loss: LossArguments, at: slice) -> LossArguments:
    """The arguments of some tokens; only where a token's loss is its own."""
    assert not loss.by_sequence
    return _with_vectors(loss, lambda x_N: x_N[at])


@contextmanager
def _recorded() -> Iterator[None]:
    """Autograd is on: torch calls a registered operator with it off, and with its keys excluded."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set() - keys
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _token_loss(loss: LossArguments, live_N: Tensor, logprob_N: Tensor) -> TokenLoss:
    function = POLICY_LOSSES[loss.name]
    settings = {name: getattr(loss, name) for name in _SETTINGS[loss.name]}
    given = (logprob_N, loss.behaviour_logprob_N, loss.advantage_N, live_N)
    return function(*given, **settings)


def _surrogate_weight(loss: LossArguments) -> Tensor:
    importance_N = loss.importance_weight_N
    return loss.weight_N if importance_N is None else loss.weight_N * importance_N


def _corrected_kl(loss: LossArguments, live_N: Tensor, logprob_N: Tensor) -> Tensor:
    """The KL of each token with its correction or limit, differentiable in the log-probs."""
    assert loss.ref_logprob_N is not None
    level = {"gspo": "sequence", "gspo_token": "sequence_token"}.get(loss.name, "token")
    corrected = loss.kl_bias_correction
    return kl(
        logprob_N,
        loss.ref_logprob_N,
        live_N,
        kind=loss.kl_kind,
        bias_correction=corrected,
        old_logprob=loss.behaviour_logprob_N if corrected else None,
        ratio_level=level if corrected else "token",
        offsets=loss.offsets,
        log_ratio_limit=loss.log_ratio_limit,
        limit=loss.kl_limit,
    )


def _kl_weight(loss: LossArguments) -> Tensor:
    return (loss.weight_N if loss.kl_weight_N is None else loss.kl_weight_N) * loss.kl_coef


def _entropy_weight(loss: LossArguments) -> Tensor:
    weight_N = loss.weight_N if loss.entropy_weight_N is None else loss.entropy_weight_N
    return weight_N * loss.entropy_coef


def _with_corrected_kl(
    loss: LossArguments, live_N: Tensor, logprob_N: Tensor, total: Tensor
) -> Tensor:
    """The loss to differentiate, with the KL where its slope is not written by hand."""
    if not (loss.has_kl and loss.corrects_kl):
        return total
    return total + (_kl_weight(loss) * _corrected_kl(loss, live_N, logprob_N)).sum()


def token_gradient(
    loss: LossArguments, live_N: Tensor, logprob_N: Tensor
) -> tuple[Tensor, Tensor | None]:
    """g and h of each token; h is None where the entropy has no weight."""
    with _recorded():
        leaf_N = logprob_N.detach().requires_grad_()
        total = (_surrogate_weight(loss) * _token_loss(loss, live_N, leaf_N).loss).sum()
        total = _with_corrected_kl(loss, live_N, leaf_N, total)
        (g,) = torch.autograd.grad(total, leaf_N)
    return _with_regularisers(loss, logprob_N, g, None)


def own_gradient(
    own: OwnLoss,
    loss: LossArguments,
    live_N: Tensor,
    logprob_N: Tensor,
    entropy_N: Tensor,
    at: slice,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The caller's loss of the tokens `at`, detached, and g and h, None if not needed."""
    with torch.set_grad_enabled(need_grad):
        leaf_N = logprob_N.detach().requires_grad_(need_grad)
        entropy_leaf_N = entropy_N.detach().requires_grad_(need_grad)
        loss_N = own(leaf_N, entropy_leaf_N, at)
        came = show(tuple(loss_N.shape)) if isinstance(loss_N, Tensor) else type(loss_N).__name__
        if not isinstance(loss_N, Tensor) or loss_N.shape != logprob_N.shape:
            raise ValueError(
                "linear_policy_loss: loss=callable must return one loss a token, not reduced, "
                f"{show(tuple(logprob_N.shape))}; came {came}"
            )
        loss_N = torch.where(live_N, loss_N.to(logprob_N.dtype), 0)
        if not need_grad:
            return loss_N, None, None
        if not loss_N.requires_grad:
            raise ValueError(
                "linear_policy_loss: loss=callable must return a function of the log-probs or "
                "entropies that it is given, came one without gradient"
            )
        total = (_surrogate_weight(loss) * loss_N).sum()
        total = _with_corrected_kl(loss, live_N, leaf_N, total)
        found = torch.autograd.grad(total, (leaf_N, entropy_leaf_N), allow_unused=True)
    # Where a token is not live, 0 times what the caller made of it may be NaN.
    own_g, own_h = (None if x is None else x.masked_fill(~live_N, 0) for x in found)
    own_g = torch.zeros_like(logprob_N) if own_g is None else own_g
    return loss_N.detach(), *_with_regularisers(loss, logprob_N, own_g, own_h)


def _with_regularisers(
    loss: LossArguments, logprob_N: Tensor, g: Tensor, h: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """g and h with those of the KL and of the entropy."""
    if loss.has_kl and not loss.corrects_kl:
        assert loss.ref_logprob_N is not None
        _, slope = kl_and_slope(logprob_N, loss.ref_logprob_N, loss.kl_kind, loss.log_ratio_limit)
        g = g + _kl_weight(loss) * slope
    if loss.has_entropy:
        # The row of a masked sample takes no part in the loss, so its entropy passes no gradient.
        bonus = (-_entropy_weight(loss)).masked_fill(logprob_N == float("-inf"), 0)
        h = bonus if h is None else h + bonus
    return g, h


def totals(
    loss: LossArguments,
    live_N: Tensor,
    logprob_N: Tensor,
    entropy_N: Tensor,
    own_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, KL of each token (0 without a reference) and the vector of metrics.

    `own_N` is the loss of each token where the caller has one of its own.
    """
    limit = loss.log_ratio_limit
    t = tokens(loss.name, logprob_N, loss.behaviour_logprob_N, loss.advantage_N, live_N)
    level = "sequence" if loss.by_sequence else "token"
    used = importance_ratio(t._replace(offsets=loss.offsets), limit, level)
    # A sampled token of masked vocabulary has ratio 0, whatever the clamp would make of it.
    log_ratio = torch.where(t.impossible, -limit, used.log_ratio).clamp(-limit, limit)
    low = high = dual = torch.zeros_like(live_N)
    loss_N = own_N
    if loss_N is None:
        loss_N, low, high, dual = _token_loss(loss, live_N, logprob_N)
    zero = logprob_N.new_zeros(())

    def total(x: Tensor) -> Tensor:
        return x.masked_fill(~live_N, 0).sum()

    surrogate = total(_surrogate_weight(loss) * loss_N)
    kl_loss = entropy_loss = kl_sum = zero
    kl_N = torch.zeros_like(logprob_N)
    if loss.ref_logprob_N is not None:
        if loss.corrects_kl:
            kl_N = _corrected_kl(loss, live_N, logprob_N)
        else:
            kl_N, _ = kl_and_slope(logprob_N, loss.ref_logprob_N, loss.kl_kind, limit)
        kl_N = kl_N.masked_fill(~live_N, 0)
        kl_sum = kl_N.sum()
        if loss.has_kl:
            kl_loss = total(_kl_weight(loss) * kl_N)
    if loss.has_entropy:
        masked = logprob_N == float("-inf")
        entropy_loss = -total((_entropy_weight(loss) * entropy_N).masked_fill(masked, 0))
    ratio = used.ratio.masked_fill(~live_N, 0)
    metrics = {
        "count": live_N.sum(),
        "ratio_sum": ratio.sum(),
        "ratio_max": ratio.amax() if ratio.numel() else zero,
        "log_ratio_abs_sum": total(log_ratio.abs()),
        "clipped_sum": (low | high | dual).sum(),
        "clamped_sum": used.clamped.sum(),
        "approx_kl_sum": total(torch.expm1(log_ratio) - log_ratio),
        "policy_kl_sum": -total(log_ratio),
        "entropy_sum": total(entropy_N),
        "kl_sum": kl_sum,
        "surrogate": surrogate,
        "kl_loss": kl_loss,
        "entropy_loss": entropy_loss,
        "clipped_low_sum": low.sum(),
        "clipped_high_sum": high.sum(),
        "dual_clipped_sum": dual.sum(),
    }
    vector = torch.stack([metrics[name].to(logprob_N.dtype) for name in PolicyMetrics._fields])
    return surrogate + kl_loss + entropy_loss, kl_N, vector


def sweep_by_token(
    kernels: TokenKernels,
    chunks: Chunks,
    rows: RowArguments,
    loss: LossArguments,
    stats: Statistics,
    need_grad: bool,
    own: OwnLoss | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`totals` of a loss by token, in one pass: of each chunk log-probs, loss, and gradient."""
    weight_N, scale = loss.weight_N, loss.grad_scale
    live_N = live_rows(rows, weight_N)
    whole = filled(loss, live_N, stats.logprob_N.dtype)
    g_N, h_N, own_N = (torch.zeros_like(stats.logprob_N) for _ in range(3))

    def kernel(at: slice, x_NV: Tensor, out_NV: Tensor | None) -> None:
        kernels.token_logprobs(x_NV, rows, at, stats, weight_N)
        g: Tensor | None
        here, live_n, logprob_n = loss_at(whole, at), live_N[at], stats.logprob_N[at]
        if own is not None:
            entropy_n = stats.entropy_N[at]
            own_N[at], g, h = own_gradient(
                own, here, live_n, logprob_n, entropy_n, at, out_NV is not None
            )
        elif out_NV is not None:
            g, h = token_gradient(here, live_n, logprob_n)
        if out_NV is not None:
            assert g is not None
            g_N[at] = scale * g
            if h is not None:
                h_N[at] = scale * h
            given = (g_N, None if h is None else h_N)
            kernels.token_logprobs_backward(x_NV, out_NV, rows, at, stats, *given, weight_N)

    chunks.visit(kernel, write=need_grad)
    given = (whole, live_N, stats.logprob_N, stats.entropy_N)
    return totals(*given, None if own is None else own_N)


def sweep_by_sequence(
    kernels: TokenKernels,
    chunks: Chunks,
    rows: RowArguments,
    loss: LossArguments,
    stats: Statistics,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`totals` of a loss by sequence: one pass for all log-probs, one for the gradient."""
    weight_N = loss.weight_N
    chunks.visit(
        lambda at, x_NV, _: kernels.token_logprobs(x_NV, rows, at, stats, weight_N), write=False
    )
    live_N = live_rows(rows, weight_N)
    whole = filled(loss, live_N, stats.logprob_N.dtype)
    if need_grad:
        g_N, h_N = token_gradient(whole, live_N, stats.logprob_N)
        g_N, h_N = loss.grad_scale * g_N, None if h_N is None else loss.grad_scale * h_N

        def backward(at: slice, x_NV: Tensor, out_NV: Tensor | None) -> None:
            assert out_NV is not None
            kernels.token_logprobs_backward(x_NV, out_NV, rows, at, stats, g_N, h_N, weight_N)

        chunks.visit(backward, write=True)
    return totals(whole, live_N, stats.logprob_N, stats.entropy_N)
