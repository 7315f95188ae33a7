"""Mean 0 and variance 1 over the live tokens, and the moments that say how far off they are."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastppo.ops import checks
from fastppo.ops.backend import choose, token_kernels

EPS = 1e-8  # inside the root, as in TRL


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations; 0-d tensors that `merge` adds up exactly."""

    count: Tensor  # type: ignore[assignment]  # tuple's own count() gives way
    mean: Tensor
    m2: Tensor

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together.

        Source: Chan, Golub, LeVeque 1979, Updating Formulae and a Pairwise Algorithm for Computing
        Sample Variances.
        """
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * share,
            self.m2 + other.m2 + delta.square() * self.count * share,
        )

    @property
    def variance(self) -> Tensor:
        """Unbiased; 0 for fewer than two values."""
        return torch.where(self.count > 1, self.m2 / (self.count - 1).clamp(min=1), 0)


def moments(x_N: Tensor, *, weight_N: Tensor | None = None, backend: str | None = None) -> Moments:
    """Count, mean and sum of squared deviations of the values whose weight is not 0.

    Args:
        x_N: float (N,).
        weight_N: float or bool (N,), a mask: values of weight 0 are not read; None takes all.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        Moments(count, mean, m2), float32 (float64 for float64 input), without gradient; mean and m2
        are 0 where nothing counts.

    Raises:
        ValueError: shapes that disagree.
        TypeError: inputs that hold no floats.
    """
    op = "moments"
    checks.floating(op, "x_N", x_N, ndim=1)
    checks.row_vector(op, "weight_N", weight_N, x_N, n=x_N.numel(), mask=True)
    chosen = choose(op, backend, x_N)
    with torch.no_grad():
        return Moments(*torch.ops.fastppo.moments(x_N, weight_N, chosen).unbind(0))


@torch.library.custom_op(
    "fastppo::moments",
    mutates_args=(),
    schema="(Tensor x_N, Tensor? weight_N, str backend) -> Tensor",
)
def _moments_op(x_N: Tensor, weight_N: Tensor | None, backend: str) -> Tensor:
    """(3,): count, mean, m2."""
    if backend != "torch":
        kernels = token_kernels(backend)
        return cast(Tensor, kernels.merge_moments(kernels.moments(x_N, weight_N)))
    return torch.stack(_moments(x_N, _live(x_N, weight_N)))


@_moments_op.register_fake
def _(x_N: Tensor, weight_N: Tensor | None, backend: str) -> Tensor:
    return x_N.new_empty(3, dtype=checks.stat_dtype(x_N))


def _live(x_N: Tensor, weight_N: Tensor | None) -> Tensor:
    return torch.ones_like(x_N, dtype=torch.bool) if weight_N is None else weight_N != 0


def _moments(x_N: Tensor, live_N: Tensor) -> Moments:
    x_N = torch.where(live_N, x_N, 0).to(checks.stat_dtype(x_N))
    count = live_N.sum().to(x_N.dtype)
    mean = x_N.sum() / count.clamp(min=1)
    # Two passes: the squares of deviations from the mean, not the difference of two large numbers.
    m2 = torch.where(live_N, x_N - mean, 0).square().sum()
    return Moments(count, mean, m2)


def whiten(
    x_N: Tensor,
    *,
    weight_N: Tensor | None = None,
    shift_mean: bool = True,
    moments: Moments | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The values shifted and scaled to mean 0 and (unbiased) variance 1, without unit.

        y = (x - mean) / sqrt(var + 1e-8),    plus mean where shift_mean is False

    Args:
        x_N: float (N,).
        weight_N: float or bool (N,), a mask: values of weight 0 are not read and come back as 0.
        shift_mean: False adds the mean back, so that the sign of rewards is kept.
        moments: of a larger set (other micro-batches or ranks, by `merge`); None takes those of
            x_N.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        y_N, float32 (float64 for float64 input), without gradient.

    Raises:
        ValueError: shapes that disagree.
        TypeError: inputs that hold no floats.

    Source: Huang et al. 2024, The N+ Implementation Details of RLHF with PPO, on whitening.
    """
    op = "whiten"
    checks.floating(op, "x_N", x_N, ndim=1)
    checks.row_vector(op, "weight_N", weight_N, x_N, n=x_N.numel(), mask=True)
    chosen = choose(op, backend, x_N)
    dtype = checks.stat_dtype(x_N)
    given = None if moments is None else torch.stack([x.to(dtype) for x in moments])
    with torch.no_grad():
        y_N = torch.ops.fastppo.whiten(x_N, weight_N, given, shift_mean, chosen)
    return cast(Tensor, y_N)


@torch.library.custom_op(
    "fastppo::whiten",
    mutates_args=(),
    schema="(Tensor x_N, Tensor? weight_N, Tensor? moments, bool shift_mean, str backend) "
    "-> Tensor",
)
def _forward(
    x_N: Tensor, weight_N: Tensor | None, moments: Tensor | None, shift_mean: bool, backend: str
) -> Tensor:
    if backend != "torch":
        kernels = token_kernels(backend)
        parts = kernels.moments(x_N, weight_N) if moments is None else moments[:, None]
        return cast(Tensor, kernels.whiten(x_N, weight_N, parts, shift_mean))
    live_N = _live(x_N, weight_N)
    found = _moments(x_N, live_N) if moments is None else Moments(*moments.unbind(0))
    y_N = (x_N.to(found.mean.dtype) - found.mean) * torch.rsqrt(found.variance + EPS)
    if not shift_mean:
        y_N = y_N + found.mean
    return torch.where(live_N, y_N, 0)


@_forward.register_fake
def _(x_N: Tensor, *_: Any) -> Tensor:
    return x_N.new_empty(x_N.shape[0], dtype=checks.stat_dtype(x_N))
