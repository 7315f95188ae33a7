"""A head whose vocabulary is sharded over a process group: what its ranks tell each other.

Every rank has all hidden states, and of the weight the rows of some words. Of a chunk of tokens it
makes the logits of its own words alone, (n, V_local), and a kernel goes over them as over a whole
head's. Then two reductions of a few numbers a row give every rank the statistics of whole rows:

    m = max m_r;    s = sum_r s_r e_r,    t = sum_r (t_r + s_r d_r) e_r,    u = sum_r u_r
    logprob = (u - m) / tau - log s,    entropy = log s - t / s

with d_r = (m_r - m) / tau and e_r = exp(d_r). Of a rank's logits x, m_r is the maximum, s_r the sum
of exp((x - m_r) / tau), t_r that of the same times (x - m_r) / tau, and u_r the label's, or 0 where
the label is another's. With m, s and the entropy of whole rows a kernel makes the gradient of the
rank's logits. That of the hidden states is a sum over words, so over ranks: one reduction of
(n, D) a chunk. Gradients of weight, bias and the adapter's B are each rank's own.

All ranks have to make the same reductions, or they wait for each other for ever: n follows from
the largest shard, which the ranks tell each other once a call, with what else it depends on.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from fastppo.ops.arguments import RowArguments, is_traced
from fastppo.ops.backends import BACKENDS, Statistics
from fastppo.ops.checks import wrong_kind
from fastppo.ops.head import WEIGHT, Head, HeadGradients, LinearRows, chunk_slices
from fastppo.ops.labels import label_logits, logprobs_of
from fastppo.ops.rows import FLOOR
from fastppo.ops.shapes import checked_vocab_size
from fastppo.ops.token_logprobs import backward_at

_LORA_A: Final = 3  # its place in `LinearRows.wanted`
# In a rank's own ids, which begin at 0: what no word can be.
_OTHERS, _IGNORED = -1, -2


@dataclass(frozen=True)
class VocabShard:
    """A rank's part of the vocabulary: `words` words from `start` on, of `vocab` in all."""

    group: dist.ProcessGroup
    start: int
    words: int
    vocab: int
    largest: int  # words of the largest shard
    reduce_hidden_grad: bool

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place; the same bits on each."""
        dist.all_reduce(x, op=dist.ReduceOp.SUM, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        """The maximum over the ranks, in place."""
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def kernels(self, rows: RowArguments, backend: str) -> ShardedKernels:
        """A backend's functions of rows of logits, for a rank's words."""
        return ShardedKernels(self, rows, backend)

    def own_ids(self, token: Tensor, ignore_index: int) -> Tensor:
        """Ids of the whole vocabulary as those of this rank's words, _OTHERS or _IGNORED."""
        own = (token >= self.start) & (token < self.start + self.words)
        ids = torch.where(own, token - self.start, _OTHERS)
        return torch.where(token == ignore_index, _IGNORED, ids)


