"""KL divergence to the reference, estimated from the sampled tokens."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastppo.ops.arguments import (
    chosen_backend,
    flat,
    is_traced,
    once_differentiable,
    stat_dtype,
    vector_argument,
)
from fastppo.ops.backends import BACKENDS
from fastppo.ops.checks import NUMBERS, check_floating, wrong_kind
from fastppo.ops.config import KL_KINDS, check_kl_kind
from fastppo.ops.registered import register
from fastppo.ops.shapes import in_shape, live_tokens


def token_kl(
    logprob_N: Tensor,
    ref_logprob_N: Tensor,
    *,
    mask: Tensor | None = None,
    kind: str = "k1",
    log_ratio_limit: float = 20.0,
    backend: str | None = None,
) -> Tensor:
    r"""KL from the policy to the reference at each sampled token, in nats.

        d = logprob - ref_logprob
        k1 = d,   abs = |d|,   k2 = d^2 / 2,   k3 = exp(-d) - 1 + d   with d clamped to +-limit

    k1 is unbiased and may be negative for a token; k3 is never negative, and unbiased unless d is
    clamped.

    Args:
        logprob_N: float (...), log-prob of the sampled token; differentiable. -inf (masked
            vocabulary) gives 0.
        ref_logprob_N: float (...), its log-prob under the reference; no gradient.
        mask: bool, or integers 0 and 1, (...): tokens behind it are not read, and give 0.
        kind: "k1", "abs", "k2" or "k3".
        log_ratio_limit: k3 clamps d to +-this; > 0.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        kl_N, float32 (float64 where an input is float64).

    Raises:
        ValueError: an unknown kind, shapes that disagree.
        TypeError: inputs that are not floating point.

    Source: Schulman 2020, Approximating KL Divergence.
    """
    op = "token_kl"
    if kind not in KL_KINDS:
        check_kl_kind(op, kind)
    if not isinstance(logprob_N, Tensor) or not logprob_N.is_floating_point():
        check_floating(op, "logprob_N", logprob_N)
    lead = logprob_N.shape
    ref_logprob_N = vector_argument(op, "ref_logprob_N", ref_logprob_N, logprob_N, lead)
    if not isinstance(log_ratio_limit, NUMBERS):
        wrong_kind(op, "log_ratio_limit", log_ratio_limit, "a number")
    if not log_ratio_limit > 0:
        raise ValueError(f"{op}: log_ratio_limit must be > 0, came {log_ratio_limit}")
    chosen = chosen_backend(op, backend, logprob_N, ref_logprob_N)
    if mask is not None:
        live = live_tokens(op, mask, lead, logprob_N, check=False)
        logprob_N = torch.where(live, logprob_N, float("-inf"))
    logprob_N = flat(logprob_N)
    given = Arguments(logprob_N, ref_logprob_N, kind, log_ratio_limit, chosen)
    if is_traced(logprob_N):
        kl_N = _registered(given).kl_N
    elif logprob_N.requires_grad and torch.is_grad_enabled():
        kl_N = cast(Tensor, _TokenKl.apply(logprob_N, given))  # type: ignore[no-untyped-call]
    else:
        kl_N = _forward(given).kl_N
    return kl_N if len(lead) == 1 else in_shape(kl_N, lead)


class Arguments(NamedTuple):
    """Arguments of the registered operator."""

    logprob_N: Tensor
    ref_logprob_N: Tensor
    kind: str
    log_ratio_limit: float
    backend: str


class Outputs(NamedTuple):
    """Outputs of the registered operator."""

    kl_N: Tensor
    slope_N: Tensor  # dk/dlogprob


def _forward(a: Arguments) -> Outputs:
    kernels = BACKENDS[a.backend]
    return Outputs(*kernels.token_kl(a.logprob_N, a.ref_logprob_N, a.kind, a.log_ratio_limit))


def _fake(a: Arguments) -> Outputs:
    dtype, n = stat_dtype(a.logprob_N, a.ref_logprob_N), a.logprob_N.shape[0]
    return Outputs(a.logprob_N.new_empty(n, dtype=dtype), a.logprob_N.new_empty(n, dtype=dtype))


def _save(ctx: Any, a: Arguments, outputs: Outputs) -> None:
    ctx.dtype, ctx.backend = a.logprob_N.dtype, a.backend
    ctx.save_for_backward(outputs.slope_N)


def _gradients(ctx: Any, grad_N: Tensor | None) -> tuple[Tensor | None]:
    if grad_N is None:
        return (None,)
    (slope_N,) = ctx.saved_tensors
    backend = "torch" if is_traced(grad_N) else ctx.backend
    return (BACKENDS[backend].token_kl_backward(slope_N, grad_N).to(ctx.dtype),)


class _TokenKl(torch.autograd.Function):
    """Used by eager calls, to avoid torch.library's cost."""

    @staticmethod
    def forward(ctx: Any, logprob_N: Tensor, a: Arguments) -> Tensor:
        outputs = _forward(a)
        _save(ctx, a, outputs)
        return outputs.kl_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, None]:
        return (*_gradients(ctx, grad_N), None)


_registered = register(
    "token_kl", Arguments, Outputs, _forward, _fake, results=1, save=_save, backward=_gradients
)
