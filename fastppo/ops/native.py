"""How the C++ kernels over rows of logits are called: the twin of `launch`, name by name."""

from __future__ import annotations

from ctypes import byref
from typing import Final

import torch
from torch import Tensor

from fastppo.ops.arguments import LossArguments, RowArguments
from fastppo.ops.native_library import (
    LIBRARY,
    GradientStruct,
    LossStruct,
    RowsStruct,
    ScoresStruct,
    StatisticsStruct,
)
from fastppo.ops.outputs import PolicyOutputs, Statistics, rows_of

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KL_KINDS: Final = {"k1": 0, "abs": 1, "k2": 2, "k3": 3}
# A gradient that the last cache cannot hold is written past it.
_STREAM_BYTES: Final = 32 << 20


def floats(x: Tensor) -> Tensor:
    """As the kernels read it: float32, side by side. The caller keeps it alive."""
    return x.detach().to(torch.float32).contiguous()


class Call:
    """Pointers of one call into the library, and the tensors behind them, kept alive as long."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def pointer(self, x: Tensor | None) -> int | None:
        """Of a tensor as it is."""
        if x is None:
            return None
        self.kept.append(x)
        return x.data_ptr()

    def floats(self, x: Tensor | None) -> int | None:
        """Of a vector as float32."""
        return None if x is None else self.pointer(floats(x))

    def rows(
        self, x_NV: Tensor, rows: RowArguments, at: slice, live_N: Tensor | None = None
    ) -> RowsStruct:
        tau = rows.temperature_tensor
        by_row = tau is not None and tau.ndim == 1
        return RowsStruct(
            x=self.pointer(x_NV),
            x_stride=x_NV.stride(0),
            n=x_NV.shape[0],
            vocab=x_NV.shape[1],
            first_row=at.start,
            token=self.pointer(rows.token_N.long().contiguous()),
            live=self.floats(live_N),
            temperature=self.floats(tau) if by_row else None,
            ignore_index=rows.ignore_index,
            dtype=DTYPES[x_NV.dtype],
            tau=rows.temperature if tau is None or by_row else tau.item(),
            softcap=rows.softcap or 0.0,
        )

    def gradient(self, out_NV: Tensor | None, x_NV: Tensor) -> GradientStruct:
        if out_NV is None:
            return GradientStruct(dtype=DTYPES[x_NV.dtype])
        # One of another dtype is a chunk's, and a GEMM reads it next.
        apart = out_NV.data_ptr() != x_NV.data_ptr() and out_NV.dtype == x_NV.dtype
        return GradientStruct(
            out=self.pointer(out_NV),
            stride=out_NV.stride(0),
            dtype=DTYPES[out_NV.dtype],
            stream=apart and out_NV.numel() * out_NV.element_size() >= _STREAM_BYTES,
        )


def scalar(tensor: Tensor | None, value: float) -> float:
    """A coefficient; on the CPU nobody waits for a tensor's."""
    return value if tensor is None else tensor.item()


def statistics_struct(into: Statistics) -> StatisticsStruct:
    """Pointers to a call's statistics."""
    return StatisticsStruct(*(x.data_ptr() for x in vars(into).values()))


def token_logprobs(
    x_NV: Tensor,
    rows: RowArguments,
    at: slice,
    into: Statistics,
    live_N: Tensor | None = None,
) -> None:
    """Statistics of rows `at`, whose logits `x_NV` are."""
    call = Call()
    given = call.rows(rows_of(x_NV), rows, at, live_N)
    LIBRARY.fastppo_token_logprobs(byref(given), byref(statistics_struct(into)))


def token_logprobs_backward(
    x_NV: Tensor,
    out_NV: Tensor,
    rows: RowArguments,
    at: slice,
    stats: Statistics,
    g_N: Tensor | None,
    h_N: Tensor | None,
    live_N: Tensor | None = None,
) -> None:
    """The gradient of rows `at` into `out_NV`, which may be `x_NV`."""
    x_NV, call = rows_of(x_NV), Call()
    LIBRARY.fastppo_token_logprobs_backward(
        byref(call.rows(x_NV, rows, at, live_N)),
        byref(call.gradient(out_NV, x_NV)),
        byref(statistics_struct(stats)),
        call.floats(g_N),
        call.floats(h_N),
    )


def policy_loss(
    x_NV: Tensor, out_NV: Tensor | None, arguments: LossArguments, at: slice, into: PolicyOutputs
) -> None:
    """Statistics and terms of rows `at`; their gradient into `out_NV`, which may be `x_NV`."""
    x_NV, loss, call = rows_of(x_NV), arguments, Call()
    struct = LossStruct(
        behaviour=call.floats(loss.behaviour_logprob_N),
        advantage=call.floats(loss.advantage_N),
        weight=call.floats(loss.weight_N),
        ref=call.floats(loss.ref_logprob_N),
        importance=call.floats(loss.importance_weight_N),
        logprob=into.logprob_N.data_ptr(),
        entropy=into.entropy_N.data_ptr(),
        kl=into.kl_N.data_ptr(),
        term=into.term_MN.data_ptr(),
        term_stride=into.term_MN.stride(0),
        kl_coef=scalar(loss.kl_coef_tensor, loss.kl_coef),
        entropy_coef=scalar(loss.entropy_coef_tensor, loss.entropy_coef),
        grad_scale=scalar(loss.grad_scale_tensor, loss.grad_scale),
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        dual_clip=loss.dual_clip or 0.0,
        limit=loss.log_ratio_limit,
        kl_kind=KL_KINDS[loss.kl_kind],
    )
    rows, grad = call.rows(x_NV, loss.rows, at), call.gradient(out_NV, x_NV)
    LIBRARY.fastppo_policy_loss(byref(rows), byref(grad), byref(struct))


def score_tokens(
    x_NV: Tensor,
    ref_NV: Tensor,
    rows: RowArguments,
    at: slice,
    into: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Log-probs of both, entropy and exact KL of rows `at`."""
    if x_NV.dtype != ref_NV.dtype:
        x_NV, ref_NV = x_NV.float(), ref_NV.float()
    x_NV, ref_NV, call = rows_of(x_NV), rows_of(ref_NV), Call()
    scores = ScoresStruct(*(x.data_ptr() for x in into))
    LIBRARY.fastppo_score_tokens(
        byref(call.rows(x_NV, rows, at)),
        call.pointer(ref_NV),
        ref_NV.stride(0),
        byref(scores),
    )


def sum_rows(x_MN: Tensor, *, maximum: int = -1) -> tuple[Tensor, Tensor]:
    """The sum of the last row, and those of the others; of row `maximum` the largest."""
    out = torch.empty(x_MN.shape[0], dtype=torch.float32)
    LIBRARY.fastppo_sum_rows(
        x_MN.data_ptr(), x_MN.stride(0), x_MN.shape[0], x_MN.shape[1], maximum, out.data_ptr()
    )
    # Tensors of their own: a registered op's results share no memory.
    return out[-1].clone(), out[:-1].clone()


def scale_unless_one(x: Tensor, factor: Tensor, divisor: float | Tensor) -> None:
    """x *= factor / divisor, in place."""
    ratio = (factor / divisor).item()
    if ratio != 1.0:
        x.mul_(ratio)
