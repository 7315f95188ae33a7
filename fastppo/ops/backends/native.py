"""Calls of the C++ kernels, which get pointers and sizes in structs; see `Backend`."""

from __future__ import annotations

from ctypes import byref
from typing import Final

import torch
from torch import Tensor

from fastppo.ops.arguments import (
    LossArguments,
    RowArguments,
    rows_of,
)
from fastppo.ops.backends import AdvantagesArguments, GaeArguments, LossRows, Scores, Statistics
from fastppo.ops.native_library import (
    LIBRARY,
    AdvantagesStruct,
    GradientStruct,
    LossStruct,
    RowsStruct,
    ScoresStruct,
    StatisticsStruct,
)
from fastppo.ops.surrogate import RATIO_MAX

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KL_KINDS: Final = {"k1": 0, "abs": 1, "k2": 2, "k3": 3}
# A gradient larger than this does not fit into the last cache, and is written around it.
_STREAM_BYTES: Final = 32 << 20


def number(value: float | Tensor) -> float:
    """A coefficient as a float; reading it from a tensor on a CPU waits for no device."""
    return value.item() if isinstance(value, Tensor) else value


class Call:
    """Pointers for one call of the library; it keeps copies alive until the call is over.

    What is passed as it is, the caller keeps.
    """

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def copy(self, x: Tensor) -> int:
        """Pointer to a tensor that nobody else has."""
        self.kept.append(x)
        return x.data_ptr()

    def floats(self, x: Tensor | None) -> int | None:
        """Pointer to a vector in contiguous float32, which is a copy if it is not."""
        if x is None:
            return None
        if x.dtype is torch.float32 and x.is_contiguous():
            return x.data_ptr()
        return self.copy(x.detach().to(torch.float32).contiguous())

    def over(self, x: Tensor) -> tuple[int | None, Tensor]:
        """`floats` of a vector, and a result of its size: the copy itself, where one was made."""
        if x.dtype is torch.float32 and x.is_contiguous():
            return x.data_ptr(), _empty(x.numel())
        made = x.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return made.data_ptr(), made

    def integers(self, x: Tensor) -> int | None:
        """Pointer to a vector in contiguous int64, which is a copy if it is not."""
        if x.dtype is torch.int64 and x.is_contiguous():
            return x.data_ptr()
        return self.copy(x.long().contiguous())

    def rows(
        self, x_NV: Tensor, rows: RowArguments, at: slice, weight_N: Tensor | None = None
    ) -> RowsStruct:
        tau = rows.temperature
        by_row = isinstance(tau, Tensor) and tau.ndim == 1
        n, vocab = x_NV.shape
        return RowsStruct(
            x=x_NV.data_ptr(),
            x_stride=x_NV.stride(0),
            n=n,
            vocab=vocab,
            first_row=at.start,
            token=self.integers(rows.token_N),
            live=self.floats(weight_N),
            temperature=self.floats(tau) if isinstance(tau, Tensor) and by_row else None,
            ignore_index=rows.ignore_index,
            dtype=DTYPES[x_NV.dtype],
            tau=1.0 if by_row else number(tau),
            softcap=rows.softcap or 0.0,
        )

    def gradient(self, out_NV: Tensor | None, x_NV: Tensor) -> GradientStruct:
        if out_NV is None:
            return GradientStruct(dtype=DTYPES[x_NV.dtype])
        # A gradient of another dtype belongs to a chunk: a GEMM reads it next, so it stays cached.
        apart = out_NV.data_ptr() != x_NV.data_ptr() and out_NV.dtype == x_NV.dtype
        return GradientStruct(
            out=out_NV.data_ptr(),
            stride=out_NV.stride(0),
            dtype=DTYPES[out_NV.dtype],
            stream=apart and out_NV.numel() * out_NV.element_size() >= _STREAM_BYTES,
        )


def _statistics(into: Statistics) -> StatisticsStruct:
    return StatisticsStruct(
        logprob=into.logprob_N.data_ptr(),
        entropy=into.entropy_N.data_ptr(),
        row_max=into.row_max_N.data_ptr(),
        sum_exp=into.sum_exp_N.data_ptr(),
    )