def vocab_shard(
    op: str,
    group: dist.ProcessGroup,
    hidden_ND: Tensor,
    head: Head,
    token_N: Tensor,
    vocab_size: int | None,
    reduce_hidden_grad: bool,
    check: bool,
    settings: dict[str, Any],
) -> tuple[Head, VocabShard]:
    """This rank's head without rows past `vocab_size`, and its shard: one exchange of all ranks.

    `settings` are what else decides how many reductions a call makes.

    Raises:
        ValueError: on every rank, if they differ in what has to be the same.
    """
    if not isinstance(group, dist.ProcessGroup):
        cure = "; of a DeviceMesh give get_group()" if hasattr(group, "get_group") else ""
        wrong_kind(op, "group", group, f"a torch.distributed.ProcessGroup or None{cure}")
    if dist.get_rank(group) < 0:
        raise ValueError(f"{op}: group must hold this process; call it in the group's ranks alone")
    if is_traced(hidden_ND):
        raise ValueError(
            f"{op}: group= needs tensors with values, and does not go through torch.compile; wrap "
            f"it in torch.compiler.disable({op})"
        )
    tensors = (hidden_ND, *head.tensors())
    facts = {
        "shape of hidden_ND": tuple(hidden_ND.shape),
        "dtype of hidden_ND": hidden_ND.dtype,
        "shape of token_N": tuple(token_N.shape) if isinstance(token_N, Tensor) else None,
        "requires_grad": [x is not None and x.requires_grad for x in tensors],
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "vocab_size": vocab_size,
        "reduce_hidden_grad": reduce_hidden_grad,
        "check": check,
        **settings,
    }
    sizes = _agreed(op, group, hidden_ND.device, head.weight_VD.shape[0], facts)
    vocab, rank = sum(sizes), dist.get_rank(group)
    if vocab_size is not None:
        vocab = checked_vocab_size(op, vocab_size, vocab)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    words = [max(0, min(size, vocab - start)) for size, start in zip(sizes, starts, strict=True)]
    if words[rank] != sizes[rank]:
        head = head.first_words(words[rank])
    shard = VocabShard(group, starts[rank], words[rank], vocab, max(words), reduce_hidden_grad)
    if check is True and isinstance(token_N, Tensor):
        token = token_N.long()
        most, least = shard.max(torch.stack([token, -token]))
        if bool((most != -least).any()):
            raise ValueError(f"{op}: token_N must be the same on every rank of group, came others")
    return head, shard


