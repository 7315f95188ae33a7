"""Whiten values over the live tokens (mean 0, variance 1), and compute their moments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.ops.arguments import chosen_backend, is_traced, stat_dtype
from fastppo.ops.backends import BACKENDS
from fastppo.ops.checks import check_flag, check_floating, check_vector, wrong_kind
from fastppo.ops.registered import register


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations (m2) as 0-d tensors; `merge` combines two sets."""

    count: Tensor  # type: ignore[assignment]  # tuple's own count() gives way
    mean: Tensor
    m2: Tensor

    def merge(self, other: Moments) -> Moments:
        """The moments of the union of both sets.

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
        """The unbiased variance; 0 for fewer than two values."""
        return torch.where(self.count > 1, self.m2 / (self.count - 1).clamp(min=1), 0)


def moments(x_N: Tensor, *, weight_N: Tensor | None = None, backend: str | None = None) -> Moments:
    """Count, mean and sum of squared deviations of the values whose weight is not 0.

    Args:
        x_N: float (N,).
        weight_N: float or bool (N,), a mask: values of weight 0 are not read; None takes all.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        Moments(count, mean, m2), float32 (float64 for float64 input), without gradient; mean and m2
        are 0 if count is 0.

    Raises:
        ValueError: shapes that disagree.
        TypeError: inputs that are not floating point.
    """
    op = "moments"
    check_floating(op, "x_N", x_N, ndim=1)
    check_vector(op, "weight_N", weight_N, x_N, n=x_N.numel(), mask=True, optional=True)
    given = MomentsArguments(x_N, weight_N, chosen_backend(op, backend, x_N))
    with torch.no_grad():
        found = _registered_moments(given) if is_traced(x_N) else _moments(given)
        return Moments(*found.count_mean_m2.unbind(0))


class MomentsArguments(NamedTuple):
    """Arguments of the registered operator."""

    x_N: Tensor
    weight_N: Tensor | None
    backend: str


class MomentsVector(NamedTuple):
    """Outputs of the registered operator: (3,)."""

    count_mean_m2: Tensor


def _moments(a: MomentsArguments) -> MomentsVector:
    return MomentsVector(BACKENDS[a.backend].moments(a.x_N, a.weight_N))


_registered_moments = register(
    "moments",
    MomentsArguments,
    MomentsVector,
    _moments,
    lambda a: MomentsVector(a.x_N.new_empty(3, dtype=stat_dtype(a.x_N))),
)


def whiten(
    x_N: Tensor,
    *,
    weight_N: Tensor | None = None,
    shift_mean: bool = True,
    moments: Moments | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The values shifted and scaled to mean 0 and (unbiased) variance 1, without unit.

        y = (x - mean) / sqrt(var + 1e-8),    plus mean if shift_mean is False

    Args:
        x_N: float (N,).
        weight_N: float or bool (N,), a mask: values of weight 0 are not read and come back as 0.
        shift_mean: False adds the mean back, so that the sign of rewards is kept.
        moments: of a larger set (merged from other micro-batches or ranks); None computes those of
            x_N.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        y_N, float32 (float64 for float64 input), without gradient.

    Raises:
        ValueError: shapes that disagree.
        TypeError: inputs that are not floating point.

    Source: Huang et al. 2024, The N+ Implementation Details of RLHF with PPO, on whitening.
    """
    op = "whiten"
    check_floating(op, "x_N", x_N, ndim=1)
    check_vector(op, "weight_N", weight_N, x_N, n=x_N.numel(), mask=True, optional=True)
    check_flag(op, "shift_mean", shift_mean)
    if moments is not None and not isinstance(moments, Moments):
        wrong_kind(op, "moments", moments, "a Moments or None")
    chosen, dtype = chosen_backend(op, backend, x_N), stat_dtype(x_N)
    vector = None if moments is None else torch.stack([x.to(dtype) for x in moments])
    given = Arguments(x_N, weight_N, vector, shift_mean, chosen)
    with torch.no_grad():
        return (_registered(given) if is_traced(x_N) else _forward(given)).y_N


class Arguments(NamedTuple):
    """Arguments of the registered operator; `moments` are (3,)."""

    x_N: Tensor
    weight_N: Tensor | None
    moments: Tensor | None
    shift_mean: bool
    backend: str


class Outputs(NamedTuple):
    """Outputs of the registered operator."""

    y_N: Tensor


def _forward(a: Arguments) -> Outputs:
    kernels = BACKENDS[a.backend]
    return Outputs(kernels.whiten(a.x_N, a.weight_N, a.moments, a.shift_mean))


_registered = register(
    "whiten",
    Arguments,
    Outputs,
    _forward,
    lambda a: Outputs(a.x_N.new_empty(a.x_N.shape[0], dtype=stat_dtype(a.x_N))),
)