def token_logprobs(
    x_NV: Tensor,
    rows: RowArguments,
    at: slice,
    into: Statistics,
    weight_N: Tensor | None = None,
) -> None:
    """Write the statistics of the rows `at` into `into`; rows of weight 0 are not read."""
    x_NV, call = rows_of(x_NV), Call()
    given = call.rows(x_NV, rows, at, weight_N)
    LIBRARY.fastppo_token_logprobs(byref(given), byref(_statistics(into)))


def token_logprobs_backward(
    x_NV: Tensor,
    out_NV: Tensor,
    rows: RowArguments,
    at: slice,
    stats: Statistics,
    g_N: Tensor | None,
    h_N: Tensor | None,
    weight_N: Tensor | None = None,
) -> None:
    """Write the gradient of the rows `at` into `out_NV`, which may be `x_NV` itself."""
    x_NV, call = rows_of(x_NV), Call()
    LIBRARY.fastppo_token_logprobs_backward(
        byref(call.rows(x_NV, rows, at, weight_N)),
        byref(call.gradient(out_NV, x_NV)),
        byref(_statistics(stats)),
        call.floats(g_N),
        call.floats(h_N),
    )


def policy_loss(
    x_NV: Tensor,
    out_NV: Tensor | None,
    rows: RowArguments,
    loss: LossArguments,
    at: slice,
    into: LossRows,
) -> None:
    """Write the loss's results for the rows `at`, and their gradient into `out_NV` if given."""
    x_NV, call = rows_of(x_NV), Call()
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
        kl_coef=number(loss.kl_coef),
        entropy_coef=number(loss.entropy_coef),
        grad_scale=number(loss.grad_scale),
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        dual_clip=loss.dual_clip or 0.0,
        limit=loss.log_ratio_limit,
        kl_kind=KL_KINDS[loss.kl_kind],
    )
    given, grad = call.rows(x_NV, rows, at), call.gradient(out_NV, x_NV)
    LIBRARY.fastppo_policy_loss(byref(given), byref(grad), byref(struct))


