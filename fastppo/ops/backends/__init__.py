"""The operators' three implementations, with one interface: `triton`, `native`, `definition`.

`fastppo.ops.backend` decides which one runs. Functions of logits are called for one chunk of rows
at a time: `x_NV` has the logits of the rows `at` only, but vectors have an entry for every row.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from torch import Tensor

from fastppo.ops.arguments import LossArguments, RowArguments


class Statistics(NamedTuple):
    """Results of each row (N,); several labels of a row make log-probs (N, K)."""

    logprob_N: Tensor
    entropy_N: Tensor
    row_max_N: Tensor  # the largest logit, after the softcap and before the temperature
    sum_exp_N: Tensor  # sum of exp((logit - row_max) / temperature)


class LossRows(NamedTuple):
    """Results of the loss for each row (N,), and its terms of the metrics (TERMS, N)."""

    logprob_N: Tensor
    entropy_N: Tensor
    kl_N: Tensor
    term_MN: Tensor  # empty for the definition


class Scores(NamedTuple):
    """Results in the shape of the tokens, in nats, without gradient; 0 for ignored tokens."""

    logprob_N: Tensor
    ref_logprob_N: Tensor
    entropy_N: Tensor
    exact_kl_N: Tensor


class GaeArguments(NamedTuple):
    """Arguments of `fastppo.ops.gae`."""

    reward_N: Tensor
    value_N: Tensor
    offsets: Tensor
    gamma: float
    lam: float
    bootstrap_value_B: Tensor | None
    backend: str


class AdvantagesArguments(NamedTuple):
    """Arguments of `fastppo.ops.advantages`."""

    score_B: Tensor
    logprob_N: Tensor
    ref_logprob_N: Tensor
    value_N: Tensor
    offsets: Tensor
    kl_coef: float | Tensor
    kl_kind: str
    kl_N: Tensor | None
    extra_reward_N: Tensor | None
    gamma: float
    lam: float
    bootstrap_value_B: Tensor | None
    whiten_rewards: bool
    whiten_advantages: bool
    log_ratio_limit: float
    backend: str


class TokenKernels(Protocol):
    """What a loss of log-probs and entropies needs of rows of logits."""

    def token_logprobs(
        self,
        x_NV: Tensor,
        rows: RowArguments,
        at: slice,
        into: Statistics,
        weight_N: Tensor | None = None,
    ) -> None:
        """Write the statistics of the rows `at` into `into`; rows of weight 0 are not read."""

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
        """Write the gradient of the rows `at` into `out_NV`, which may be `x_NV` itself.

        `stats` may be those of a row of which `x_NV` is a part.
        """


class Backend(TokenKernels, Protocol):
    """The functions that each of the three modules has."""

    def policy_loss(
        self,
        x_NV: Tensor,
        out_NV: Tensor | None,
        rows: RowArguments,
        loss: LossArguments,
        at: slice,
        into: LossRows,
    ) -> None:
        """Write the loss's results for the rows `at`, and their gradient into `out_NV` if given."""

    def loss_totals(
        self, rows: RowArguments, loss: LossArguments, into: LossRows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, KL of each token and the vector of PolicyMetrics, once all rows are computed."""

    def score_tokens(
        self, x_NV: Tensor, ref_NV: Tensor, rows: RowArguments, at: slice, into: Scores
    ) -> None:
        """Write both log-probs, entropy and exact KL of the rows `at` into `into`."""

    def scale_unless_one(self, x: Tensor, factor: Tensor, divisor: float | Tensor) -> None:
        """Multiply x by factor / divisor in place; x is not read if that is 1."""

    def token_kl(
        self, logprob_N: Tensor, ref_logprob_N: Tensor, kind: str, limit: float
    ) -> tuple[Tensor, Tensor]:
        """The KL estimate k of each token, and dk/dlogprob."""

    def token_kl_backward(self, slope_N: Tensor, grad_N: Tensor) -> Tensor:
        """slope * grad; 0 where the slope is 0, even if the gradient is infinite or NaN."""

    def value_loss(
        self,
        value_N: Tensor,
        old_value_N: Tensor,
        return_N: Tensor,
        weight_N: Tensor,
        clip: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the vector of ValueMetrics, and dloss/dvalue."""

    def moments(self, x_N: Tensor, weight_N: Tensor | None) -> Tensor:
        """Count, mean and sum of squared deviations (m2), as a tensor (3,)."""

    def whiten(
        self, x_N: Tensor, weight_N: Tensor | None, moments: Tensor | None, shift_mean: bool
    ) -> Tensor:
        """The values, whitened by the moments (3,) if they are given, else by their own."""

    def gae(self, a: GaeArguments) -> tuple[Tensor, Tensor]:
        """Advantages and returns."""

    def advantages(self, a: AdvantagesArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Advantages, returns, rewards and KL."""


class _Backends(dict[str, Backend]):
    """The backends by name; each is imported when it is first used."""

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
