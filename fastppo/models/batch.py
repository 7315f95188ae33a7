"""Mini-batches of a rollout, and their micro-batches: rows, input ids, masks and indices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fastppo.errors import UserError
from fastppo.memory.budgets import Budget, PromptSharing
from fastppo.models.shared_prompts import SharedPrompts
from fastppo.ops import Packing
from fastppo.seeds import seed_of
from fastppo.types import Experience, Sequences

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.models.build import Roles
    from fastppo.models.shared_states import StatesOfBatch

TensorOrPacking = TypeVar("TensorOrPacking", Tensor, Packing)
# A forward pass has a fixed cost for reading the weights, about as much as this many tokens cost.
PASS_TOKENS = 64


def to_device(x: TensorOrPacking, device: torch.device) -> TensorOrPacking:
    """Copy `x` to `device` without waiting for the kernels queued there."""
    if isinstance(x, Packing):
        index_N, offsets = to_device(x.index_N, device), to_device(x.offsets, device)
        return Packing(index_N, offsets, x.shape)
    return x.to(device, non_blocking=True)


def partition(
    lengths: Sequence[int],
    rows: Sequence[int],
    budget: Budget,
    prompts: Sequence[tuple[int, int]] | None = None,
) -> list[list[int]]:
    """Split `rows` into micro-batches within the budget; returns the rows of each.

    Rows are sorted by length (`lengths[row]` tokens) and split so that the total cost is lowest:
    the tokens with padding, plus PASS_TOKENS for each micro-batch. The result does not depend on
    the order of `rows`, so scoring and update run the same micro-batches for the same rows.

    With `prompts` (number and tokens of each row's prompt) the rows of a prompt stay together, and
    a prompt that is run once costs its tokens once.
    """
    ordered = sorted(rows, key=lambda row: (lengths[row], row))
    if prompts is not None:
        longest_of: dict[int, int] = {}
        for row in ordered:  # ascending: the last is the longest
            longest_of[prompts[row][0]] = lengths[row]
        ordered.sort(key=lambda row: (longest_of[prompts[row][0]], prompts[row][0]))
    before = [0, *accumulate(lengths[row] for row in ordered)]
    most_rows = math.inf if budget.rows is None else budget.rows
    most_tokens = math.inf if budget.tokens is None else budget.tokens
    costs, cuts = [0], [0]
    for stop in range(1, len(ordered) + 1):
        longest, best, together = 0, (0, 0), PromptsTogether()
        for start in range(stop - 1, -1, -1):
            count, row = stop - start, ordered[start]
            longest = max(longest, lengths[row])
            tokens = before[stop] - before[start] if budget.packed else count * longest
            if count > 1 and (count > most_rows or tokens > most_tokens):
                break
            if prompts is not None and budget.prompts is not None:
                once = together.add(*prompts[row], lengths[row])
                if budget.prompts.pays((count, longest), once):
                    tokens = math.prod(once)
            cost = costs[start] + tokens + PASS_TOKENS
            if count == 1 or cost <= best[0]:
                best = (cost, start)
        costs.append(best[0])
        cuts.append(best[1])
    found: list[list[int]] = []
    stop = len(ordered)
    while stop:
        found.append(ordered[cuts[stop] : stop])
        stop = cuts[stop]
    return found[::-1]


@dataclass
class PromptsTogether:
    """Rows, in the order of their prompts, with each prompt once: number of rows, and tokens."""

    number: int | None = None
    groups: int = 0
    size: int = 0
    largest: int = 0

    def add(self, number: int, prompt: int, length: int) -> tuple[int, int]:
        """With one more row; returns rows and tokens of the longest."""
        if number == self.number:
            self.size += length - prompt
        else:
            self.number, self.groups, self.size = number, self.groups + 1, length
        self.largest = max(self.largest, self.size)
        return self.groups, self.largest


def prompts_of(sequences: Sequences, budget: Budget) -> list[tuple[int, int]] | None:
    """Number and tokens of each row's prompt, if prompts that rows share may be run once."""
    numbers = sequences.prompt_numbers
    if budget.prompts is None or budget.packed or numbers is None:
        return None
    return list(zip(numbers, sequences.prompt_lengths, strict=True))


def padded_tokens(sequences: Sequences, rows: Sequence[int], budget: Budget) -> int:
    """Number of tokens of a micro-batch of `rows`, padding included."""
    lengths = [sequences.lengths[row] for row in rows]
    return sum(lengths) if budget.packed else len(lengths) * max(lengths)


def largest_micro_batch(
    sequences: Sequences, budget: Budget, rows: Sequence[int] | None = None
) -> int:
    """Number of tokens, padding included, of the largest micro-batch of `rows`; None is all."""
    rows = range(len(sequences.lengths)) if rows is None else rows
    made = partition(sequences.lengths, rows, budget, prompts_of(sequences, budget))
    return max(padded_tokens(sequences, part, budget) for part in made)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: one sequence per row, padded on the right; or all sequences packed in one row.

    In a packed row the positions start at 0 with each sequence; in a padded batch `positions_BT` is
    None. `packing` selects the states that predict the response tokens: token t + 1 was sampled
    from the state at position t.
    """

    rows: list[int]
    input_ids_BT: Tensor
    mask_BT: Tensor
    positions_BT: Tensor | None
    packing: Packing
    token_N: Tensor  # the response tokens
    last_B: Tensor  # index of each sequence's last live token among all B * T
    states: StatesOfBatch | None = None  # behind the layers that roles share
    prompts: SharedPrompts | None = None  # if prompts that rows share are run once

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of `Roles.hidden`.

        They have no mask, because attention without a mask is faster and none is needed: padding is
        on the right, where causal attention does not look, and for a packed row transformers
        derives the mask from the positions.
        """
        given = {
            "positions_BT": self.positions_BT,
            "states": self.states,
            "prompts": self.prompts,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return {"input_ids_BT": self.input_ids_BT, **given}

    def last(self, x_BT: Tensor) -> Tensor:
        """The entries (B, ...) of a (B, T, ...) tensor at each sequence's last live token."""
        return x_BT.flatten(0, 1).index_select(0, self.last_B)


def make_batch(
    sequences: Sequences,
    rows: Sequence[int],
    *,
    packed: bool = False,
    sharing: PromptSharing | None = None,
) -> Batch:
    """A micro-batch of `rows`, padded to the longest of them or packed into one row.

    With `sharing`, prompts that rows share are run once where that pays.

    Rows are sorted, so that scoring and update compute the same bits for the same rows. All indices
    are made on the host, where the lengths are known, and copied to the device without waiting.
    """
    rows = sorted(rows)
    ids_BT = sequences.input_ids_BT
    device, stride = ids_BT.device, ids_BT.shape[1]
    prompts = [sequences.prompt_lengths[row] for row in rows]
    lengths = [p + sequences.response_lengths[row] for p, row in zip(prompts, rows, strict=True)]
    width = sum(lengths) if packed else max(lengths)
    begins = [0, *accumulate(lengths)][:-1] if packed else [i * width for i in range(len(rows))]
    states, tokens, offsets = [], [], [0]
    for row, begin, prompt, length in zip(rows, begins, prompts, lengths, strict=True):
        states.append(torch.arange(begin + prompt - 1, begin + length - 1))
        tokens.append(torch.arange(row * stride + prompt, row * stride + length))
        offsets.append(offsets[-1] + length - prompt)
    flat = ids_BT.flatten()
    positions_BT = None
    if packed:
        live = [
            torch.arange(r * stride, r * stride + n) for r, n in zip(rows, lengths, strict=True)
        ]
        input_ids_BT = flat[to_device(torch.cat(live), device)][None]
        mask_BT = torch.ones(1, width, dtype=torch.long)
        positions_BT = to_device(torch.cat([torch.arange(n) for n in lengths])[None], device)
    else:
        input_ids_BT = ids_BT[to_device(torch.tensor(rows), device), :width]
        mask_BT = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    shape = (1 if packed else len(rows), width)
    packing = Packing(torch.cat(states), torch.tensor(offsets, dtype=torch.int32), shape)
    last_B = torch.tensor([begin + n - 1 for begin, n in zip(begins, lengths, strict=True)])
    kept = sequences.states
    return Batch(
        rows=rows,
        input_ids_BT=input_ids_BT,
        mask_BT=to_device(mask_BT, device),
        positions_BT=positions_BT,
        packing=to_device(packing, device),
        token_N=flat[to_device(torch.cat(tokens), device)],
        last_B=to_device(last_B, device),
        states=None if kept is None else kept.part(rows, lengths, begins, math.prod(shape)),
        prompts=None if packed else shared_prompts(sequences, rows, lengths, sharing),
    )


def shared_prompts(
    sequences: Sequences, rows: list[int], lengths: list[int], sharing: PromptSharing | None
) -> SharedPrompts | None:
    """The prompts that `rows`, of these lengths, share, if running them once pays."""
    if sharing is None or sequences.prompt_numbers is None:
        return None
    numbers = [sequences.prompt_numbers[row] for row in rows]
    prompts = [sequences.prompt_lengths[row] for row in rows]
    together, once = PromptsTogether(), (0, 0)
    for number, prompt, length in zip(numbers, prompts, lengths, strict=True):
        once = together.add(number, prompt, length)
    if len(set(numbers)) == len(rows) or not sharing.pays((len(rows), max(lengths)), once):
        return None
    return SharedPrompts.of(numbers, prompts, lengths, sequences.input_ids_BT.device)


def batches(sequences: Sequences, rows: Sequence[int], budget: Budget) -> list[Batch]:
    """The micro-batches of `rows`, split by `partition`."""
    parts = partition(sequences.lengths, rows, budget, prompts_of(sequences, budget))
    return [
        make_batch(sequences, part, packed=budget.packed, sharing=budget.prompts) for part in parts
    ]


@dataclass(frozen=True)
class Order:
    """Reorders results of micro-batches (one per row or per token) to the order of the rollout."""

    row_B: Tensor  # the rollout's row of each row of the micro-batches
    index_N: Tensor  # the rollout's token of each of their response tokens

    @classmethod
    def of(cls, sequences: Sequences, made: Sequence[Batch]) -> Order:
        """The order for `made`, micro-batches of `sequences` that together hold each row once."""
        rows, device = [row for batch in made for row in batch.rows], sequences.input_ids_BT.device
        index_N = token_index(sequences.response_lengths, rows)
        return cls(to_device(torch.tensor(rows), device), to_device(index_N, device))

    def rows(self, parts: Sequence[Tensor]) -> Tensor:
        """Results by row, as one tensor (B, ...) in the rollout's order."""
        joined = torch.cat(list(parts))
        return torch.empty_like(joined).index_copy(0, self.row_B, joined)

    def tokens(self, parts: Sequence[Tensor]) -> Tensor:
        """Results by response token, as one tensor (N, ...) in the rollout's order."""
        joined = torch.cat(list(parts))
        return torch.empty_like(joined).index_copy(0, self.index_N, joined)


@dataclass(frozen=True)
class MiniBatch:
    """The rows of one optimiser step, the loss weight of each row's tokens, and their number."""

    rows: list[int]
    weights: dict[int, float]
    tokens: int


def token_weights(
    lengths: Sequence[int], mode: str, max_new_tokens: int, /, *, left_out: int = 0
) -> list[float]:
    """Loss weight of each sequence's tokens in an optimiser step, by verl's `loss_agg_mode`.

    The weights depend on the whole optimiser step, so that splitting it into micro-batches changes
    only rounding. Means over sequences count the `left_out` ones as 0, as TRL's losses do.
    """
    n = len(lengths) + left_out
    return {
        "token-mean": lambda: [1 / sum(lengths)] * len(lengths),
        "seq-mean-token-mean": lambda: [1 / (n * length) for length in lengths],
        "seq-mean-token-sum": lambda: [1 / n] * len(lengths),
        "seq-mean-token-sum-norm": lambda: [1 / (n * max_new_tokens)] * len(lengths),
    }[mode]()


def mini_batches(experience: Experience, config: Config, seed: int) -> list[MiniBatch]:
    """One epoch's mini-batches: the rollout's rows, shuffled by `seed`, but those left out."""
    generator = torch.Generator().manual_seed(seed)
    lengths = experience.scored.rollout.response_lengths
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    minis = []
    for start in range(0, len(order), size):
        rows = [row for row in order[start : start + size] if row not in experience.left_out]
        if not rows:
            continue
        own, out = [lengths[row] for row in rows], len(order[start : start + size]) - len(rows)
        weights = token_weights(own, config.loss_agg_mode, config.max_new_tokens, left_out=out)
        minis.append(MiniBatch(rows, dict(zip(rows, weights, strict=True)), sum(own)))
    return minis


def token_index(response_lengths: Sequence[int], rows: Sequence[int]) -> Tensor:
    """Indices of the response tokens of `rows` among those of the rollout: int64, on the host.

    They are computed from the lengths, because reading the offsets would wait for the device.
    """
    bounds = [0, *accumulate(response_lengths)]
    return torch.cat([torch.arange(bounds[row], bounds[row + 1]) for row in rows])


def shuffled_batch(n: int, number: int, size: int, *, seed: int, shuffle: bool = True) -> list[int]:
    """The indices of batch `number` of a stream that reads range(n) epoch after epoch.

    Each epoch has another order; without `shuffle` every epoch is in ascending order. A batch has
    `size` indices and may span two epochs. The result depends only on the arguments, so a step has
    the same batch after a resume.
    """
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(number * size, (number + 1) * size):
        epoch, offset = divmod(position, n)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed_of(seed, "pass", epoch))
            shuffled = torch.randperm(n, generator=generator).tolist()
            orders[epoch] = shuffled if shuffle else list(range(n))
        chosen.append(orders[epoch][offset])
    return chosen


@torch.no_grad()
def check_packing(roles: Roles, input_ids_T: list[int]) -> None:
    """Raise UserError for `padding_free` if packed sequences of this model attend to each other.

    The same sequence is packed behind two different ones. Its hidden states must be the same bits
    both times, and be close to those of the sequence alone.
    """
    ids = input_ids_T[:8]
    n, other = len(ids), [*ids[1:], ids[0] + 1 if ids[0] == 0 else ids[0] - 1]
    ids_BT = torch.tensor([ids, other, ids], device=roles.device)
    sequences = Sequences(ids_BT, prompt_lengths=[1] * 3, response_lengths=[n - 1] * 3)
    for role in ("actor", "reference", "critic") if roles.has_critic else ("actor", "reference"):
        with roles.use(role):
            after_itself, after_another, alone = (
                roles.hidden(**make_batch(sequences, rows, packed=True).inputs)[0, -n:]
                for rows in ([0, 2], [1, 2], [2])
            )
            config = roles.base.config
        near = (after_itself - alone).abs().max() <= 0.02 * alone.abs().max()
        if not (near and torch.equal(after_itself, after_another)):
            raise UserError(
                f"padding_free: with {config._attn_implementation} attention this model "
                f"({config.model_type}) lets packed sequences see each other; leave it out"
            )