def loss_totals(
    rows: RowArguments, loss: LossArguments, into: LossRows
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, KL of each token and the vector of PolicyMetrics, once all rows are computed."""
    terms, n = into.term_MN.shape
    start, stride = into.term_MN.data_ptr(), into.term_MN.stride(0)
    # Tensors of their own: a registered op's results share no memory.
    vector, total = _empty(terms - 1), _empty()
    LIBRARY.fastppo_sum_rows(start, stride, terms - 1, n, RATIO_MAX, vector.data_ptr())
    last = start + 4 * stride * (terms - 1)
    LIBRARY.fastppo_sum_rows(last, stride, 1, n, -1, total.data_ptr())
    return total, into.kl_N, vector


def score_tokens(x_NV: Tensor, ref_NV: Tensor, rows: RowArguments, at: slice, into: Scores) -> None:
    """Write both log-probs, entropy and exact KL of the rows `at` into `into`."""
    if x_NV.dtype != ref_NV.dtype:
        x_NV, ref_NV = x_NV.float(), ref_NV.float()
    x_NV, ref_NV, call = rows_of(x_NV), rows_of(ref_NV), Call()
    LIBRARY.fastppo_score_tokens(
        byref(call.rows(x_NV, rows, at)),
        ref_NV.data_ptr(),
        ref_NV.stride(0),
        byref(
            ScoresStruct(
                logprob=into.logprob_N.data_ptr(),
                ref_logprob=into.ref_logprob_N.data_ptr(),
                entropy=into.entropy_N.data_ptr(),
                kl=into.exact_kl_N.data_ptr(),
            )
        ),
    )


def scale_unless_one(x: Tensor, factor: Tensor, divisor: float | Tensor) -> None:
    """Multiply x by factor / divisor in place."""
    plain = isinstance(divisor, float) and divisor == 1.0
    ratio = factor.item() if plain else (factor / divisor).item()
    if ratio != 1.0:
        x.mul_(ratio)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def token_kl(
    logprob_N: Tensor, ref_logprob_N: Tensor, kind: str, limit: float
) -> tuple[Tensor, Tensor]:
    """The KL estimate k of each token, and dk/dlogprob."""
    n, call = logprob_N.numel(), Call()
    (logprob, kl_N), (ref, slope_N) = call.over(logprob_N), call.over(ref_logprob_N)
    LIBRARY.fastppo_token_kl(
        logprob,
        ref,
        kl_N.data_ptr(),
        slope_N.data_ptr(),
        n,
        limit,
        KL_KINDS[kind],
    )
    return kl_N, slope_N


def token_kl_backward(slope_N: Tensor, grad_N: Tensor) -> Tensor:
    """slope * grad; 0 where the slope is 0, even if the gradient is infinite or NaN."""
    n, call = slope_N.numel(), Call()
    out_N = _empty(n)
    one = grad_N.dtype is torch.float32 and grad_N.stride(0) == 0  # of a sum: the same for all
    grad = grad_N.data_ptr() if one else call.floats(grad_N)
    LIBRARY.fastppo_token_kl_backward(slope_N.data_ptr(), grad, not one, n, out_N.data_ptr())
    return out_N


def value_loss(
    value_N: Tensor, old_value_N: Tensor, return_N: Tensor, weight_N: Tensor, clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the vector of ValueMetrics, and dloss/dvalue."""
    n, call = value_N.numel(), Call()
    loss, metrics, grad_N = _empty(), _empty(6), _empty(n)
    LIBRARY.fastppo_value_loss(
        call.floats(value_N),
        call.floats(old_value_N),
        call.floats(return_N),
        call.floats(weight_N),
        clip or 0.0,
        n,
        grad_N.data_ptr(),
        metrics.data_ptr(),
        loss.data_ptr(),
    )
    return loss, metrics, grad_N


def moments(x_N: Tensor, weight_N: Tensor | None) -> Tensor:
    """Count, mean and sum of squared deviations (m2), as a tensor (3,)."""
    call, out = Call(), _empty(3)
    LIBRARY.fastppo_moments(call.floats(x_N), call.floats(weight_N), x_N.numel(), out.data_ptr())
    return out


def whiten(
    x_N: Tensor, weight_N: Tensor | None, moments: Tensor | None, shift_mean: bool
) -> Tensor:
    """The values, whitened by the moments (3,) if they are given, else by their own."""
    call = Call()
    x, y_N = call.over(x_N)
    weight, moments_3 = call.floats(weight_N), call.floats(moments)
    LIBRARY.fastppo_whiten(x, weight, moments_3, x_N.numel(), shift_mean, y_N.data_ptr())
    return y_N


def gae(a: GaeArguments) -> tuple[Tensor, Tensor]:
    """Advantages and returns."""
    n, call = a.reward_N.numel(), Call()
    advantage_N, return_N = _empty(n), _empty(n)
    if a.offsets.numel() > 1:
        LIBRARY.fastppo_gae(
            call.floats(a.reward_N),
            call.floats(a.value_N),
            call.integers(a.offsets),
            a.offsets.numel() - 1,
            call.floats(a.bootstrap_value_B),
            a.gamma,
            a.lam,
            advantage_N.data_ptr(),
            return_N.data_ptr(),
        )
    return advantage_N, return_N


def advantages(a: AdvantagesArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advantages, returns, rewards and KL, in one call."""
    n, batch, call = a.logprob_N.numel(), a.offsets.numel() - 1, Call()
    outputs = (_empty(n), _empty(n), _empty(n), _empty(n))
    if n == 0 or batch == 0:
        return outputs
    advantage_N, return_N, reward_N, kl_N = outputs
    struct = AdvantagesStruct(
        score=call.floats(a.score_B),
        logprob=call.floats(a.logprob_N),
        ref=call.floats(a.ref_logprob_N),
        exact_kl=call.floats(a.kl_N),
        extra=call.floats(a.extra_reward_N),
        value=call.floats(a.value_N),
        offsets=call.integers(a.offsets),
        bootstrap=call.floats(a.bootstrap_value_B),
        advantage=advantage_N.data_ptr(),
        returns=return_N.data_ptr(),
        reward=reward_N.data_ptr(),
        kl=kl_N.data_ptr(),
        part=call.copy(torch.empty(batch, 3, dtype=torch.float64)),
        batch=batch,
        gamma=a.gamma,
        lam=a.lam,
        kl_coef=number(a.kl_coef),
        limit=a.log_ratio_limit,
        kl_kind=KL_KINDS[a.kl_kind],
        whiten_rewards=a.whiten_rewards,
        whiten_advantages=a.whiten_advantages,
    )
    LIBRARY.fastppo_advantages(byref(struct))
    return outputs
