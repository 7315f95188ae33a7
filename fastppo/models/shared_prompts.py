"""A prompt that several responses share, run once in a pass over a micro-batch.

The rows of one prompt become one row: the prompt, then its responses one after another. Positions
go on from the prompt's in each response, and a mask lets a response see the prompt and itself.
Behind the model the hidden states are copied back to the rows that a micro-batch has without it,
so everything else computes as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PADDING = -1  # in `part_GS`


@dataclass(frozen=True)
class SharedPrompts:
    """How B rows of T tokens and G rows of S tokens, whose prompts are there once, belong together.

    Attributes:
        shape: (B, T).
        take_M: for each of the G * S tokens its index among the B * T; of a prompt in its first
            row. Padding takes the first token of its row.
        back_M: for each of the B * T tokens its index among the G * S; for padding that of the
            row's last token.
        position_GS: position in the sequence.
        part_GS: 0 for the prompt, from 1 the response's number in its row, PADDING.
        repeats: the prompts of a group's second row, third row and so on: the index of each token
            among the B * T, and among the G * S.
    """

    shape: tuple[int, int]
    take_M: Tensor
    back_M: Tensor
    position_GS: Tensor
    part_GS: Tensor
    repeats: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(
        cls,
        numbers: Sequence[int],
        prompts: Sequence[int],
        lengths: Sequence[int],
        device: torch.device,
    ) -> SharedPrompts:
        """Of a padded micro-batch whose rows have these prompts, by number.

        Args:
            prompts: the number of tokens in each row's prompt.
            lengths: the number of tokens in each row.
        """
        groups: dict[int, list[int]] = {}
        for row, number in enumerate(numbers):
            groups.setdefault(number, []).append(row)
        width, length = max(lengths), max(grouped_lengths(groups.values(), prompts, lengths))
        take, position, part, back = [], [], [], [torch.empty(0)] * len(lengths)
        repeats: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(most(groups) - 1)]
        for g, rows in enumerate(groups.values()):
            prompt, first, at = prompts[rows[0]], rows[0] * width, g * length
            pieces = [(first, 0, prompt, 0)]  # first index, positions from and to, number
            pieces += [(row * width, prompt, lengths[row], i) for i, row in enumerate(rows, 1)]
            size = prompt
            for i, row in enumerate(rows):
                response = lengths[row] - prompt
                own = torch.cat([torch.arange(prompt), torch.arange(size, size + response)])
                padding = own[-1:].expand(width - lengths[row])
                back[row] = at + torch.cat([own, padding])
                size += response
                if i:
                    tokens = torch.arange(prompt)
                    repeats[i - 1].append((row * width + tokens, at + tokens))
            rest = length - size
            take += [torch.arange(begin + a, begin + b) for begin, a, b, _ in pieces]
            take.append(torch.full((rest,), first))
            position += [torch.arange(a, b) for _, a, b, _ in pieces]
            position.append(torch.zeros(rest, dtype=torch.long))
            part += [torch.full((b - a,), number) for _, a, b, number in pieces]
            part.append(torch.full((rest,), PADDING))

        def moved(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat(list(parts)).to(device, non_blocking=True)

        return cls(
            shape=(len(lengths), width),
            take_M=moved(take),
            back_M=moved(back),
            position_GS=moved(position).view(len(groups), length),
            part_GS=moved(part).view(len(groups), length),
            repeats=tuple((moved([s for s, _ in k]), moved([t for _, t in k])) for k in repeats),
        )

    def once(self, x_BT: Tensor) -> Tensor:
        """The rows (G, S, ...) of a tensor (B, T, ...) with each prompt once; no gradient."""
        return x_BT.flatten(0, 1).index_select(0, self.take_M).unflatten(0, self.part_GS.shape)

    def each(self, x_GSD: Tensor) -> Tensor:
        """The rows (B, T, D) of hidden states (G, S, D), the prompt's in each; differentiable."""
        found: Tensor = Each.apply(x_GSD, self)  # type: ignore[no-untyped-call]
        return found

    def mask(self) -> Tensor:
        """Which token (dimension 2) sees which (3): bool (G, 1, S, S)."""
        query, key = self.part_GS[:, :, None], self.part_GS[:, None, :]
        size = self.part_GS.shape[1]
        earlier = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
        return (((key == 0) | (key == query)) & earlier)[:, None]


class Each(torch.autograd.Function):
    """`SharedPrompts.each`. Its gradient has no two sums into one place at a time, so it repeats.

    (index_select's own on a GPU adds by atomics, in an order of chance.)
    """

    @staticmethod
    def forward(ctx: Any, x_GSD: Tensor, prompts: SharedPrompts) -> Tensor:
        ctx.prompts = prompts
        return x_GSD.flatten(0, 1).index_select(0, prompts.back_M).unflatten(0, prompts.shape)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        prompts: SharedPrompts = ctx.prompts
        grad_MD = grad_BTD.flatten(0, 1)
        live_M1 = prompts.part_GS.flatten()[:, None] != PADDING
        own_MD = torch.where(live_M1, grad_MD.index_select(0, prompts.take_M), 0)
        for source, target in prompts.repeats:
            own_MD.index_add_(0, target, grad_MD.index_select(0, source))
        return own_MD.unflatten(0, prompts.part_GS.shape), None


def grouped_lengths(groups: Any, prompts: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Tokens of each group of rows with one prompt, which is counted once."""
    return [prompts[rows[0]] + sum(lengths[row] - prompts[row] for row in rows) for rows in groups]


def most(groups: dict[int, list[int]]) -> int:
    """Rows of the largest group."""
    return max(map(len, groups.values()))
