"""Several labels a row, (N, K): all log-probs from one sweep over the logits, and their gradient.

    logprob_k = z[label_k] - lse,    dL/dz_v = sum_k g_k 1[v = label_k] - (sum_k g_k) p_v

A kernel knows one token a row. Here it is given one that is no word: its log-prob is not used, its
gradient is -g p alone, and what the labels themselves add is one gather and one scatter of N x K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.ops.arguments import RowArguments
from fastppo.ops.backends import Statistics


def log_sum_exp(rows: RowArguments, row_max_N: Tensor, sum_exp_N: Tensor) -> Tensor:
    """log sum exp z of each row, in nats, from its statistics; 0 on ignored rows."""
    lse_N = row_max_N / rows.temperature + sum_exp_N.log()
    return torch.where(rows.token_N == rows.ignore_index, 0.0, lse_N).to(sum_exp_N.dtype)


class _Labels(NamedTuple):
    index_NK: Tensor  # in [0, V)
    known_NK: Tensor  # whether the label is a word; if not, the index is 0
    live_NK: Tensor  # whether it is not the ignored one


def _labels_at(rows: RowArguments, at: slice, vocab: int) -> _Labels:
    assert rows.labels_NK is not None
    label_NK = rows.labels_NK[at]
    live_NK = label_NK != rows.ignore_index
    known_NK = live_NK & (label_NK >= 0) & (label_NK < vocab)
    return _Labels(torch.where(known_NK, label_NK, 0).long(), known_NK, live_NK)


def _tau_at(rows: RowArguments, at: slice) -> float | Tensor:
    tau = rows.temperature
    return tau[at, None] if isinstance(tau, Tensor) and tau.ndim else tau


def label_logprobs(x_NV: Tensor, rows: RowArguments, at: slice, stats: Statistics) -> Tensor:
    """Log-probs (n, K) of the labels of the rows `at`, whose logits and statistics are given."""
    u_NK = label_logits(x_NV, rows, at, stats.sum_exp_N.dtype)
    return logprobs_of(u_NK, rows, at, stats, x_NV.shape[1])


def label_logits(x_NV: Tensor, rows: RowArguments, at: slice, dtype: torch.dtype) -> Tensor:
    """Logits (n, K) of the labels of the rows `at`, after the softcap; 0 for what is no word."""
    labels = _labels_at(rows, at, x_NV.shape[1])
    u_NK = x_NV.gather(1, labels.index_NK).to(dtype)
    if rows.softcap is not None:
        capped_NK = rows.softcap * torch.tanh(u_NK / rows.softcap)
        u_NK = torch.where(u_NK == float("-inf"), u_NK, capped_NK)
    return torch.where(labels.known_NK, u_NK, 0)


def logprobs_of(
    u_NK: Tensor, rows: RowArguments, at: slice, stats: Statistics, vocab: int
) -> Tensor:
    """Log-probs (n, K) of labels of `vocab` words, whose logits after the softcap are given."""
    labels, dtype = _labels_at(rows, at, vocab), stats.sum_exp_N.dtype
    row_max_N1, sum_exp_N1 = stats.row_max_N[at, None], stats.sum_exp_N[at, None]
    logprob_NK = (u_NK - row_max_N1) / _tau_at(rows, at) - sum_exp_N1.log()
    # A row of nothing but masked vocabulary has no probabilities.
    logprob_NK = torch.where(sum_exp_N1 == 0, float("-inf"), logprob_NK)
    logprob_NK = torch.where(labels.known_NK, logprob_NK, float("nan"))
    return torch.where(labels.live_NK, logprob_NK, 0.0).to(dtype)


class LabelGradient(NamedTuple):
    """The gradient g of the labels' log-probs, as a kernel takes it and as it adds to its output.

    It is made before the kernel runs, which may overwrite the logits.
    """

    g_N: Tensor  # of the whole batch; the rows asked for are filled
    index_NK: Tensor
    own_NK: Tensor  # what each label adds at its own logit

    @classmethod
    def of(
        cls, x_NV: Tensor, rows: RowArguments, at: slice, logprob_NK: Tensor, g_NK: Tensor
    ) -> LabelGradient:
        labels, dtype = _labels_at(rows, at, x_NV.shape[1]), logprob_NK.dtype
        # A label of masked vocabulary cannot be made likelier: its log-prob passes no gradient.
        live_NK = labels.live_NK & (logprob_NK[at] != float("-inf"))
        g_NK = torch.where(live_NK, g_NK[at].to(dtype), 0)
        g_N = g_NK.new_zeros(logprob_NK.shape[0])
        g_N[at] = g_NK.sum(1)
        own_NK = torch.where(labels.known_NK, g_NK, 0) / _tau_at(rows, at)
        if rows.softcap is not None:
            t_NK = torch.tanh(x_NV.gather(1, labels.index_NK).to(dtype) / rows.softcap)
            own_NK = own_NK * (1 - t_NK * t_NK)
        return cls(g_N, labels.index_NK, own_NK)

    def add_to(self, out_NV: Tensor) -> None:
        """Add the labels' part to the gradient that the kernel wrote."""
        out_NV.scatter_add_(1, self.index_NK, self.own_NK.to(out_NV.dtype))


def for_kernels(stats: Statistics) -> Statistics:
    """Statistics whose log-probs are (N,) and finite: no row's gradient is left out for them."""
    return stats._replace(logprob_N=stats.entropy_N)
