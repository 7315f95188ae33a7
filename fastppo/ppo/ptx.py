"""PTX: cross-entropy on human answers, added to PPO's loss to preserve the policy's language.

Source: Ouyang et al. 2022, arXiv 2203.02155, eq. 2 (its gamma is `ptx_coef`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.data import fit_prompt
from fastppo.models.batch import Batch, make_batch, shuffled_batch
from fastppo.ops import linear_token_logprobs
from fastppo.seeds import seed_of
from fastppo.types import Sequences

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.data import Record
    from fastppo.models.build import Roles
    from fastppo.templates import Template


@dataclass(frozen=True)
class Demonstrations:
    """Prompts with human answers (not sampled ones), as an endless seeded stream."""

    pairs: list[tuple[list[int], list[int]]]  # prompt ids, answer ids with their EOS
    batch_size: int
    pad_id: int
    seed: int

    @classmethod
    def of(cls, records: list[Record], template: Template, config: Config) -> Demonstrations | None:
        """Encode the records of `ptx_dataset`; None if there are none."""
        if not records:
            return None
        pairs = []
        for record in records:
            # As with pairs, a prompt gets half of cutoff_len, and a truncated answer keeps its EOS.
            prompt = fit_prompt(
                record, template, max(config.cutoff_len // 2, 1), config.default_system
            )
            answer = template.encode_response(record.response or "")
            room = config.cutoff_len - len(prompt) - 1
            pairs.append((prompt, answer[:-1][:room] + answer[-1:]))
        size = config.per_device_train_batch_size
        return cls(pairs, size, template.pad_id, seed_of(config.seed, "ptx"))

    def stream(self, first: int, device: torch.device) -> Iterator[Batch]:
        """Micro-batches from optimiser step `first` on; after a resume they are the same."""
        for number in count(first):
            chosen = [
                self.pairs[i]
                for i in shuffled_batch(len(self.pairs), number, self.batch_size, seed=self.seed)
            ]
            width = max(len(prompt) + len(answer) for prompt, answer in chosen)
            rows = [prompt + answer for prompt, answer in chosen]
            padded = [row + [self.pad_id] * (width - len(row)) for row in rows]
            sequences = Sequences(
                input_ids_BT=torch.tensor(padded).to(device, non_blocking=True),
                prompt_lengths=[len(prompt) for prompt, _ in chosen],
                response_lengths=[len(answer) for _, answer in chosen],
            )
            yield make_batch(sequences, range(len(chosen)))


def ptx_backward(
    roles: Roles, batch: Batch, coef: float, *, loss_scale: Tensor | None = None
) -> Tensor:
    """Add the gradient of coef * mean(-log-prob of the answers' tokens) to the actor's gradients.

    With fp16 it is `loss_scale` times as large, as the other gradients are.

    Returns:
        The mean without the coefficient, in nats, at temperature 1 (0-d, detached).
    """
    with roles.use("actor"):
        head = roles.lm_head
        hidden_ND = batch.packing.gather(roles.hidden(**batch.inputs))
        logprob_N = linear_token_logprobs(
            hidden_ND.to(head.weight_VD.dtype),
            head.weight_VD,
            batch.token_N,
            bias_V=head.bias_V,
            softcap=head.softcap,
            logit_scale=head.scale,
        ).logprob_N
        loss = -logprob_N.mean()
        factor = coef if loss_scale is None else coef * loss_scale
        (factor * loss).backward()  # type: ignore[no-untyped-call]
    return loss.detach()
