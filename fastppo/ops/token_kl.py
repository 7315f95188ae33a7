"""KL divergence to the reference, estimated from the sampled token alone."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops import checks
from fastppo.ops.backend import choose, token_kernels
from fastppo.ops.config import check_kl_kind


def kl_and_slope(
    logprob_N: Tensor, ref_logprob_N: Tensor, kind: str, limit: float
) -> tuple[Tensor, Tensor]:
    """k and dk/dlogprob; both 0 where the sampled token is masked vocabulary (logprob -inf)."""
    masked = logprob_N == float("-inf")
    diff = torch.where(masked, 0, logprob_N - ref_logprob_N)
    if kind == "k1":
        kl, slope = diff, torch.ones_like(diff)
    elif kind == "abs":
        kl, slope = diff.abs(), diff.sign()
    elif kind == "k2":
        kl, slope = diff.square() / 2, diff
    else:
        e = (-diff).clamp(-limit, limit)
        kl = torch.expm1(e) - e
        slope = torch.where(diff.abs() <= limit, -torch.expm1(e), 0)
    return kl, slope.masked_fill(masked, 0)


def token_kl(
    logprob_N: Tensor,
    ref_logprob_N: Tensor,
    *,
    kind: str = "k1",
    log_ratio_limit: float = 20.0,
    backend: str | None = None,
) -> Tensor:
    r"""KL from the policy to the reference at each sampled token, in nats.

        d = logprob - ref_logprob
        k1 = d,   abs = |d|,   k2 = d^2 / 2,   k3 = exp(-d) - 1 + d   with d clamped to +-limit

    k1 is unbiased and may be negative on a token; k3 is never negative, and unbiased where the
    clamp is not met.

    Args:
        logprob_N: float (N,), log-prob of the sampled token; differentiable. -inf (masked
            vocabulary) gives 0.
        ref_logprob_N: float (N,), its log-prob under the reference; no gradient.
        kind: "k1", "abs", "k2" or "k3".
        log_ratio_limit: where k3 clamps d; > 0.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        kl_N, float32 (float64 where an input is float64).

    Raises:
        ValueError: another kind, shapes that disagree.
        TypeError: inputs that hold no floats.

    Source: Schulman 2020, Approximating KL Divergence.
    """
    op = "token_kl"
    check_kl_kind(op, kind)
    checks.floating(op, "logprob_N", logprob_N, ndim=1)
    checks.row_vector(op, "ref_logprob_N", ref_logprob_N, logprob_N, n=logprob_N.numel())
    if not log_ratio_limit > 0:
        raise ValueError(f"{op}: log_ratio_limit must be > 0, came {log_ratio_limit}")
    chosen = choose(op, backend, logprob_N, ref_logprob_N)
    ref_N = ref_logprob_N.detach()
    kl_N, _ = torch.ops.fastppo.token_kl(logprob_N, ref_N, kind, log_ratio_limit, chosen)
    return cast(Tensor, kl_N)


@torch.library.custom_op(
    "fastppo::token_kl",
    mutates_args=(),
    schema="(Tensor logprob_N, Tensor ref_logprob_N, str kind, float log_ratio_limit, "
    "str backend) -> (Tensor, Tensor)",
)
def _forward(
    logprob_N: Tensor, ref_logprob_N: Tensor, kind: str, limit: float, backend: str
) -> tuple[Tensor, Tensor]:
    """k and dk/dlogprob."""
    if backend != "torch":
        found: tuple[Tensor, Tensor] = token_kernels(backend).token_kl(
            logprob_N, ref_logprob_N, kind, limit
        )
        return found
    dtype = checks.stat_dtype(logprob_N, ref_logprob_N)
    kl_N, slope_N = kl_and_slope(logprob_N.to(dtype), ref_logprob_N.to(dtype), kind, limit)
    return kl_N.clone(), slope_N.clone()  # a registered op hands out neither inputs nor twins


@_forward.register_fake
def _(logprob_N: Tensor, ref_logprob_N: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype, n = checks.stat_dtype(logprob_N, ref_logprob_N), logprob_N.shape[0]
    return logprob_N.new_empty(n, dtype=dtype), logprob_N.new_empty(n, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


@once_differentiable
def _autograd(ctx: Any, grad_N: Tensor, _: Any) -> tuple[Any, ...]:
    (slope_N,) = ctx.saved_tensors
    # where before the product: the slope of masked vocabulary is 0, whatever comes from above.
    grad_N = torch.where(slope_N == 0, 0, grad_N * slope_N)
    return grad_N.to(ctx.dtype), None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