def _agreed(
    op: str, group: dist.ProcessGroup, device: torch.device, words: int, facts: dict[str, Any]
) -> list[int]:
    """The number of words of every rank, whose other facts are checked to be the same."""
    digests = [zlib.crc32(repr(fact).encode()) for fact in facts.values()]
    own = torch.tensor([words, *digests], device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    first, *others = torch.stack(gathered).tolist()
    for rank, theirs in enumerate(others, 1):
        pairs = zip(facts, first[1:], theirs[1:], strict=True)
        differ = [name for name, one, other in pairs if one != other]
        if differ:
            raise ValueError(
                f"{op}: rank {rank} of group has another {', '.join(differ)} than rank 0; give all "
                "ranks the same hidden states, tokens and settings, and each its shard of the head"
            )
    return [first[0], *(theirs[0] for theirs in others)]


class ShardedKernels:
    """A backend's functions of rows of logits, where a rank has the logits of its words alone.

    What they are given and give out is of the whole vocabulary, besides the logits; several labels
    a row, too: then log-probs and their gradient are (N, K).
    """

    def __init__(self, shard: VocabShard, rows: RowArguments, backend: str) -> None:
        self.shard, self.kernels = shard, BACKENDS[backend]
        self.live_N = rows.token_N != rows.ignore_index
        labels_NK = rows.token_N[:, None] if rows.labels_NK is None else rows.labels_NK
        self.labels = rows._replace(labels_NK=labels_NK)
        # In the rank's own ids.
        self.own_labels = rows._replace(
            token_N=shard.own_ids(rows.token_N, rows.ignore_index),
            labels_NK=shard.own_ids(labels_NK, rows.ignore_index),
            ignore_index=_IGNORED,
        )
        several = rows.labels_NK is not None
        self.own = self.own_labels if several else self.own_labels._replace(labels_NK=None)

    def token_logprobs(
        self,
        x_NV: Tensor,
        rows: RowArguments,
        at: slice,
        into: Statistics,
        weight_N: Tensor | None = None,
    ) -> None:
        """Write the statistics of the rows `at` into `into`: two reductions over the group."""
        shard, dtype = self.shard, into.sum_exp_N.dtype
        entropy_n, row_max_n, sum_exp_n = (each_N[at] for each_N in into[1:])
        labels_NK = self.own_labels.labels_NK
        assert labels_NK is not None
        n, k = labels_NK[at].shape
        sums = x_NV.new_zeros((2 + k, n), dtype=dtype)
        if shard.words:
            unused_N = torch.empty_like(into.entropy_N)
            own = into._replace(logprob_N=unused_N)
            self.kernels.token_logprobs(x_NV, self.own, at, own, weight_N)
            sums[2:] = label_logits(x_NV, self.own_labels, at, dtype).T
        else:
            for each_n in (entropy_n, row_max_n, sum_exp_n):
                each_n.zero_()
        # A rank whose words are all masked has no maximum, and a row may have none on any rank.
        masked_n = sum_exp_n == 0
        top_n = shard.max(row_max_n.masked_fill(masked_n, -float("inf")))
        top_n.masked_fill_(top_n == -float("inf"), 0.0)
        tau = rows.temperature
        tau = tau[at] if isinstance(tau, Tensor) and tau.ndim else tau
        below_n = ((row_max_n - top_n) / tau).masked_fill(masked_n, 0.0).clamp(min=FLOOR)
        scale_n = below_n.exp() * sum_exp_n
        sums[0] = scale_n
        log_n = sum_exp_n.masked_fill(masked_n, 1.0).log()
        sums[1] = scale_n * (log_n - entropy_n + below_n)
        shard.sum(sums)
        dead_n = ~self.live_N[at] if weight_N is None else ~(self.live_N[at] & (weight_N[at] != 0))
        safe_n = sums[0].masked_fill(sums[0] == 0, 1.0)
        entropy_n.copy_((safe_n.log() - sums[1] / safe_n).masked_fill(dead_n, 0.0))
        row_max_n.copy_(top_n.masked_fill(dead_n, 0.0))
        sum_exp_n.copy_(sums[0].masked_fill(dead_n, 0.0))
        logprob_nk = logprobs_of(sums[2:].T, self.labels, at, into, shard.vocab)
        logprob_nk = logprob_nk.masked_fill(dead_n[:, None], 0.0)
        into.logprob_N[at] = logprob_nk if rows.labels_NK is not None else logprob_nk[:, 0]

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
        """Write the gradient of the rank's logits of the rows `at` into `out_NV`."""
        if not self.shard.words:
            return
        if self.own.labels_NK is not None:
            backward_at(self.kernels, x_NV, out_NV, self.own, at, stats, g_N, h_N)
            return
        given = (self.own, at, stats, g_N, h_N, weight_N)
        self.kernels.token_logprobs_backward(x_NV, out_NV, *given)


@dataclass
class ShardedRows(LinearRows):
    """Chunks of a rank's own logits; the gradient of hidden states and of A is that of all ranks.

    It is added up in the statistics' dtype, also where hidden states have 16 bits.
    """

    shard: VocabShard = field(kw_only=True)

    def chunks(self) -> list[slice]:
        """Consecutive tokens whose logits fit the budget on every rank."""
        return chunk_slices(
            self.hidden_ND.shape[0],
            self.shard.largest,
            self.logits_dtype,
            self.hidden_ND.device,
            self.chunk_bytes,
            trained=self.wanted[WEIGHT],
        )

    def to_hidden(self, dx_NV: Tensor, into_ND: Tensor, d_low_NR: Tensor | None = None) -> None:
        """The gradient of the hidden states from that of some logits: a reduction of (n, D)."""
        reduce = self.shard.reduce_hidden_grad
        same = not reduce or into_ND.dtype == self.dtype
        part_ND = into_ND if same else torch.empty_like(into_ND, dtype=self.dtype)
        if self.shard.words:
            super().to_hidden(dx_NV, part_ND, d_low_NR)
        else:
            part_ND.zero_()
        if reduce:
            self.shard.sum(part_ND)
        if not same:
            into_ND.copy_(part_ND)

    def results(self) -> HeadGradients:
        """The gradients in their inputs' dtypes; A's, which every rank has, is added up."""
        d_a = self.grads[_LORA_A]
        if d_a is not None:
            self.shard.sum(d_a)
        return super().results()
