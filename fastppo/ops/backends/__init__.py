"""The three implementations behind the operators, one interface: `triton`, `native`, `definition`.

Which one runs is decided in `fastppo.ops.backend`. Over logits they are called a chunk of rows at a
time: `x_NV` are the logits of the rows `at`, vectors are whole.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from torch import Tensor

from fastppo.ops.arguments import (
    AdvantagesArguments,
    GaeArguments,
    LossArguments,
    RowArguments,
)


class Statistics(NamedTuple):
    """Of each row, (N,); with several labels a row an operator's log-probs are (N, K)."""

    logprob_N: Tensor
    entropy_N: Tensor
    row_max_N: Tensor  # the largest logit, after the softcap and before the temperature
    sum_exp_N: Tensor  # sum of exp((logit - row_max) / temperature)


class LossRows(NamedTuple):
    """What the loss leaves of each row: (N,), and the terms of the metrics, (TERMS, N)."""

    logprob_N: Tensor
    entropy_N: Tensor
    kl_N: Tensor
    term_MN: Tensor  # empty for the definition


class Scores(NamedTuple):
    """All in the tokens' shape, in nats, without gradient; 0 on ignored tokens."""

    logprob_N: Tensor
    ref_logprob_N: Tensor
    entropy_N: Tensor
    exact_kl_N: Tensor


class Backend(Protocol):
    """What each of the three modules has."""

    def token_logprobs(
        self,
        x_NV: Tensor,
        rows: RowArguments,
        at: slice,
        into: Statistics,
        weight_N: Tensor | None = None,
    ) -> None:
        """Statistics of the rows `at`; rows of weight 0 are not read."""

    def token_logprobs_backward(
        self,
        x_NV: Tensor,
        out_NV: Tensor,
        rows: RowArguments,
        at: slice,
        stats: Statistics,
        g_N: Tensor | None,
        h_N: Tensor | None,
        weight_N: Tensor | None = None,
    ) -> None:
        """The gradient of the rows `at` into `out_NV`, which may be `x_NV`."""

    def policy_loss(
        self,
        x_NV: Tensor,
        out_NV: Tensor | None,
        rows: RowArguments,
        loss: LossArguments,
        at: slice,
        into: LossRows,
    ) -> None:
        """What the loss leaves of the rows `at`; their gradient into `out_NV`, perhaps `x_NV`."""

    def loss_totals(
        self, rows: RowArguments, loss: LossArguments, into: LossRows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, KL of each token and the vector of PolicyMetrics, of rows that are all done."""

    def score_tokens(
        self, x_NV: Tensor, ref_NV: Tensor, rows: RowArguments, at: slice, into: Scores
    ) -> None:
        """Log-probs of both, entropy and exact KL of the rows `at`."""

    def scale_unless_one(self, x: Tensor, factor: Tensor, divisor: float | Tensor) -> None:
        """x *= factor / divisor, in place; nothing is read where that is 1."""

    def token_kl(
        self, logprob_N: Tensor, ref_logprob_N: Tensor, kind: str, limit: float
    ) -> tuple[Tensor, Tensor]:
        """k and dk/dlogprob of each token."""

    def value_loss(
        self,
        value_N: Tensor,
        old_value_N: Tensor,
        return_N: Tensor,
        weight_N: Tensor,
        clip: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, the vector of ValueMetrics, and dloss/dvalue."""

    def moments(self, x_N: Tensor, weight_N: Tensor | None) -> Tensor:
        """(3,): count, mean and m2."""

    def whiten(
        self, x_N: Tensor, weight_N: Tensor | None, moments: Tensor | None, shift_mean: bool
    ) -> Tensor:
        """Values shifted and scaled by the moments (3,), or by their own."""

    def gae(self, a: GaeArguments) -> tuple[Tensor, Tensor]:
        """Advantages and returns."""

    def advantages(self, a: AdvantagesArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Advantages, returns, rewards and KL."""


class _Backends(dict[str, Backend]):
    """By name; each is imported when it is first asked for."""

    def __missing__(self, name: str) -> Backend:
        if name == "triton":
            from fastppo.ops.backends import triton

            self[name] = triton
        elif name == "native":
            from fastppo.ops.backends import native

            self[name] = native
        else:
            from fastppo.ops.backends import definition

            self[name] = definition
        return self[name]


BACKENDS: Final = _Backends()
