"""Where each role runs (a model, an adapter, a head), and the one way to switch between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from fastppo.errors import UserError
from fastppo.models.fused_lora import fuse_lora_layers
from fastppo.models.load import LMHead, causal_lm, lm_head, trunk
from fastppo.models.rounding import LIMITS, Precision, product_precision
from fastppo.ops import token_logprobs

Role = Literal["actor", "reference", "reward", "critic"]


@dataclass(frozen=True)
class Place:
    """Where a role runs: a model, the adapter that is on (None: none), and what of it trains."""

    model: nn.Module
    adapter: str | None
    words: str
    trainable: tuple[nn.Parameter, ...] = ()


@dataclass
class Roles:
    """The places of all roles, and their heads. `use(role)` is the only way to switch between them.

    `places` has actor and reference, critic where there is one, and each reward that is an adapter.
    """

    places: dict[str, Place]
    reward_heads: dict[str, nn.Linear]  # by the role of the reward that each belongs to
    critic_head: nn.Linear | None  # None: advantages without a critic
    device: torch.device
    autocast: bool
    notes: list[str] = field(default_factory=list)  # what the first lines of a run should say

    def __post_init__(self) -> None:
        # PEFT's own switches set requires_grad on adapters as they go; this is what stays true.
        self._trainable = {p for place in self.places.values() for p in place.trainable}
        for place in self.places.values():
            fuse_lora_layers(place.model)
        if self.critic_head is not None:
            self.critic_head.requires_grad_(True)
        for head in self.reward_heads.values():
            head.requires_grad_(False)
        for role in self.places:
            self._activate(role)
        self._activate("actor")

    @property
    def model(self) -> nn.Module:
        """The actor's model: PEFT's, or with `finetuning_type: freeze` and `full` the base."""
        return self.places["actor"].model

    @property
    def has_critic(self) -> bool:
        """Whether there is a critic at all."""
        return self.critic_head is not None

    @property
    def shares_trunk(self) -> bool:
        """Whether the critic is a head on the actor's trunk."""
        actor, critic = self.places["actor"], self.places.get("critic")
        return critic is not None and (actor.model, actor.adapter) == (critic.model, critic.adapter)

    @contextmanager
    def use(self, role: Role | str) -> Iterator[None]:
        """Run as `role` inside the block; every role trains after it as it did before.

        Backward passes of what ran inside belong inside too: checkpointed layers are recomputed
        with whatever adapter is active in the backward.
        """
        previous = self._active
        self._activate(role)
        try:
            yield
        finally:
            self._activate(previous)

    def _activate(self, role: str) -> None:
        place = self.places[role]
        if isinstance(place.model, PeftModel):
            if place.adapter is None:
                place.model.base_model.disable_adapter_layers()
            else:
                place.model.base_model.enable_adapter_layers()
                place.model.set_adapter(place.adapter)
        for parameter in place.model.parameters():
            parameter.requires_grad_(parameter in self._trainable)
        self._active = role

    def train(self) -> None:
        """Training mode for the models that train: their layers are checkpointed in it."""
        for place in self.places.values():
            if place.trainable:
                place.model.train()

    def eval(self) -> None:
        """Evaluation mode for all: sampling keeps its KV cache, scoring recomputes nothing."""
        for place in self.places.values():
            place.model.eval()

    def hidden(
        self,
        input_ids_BT: Tensor,
        mask_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        """The last hidden states (B, T, D) of the active role; right-padded rows, no logits.

        With positions that begin anew within a row, that row holds several sequences.
        """
        packed = {} if positions_BT is None else {"position_ids": positions_BT}
        with self.precision():
            return self.trunk(
                input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False, **packed
            ).last_hidden_state

    @property
    def product_precision(self) -> Precision:
        """How the actor's products are rounded, as PyTorch's flags are now."""
        base = causal_lm(self.places["actor"].model)
        return product_precision(self.device, base, autocast=self.autocast)

    def precision(self) -> Any:
        """Autocast where the base is bf16: what trains is float32, GEMMs should not be."""
        if not self.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @property
    def base(self) -> nn.Module:
        """The causal language model of the active role, inside its PEFT wrapper."""
        return causal_lm(self.places[self._active].model)

    @property
    def trunk(self) -> nn.Module:
        """The active role's base without its output head."""
        return trunk(self.base)

    @property
    def lm_head(self) -> LMHead:
        """The active role's output head, for the `linear_*` ops, in the dtype of its GEMM."""
        return lm_head(self.base, torch.bfloat16 if self.autocast else None)

    def value(self, hidden_ND: Tensor) -> Tensor:
        """The critic's V (N,), in the head's float32 whatever the trunk computes in."""
        assert self.critic_head is not None
        return self.critic_head(hidden_ND.to(self.critic_head.weight.dtype)).squeeze(-1)

    def trained_parameters(self, role: Role | str) -> list[nn.Parameter]:
        """What an optimiser of `role` holds; with a shared trunk the critic has only its head."""
        own = [] if role not in self.places else list(self.places[role].trainable)
        if role == "critic" and self.critic_head is not None:
            own = [*([] if self.shares_trunk else own), *self.critic_head.parameters()]
        return own

    def table(self, reward: str) -> list[tuple[str, str, int]]:
        """Role, weights in words, trainable count: what the first lines of a run print.

        `reward` is what gives the score: not all of that has a place here.
        """
        words = {role: place.words for role, place in self.places.items()}
        words = {"critic": "none", **words, "reward": reward}
        return [
            (role, words[role], sum(p.numel() for p in self.trained_parameters(role)))
            for role in ("actor", "reference", "reward", "critic")
        ]

    @torch.no_grad()
    def check_head(self, input_ids_T: list[int]) -> None:
        """Refuse an architecture that does more between trunk and logits than `lm_head` knows."""
        ids = torch.tensor([input_ids_T[:16]], device=self.device)
        for role in ("actor", "reference"):
            with self.use(role):
                error = self._head_error(ids)
                kind = self.base.config.model_type
            if not error < LIMITS[self.product_precision].head:
                raise UserError(
                    f"model {kind}: its logits are not head(hidden) (log-prob off by {error:.3g}); "
                    "this architecture is not supported"
                )

    def _head_error(self, ids_BT: Tensor) -> float:
        """How far the active role's `lm_head` is from its own logits, as a log-prob."""
        hidden = self.hidden(ids_BT, torch.ones_like(ids_BT))[0, -1:]
        with self.precision():
            logits = self.base(input_ids=ids_BT, use_cache=False).logits[0, -1:].float()
        head = self.lm_head
        token = logits.argmax(-1)
        mine = nn.functional.linear(hidden.to(head.weight_VD.dtype), head.weight_VD, head.bias_V)
        mine_logprob = token_logprobs(mine.float(), token, softcap=head.softcap).logprob_N
        return (mine_logprob - token_logprobs(logits, token).logprob_N).abs().item()
