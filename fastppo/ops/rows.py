"""The arithmetic of one row of logits: its normaliser, its entropy, its gradient.

Every per-token loss reaches the logits through two scalars, g = dL/dlogprob and h = dL/dentropy:

    z = s tanh(x / s) / tau,  p = softmax(z),  lp = z[a] - LSE(z),  H = LSE(z) - sum p z
    dL/dz_v = g (1[v = a] - p_v) - h p_v (log p_v + H)
    dL/dx_v = dL/dz_v (1 - tanh^2(x_v / s)) / tau

Rows go through in blocks that stay in the CPU's caches: a sweep over a block costs arithmetic, not
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastppo.ops.arguments import RowArguments

# Below this exp is 0 in float32 and in float64, and 0 * this is 0 where 0 * -inf would be NaN.
FLOOR = -1e4

_BLOCK_BYTES_CPU = 2 << 20
_BLOCK_BYTES_DEVICE = 256 << 20


@dataclass(frozen=True)
class RowSpec:
    """What a row needs besides its logits.

    `token_N` is in [0, V), or below 0 on a row with several labels, which are added elsewhere. A
    row that is not live is computed and thrown away.
    """

    token_N: Tensor
    live_N: Tensor
    temperature: float | Tensor
    softcap: float | None

    def at(self, rows: slice) -> RowSpec:
        tau = self.temperature
        if isinstance(tau, Tensor) and tau.ndim == 1:
            tau = tau[rows]
        return RowSpec(self.token_N[rows], self.live_N[rows], tau, self.softcap)


def row_spec(rows: RowArguments, live_N: Tensor, dtype: torch.dtype) -> RowSpec:
    """A RowSpec whose tokens can be gathered and whose temperature has the statistics' dtype."""
    tau = rows.temperature
    if isinstance(tau, Tensor):
        tau = tau.detach().to(dtype=dtype, device=rows.token_N.device)
        if tau.ndim == 1:
            tau = torch.where(live_N, tau, 1)
    token_N = torch.where(live_N, rows.token_N, 0).long()
    return RowSpec(token_N, live_N, tau, rows.softcap)


class RowStats(NamedTuple):
    """Statistics of a block of rows, and what its gradient needs again."""

    logprob: Tensor  # (n,), 0 on rows that are not live
    entropy: Tensor  # (n,), likewise
    row_max: Tensor  # (n, 1), max z tau; 0 on rows of nothing but masked vocabulary
    shifted: Tensor  # (n, V), z - max z, no -inf left in it
    exp: Tensor  # (n, V), exp(z - max z)
    total: Tensor  # (n, 1), sum exp(z - max z)
    sum_exp: Tensor  # (n, 1), the same, 1 where that is 0
    log_sum_exp: Tensor  # (n, 1), its logarithm
    row_entropy: Tensor  # (n, 1)
    slope: Tensor | None  # (n, V), 1 - tanh^2, with a softcap


def _softcapped(x_NV: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Logits after the softcap, in place, and its slope; masked vocabulary stays -inf."""
    if softcap is None:
        return x_NV, None
    masked = x_NV == float("-inf")
    capped = x_NV.div_(softcap).tanh_()
    slope = 1 - capped * capped
    return capped.mul_(softcap).masked_fill_(masked, float("-inf")), slope


def _tempered(x_NV: Tensor, tau: float | Tensor) -> Tensor:
    """Logits divided by the temperature, in place."""
    if isinstance(tau, Tensor):
        x_NV.div_(tau[:, None] if tau.ndim else tau)
    elif tau != 1.0:
        x_NV.div_(tau)
    return x_NV


def statistics(x_NV: Tensor, spec: RowSpec) -> RowStats:
    """Log-prob and entropy of each row, in nats. `x_NV` is overwritten."""
    x_NV, slope = _softcapped(x_NV, spec.softcap)
    row_max = x_NV.amax(-1, keepdim=True)
    # A row of nothing but masked vocabulary has no probabilities: lp -inf, entropy 0, no NaN.
    row_max.masked_fill_(row_max == float("-inf"), 0.0)
    x_NV = _tempered(x_NV, spec.temperature).sub_(_tempered(row_max.clone(), spec.temperature))
    sampled = x_NV.gather(1, spec.token_N.clamp(min=0)[:, None])
    x_NV.clamp_(min=FLOOR)
    exp = x_NV.exp()
    total = exp.sum(-1, keepdim=True)
    sum_exp = total.masked_fill(total == 0, 1.0)
    log_sum_exp = sum_exp.log()
    entropy = log_sum_exp - (exp * x_NV).sum(-1, keepdim=True) / sum_exp
    dead = ~spec.live_N
    return RowStats(
        logprob=(sampled - log_sum_exp).squeeze(1).masked_fill_(dead, 0.0),
        entropy=entropy.squeeze(1).masked_fill(dead, 0.0),
        row_max=row_max,
        shifted=x_NV,
        exp=exp,
        total=total,
        sum_exp=sum_exp,
        log_sum_exp=log_sum_exp,
        row_entropy=entropy,
        slope=slope,
    )


def known_statistics(
    x_NV: Tensor,
    spec: RowSpec,
    logprob_N: Tensor,
    entropy_N: Tensor,
    row_max_N: Tensor,
    sum_exp_N: Tensor,
) -> RowStats:
    """What `gradient` needs of rows whose statistics are known. `x_NV` is overwritten.

    They may be those of a row of which `x_NV` is a part. `row_max_N` is before the temperature.
    """
    x_NV, slope = _softcapped(x_NV, spec.softcap)
    top = _tempered(row_max_N[:, None].clone(), spec.temperature)
    shifted = _tempered(x_NV, spec.temperature).sub_(top).clamp_(min=FLOOR)
    sum_exp = sum_exp_N.masked_fill(sum_exp_N == 0, 1.0)[:, None]
    return RowStats(
        logprob=logprob_N,
        entropy=entropy_N,
        row_max=row_max_N[:, None],
        shifted=shifted,
        exp=shifted.exp(),
        total=sum_exp_N[:, None],
        sum_exp=sum_exp,
        log_sum_exp=sum_exp.log(),
        row_entropy=entropy_N[:, None],
        slope=slope,
    )


def gradient(stats: RowStats, spec: RowSpec, g_N: Tensor, h_N: Tensor | None) -> Tensor:
    """dL/dlogits of the block, zero on rows that are not live. `stats` is overwritten."""
    # A sampled token of masked vocabulary cannot be made likelier: its log-prob passes no gradient.
    g_N = g_N.masked_fill(stats.logprob == float("-inf"), 0.0)
    tau = spec.temperature
    g = (g_N / tau)[:, None]
    p_or_dx = stats.exp.div_(stats.sum_exp)
    if h_N is None:
        p_or_dx.mul_(-g)
    else:
        h = (h_N / tau)[:, None]
        # -p (g + h (log p + H)), with log p = shifted - log_sum_exp
        inner = stats.shifted.mul_(h).add_(g + h * (stats.row_entropy - stats.log_sum_exp))
        p_or_dx.mul_(inner.neg_())
    own_g = g.masked_fill(spec.token_N[:, None] < 0, 0.0)
    p_or_dx.scatter_add_(1, spec.token_N.clamp(min=0)[:, None], own_g)
    if stats.slope is not None:
        p_or_dx.mul_(stats.slope)
    return p_or_dx.masked_fill_(~spec.live_N[:, None], 0.0)


# What is done with a chunk of rows: given its place, its logits, and where their gradient goes
# (which may be the logits), or None where none is wanted.
ChunkKernel = Callable[[slice, Tensor, "Tensor | None"], None]


def block_slices(x_NV: Tensor, dtype: torch.dtype) -> list[slice]:
    """Consecutive slices of the rows, each a block of the size that suits the device."""
    n, vocab = x_NV.shape
    budget = _BLOCK_BYTES_CPU if x_NV.device.type == "cpu" else _BLOCK_BYTES_DEVICE
    rows = max(1, budget // (vocab * dtype.itemsize))
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def private(x_NV: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy in `dtype` to overwrite; so strides do not change the order of sums."""
    return x_NV.to(dtype, copy=True, memory_format=torch.contiguous_format)


class Chunks(Protocol):
    """Rows of logits that exist, or that are made chunk by chunk from hidden states."""

    def visit(self, kernel: ChunkKernel, *, write: bool) -> None:
        """Call `kernel` once with every chunk; with `write` keep the gradients that it writes."""
