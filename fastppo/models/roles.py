"""What each role runs on (a model, an adapter, a head), and how to switch between roles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.errors import UserError
from fastppo.models.load import causal_lm, logit_scale, trunk
from fastppo.models.lora import fuse_lora_layers
from fastppo.models.native_layers import fuse_native_layers
from fastppo.models.rounding import LIMITS, Precision, product_precision
from fastppo.ops import token_logprobs
from fastppo.types import Sequences

if TYPE_CHECKING:
    from fastppo.models.shared_layers import SharedLayers
    from fastppo.models.shared_prompts import SharedPrompts
    from fastppo.models.shared_states import StatesOfBatch
    from fastppo.run.sharding import Sharding

Role = Literal["actor", "reference", "reward", "critic"]
SomeSequences = TypeVar("SomeSequences", bound=Sequences)


@dataclass(frozen=True)
class Place:
    """What a role runs on, and which of its parameters train."""

    model: nn.Module
    adapter: str | None  # the active one; None: the model has no adapters, or they are off
    words: str  # description, for the first lines of a run
    trainable: tuple[nn.Parameter, ...] = ()

    @cached_property
    def base(self) -> PreTrainedModel:
        """The causal language model, inside its PEFT wrapper if it has one."""
        return causal_lm(self.model)

    @cached_property
    def trunk(self) -> nn.Module:
        """The base without its output head."""
        return trunk(self.base)

    @cached_property
    def logit_scale(self) -> float:
        """What the base multiplies its logits by."""
        return logit_scale(self.base)


class LMHead(NamedTuple):
    """The output head: logits = softcap(scale (hidden W^T + b)), scale being `logit_scale`."""

    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None
    scale: float = 1.0


@dataclass
class Roles:
    """The places of all roles, and their heads; `use(role)` switches between roles.

    `places` has actor and reference, the critic if there is one, and every reward that is an
    adapter on the base.
    """

    places: dict[str, Place]
    reward_heads: dict[str, nn.Linear]  # by the reward's role, as in places
    critic_head: nn.Linear | None  # None if there is no critic
    device: torch.device
    autocast: torch.dtype | None  # of the base and of products; None: float32
    notes: list[str] = field(default_factory=list)  # for the first lines of a run
    shared: SharedLayers | None = None  # the lowest layers, if they run once per rollout
    sharding: Sharding | None = None  # of the base over the processes of a run (fsdp)

    def __post_init__(self) -> None:
        # PEFT changes requires_grad when it switches adapters; _switch restores it from this set.
        self._trainable = {p for place in self.places.values() for p in place.trainable}
        self._adapters: dict[nn.Module, str | None] = {}  # the one that is on in each model
        self._caches: dict[nn.Module, Any] = {}  # by base: see one_token_cache
        for model in self.models:
            fuse_lora_layers(model)
            fuse_native_layers(model)
        if self.critic_head is not None:
            self.critic_head.requires_grad_(True)
            self._trainable |= set(self.critic_head.parameters())  # a classifier's has it inside
        for head in self.reward_heads.values():
            head.requires_grad_(False)
        for role in self.places:
            self._activate(role)
        self._activate("actor")

    @property
    def model(self) -> nn.Module:
        """The actor's model: a PEFT model, or the base if `finetuning_type` is freeze or full."""
        return self.places["actor"].model

    @property
    def models(self) -> set[nn.Module]:
        """The models that the roles run on; several roles may share one."""
        return {place.model for place in self.places.values()}

    @property
    def has_critic(self) -> bool:
        """Whether there is a critic; some advantage estimators need none."""
        return self.critic_head is not None

    @property
    def shares_trunk(self) -> bool:
        """Whether the critic is a head on the actor's trunk."""
        actor, critic = self.places["actor"], self.places.get("critic")
        return critic is not None and (actor.model, actor.adapter) == (critic.model, critic.adapter)

    @contextmanager
    def use(self, role: Role | str) -> Iterator[None]:
        """Inside the block `role` is active; afterwards the previous role is active again.

        `requires_grad` of all parameters stays as it was. The backward of a forward inside the
        block must also run inside it, because checkpointed layers are recomputed with the adapter
        that is active during the backward.
        """
        previous = self._active
        self._activate(role)
        try:
            yield
        finally:
            self._activate(previous)

    def _activate(self, role: str) -> None:
        place = self.places[role]
        # PEFT walks over all modules to switch: not for an adapter that is on already.
        if place.model not in self._adapters or self._adapters[place.model] != place.adapter:
            self._switch(place)
        self._active = role

    def _switch(self, place: Place) -> None:
        self._adapters.pop(place.model, None)  # unknown, if a signal interrupts the switch
        if isinstance(place.model, PeftModel):
            if place.adapter is None:
                place.model.base_model.disable_adapter_layers()
            else:
                place.model.base_model.enable_adapter_layers()
                place.model.set_adapter(place.adapter)
        for parameter in place.model.parameters():
            parameter.requires_grad_(parameter in self._trainable)
        self._adapters[place.model] = place.adapter

    def train(self) -> None:
        """Set models with trainable parameters to training mode: activations are checkpointed."""
        for model in {place.model for place in self.places.values() if place.trainable}:
            model.train()

    def eval(self) -> None:
        """Set all models to evaluation mode: no checkpointing, so generation can use a KV cache."""
        for model in self.models:
            model.eval()

    def hidden(
        self,
        input_ids_BT: Tensor,
        mask_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        states: StatesOfBatch | None = None,
        prompts: SharedPrompts | None = None,
    ) -> Tensor:
        """Last hidden states (B, T, D) of the active role; no logits are computed.

        Args:
            input_ids_BT: int64, right-padded rows.
            mask_BT: 1 at live tokens; None if no live token attends to padding.
            positions_BT: positions in packed rows; they start at 0 with each sequence.
            states: kept hidden states of these tokens, behind the layers that roles share: the pass
                starts from them or, if it is the first one, keeps them.
            prompts: the rows' prompts, if those that rows share are run once.
        """
        sharing = None
        if self.shared is not None and states is not None:
            sharing = self.shared.context(self._active, states, input_ids_BT, prompts)
        if prompts is not None:
            input_ids_BT, mask_BT = prompts.once(input_ids_BT), prompts.mask()
            positions_BT = prompts.position_GS
        given = {} if positions_BT is None else {"position_ids": positions_BT}
        with self.precision(), sharing or nullcontext():
            hidden_BTD: Tensor = self.trunk(
                input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False, **given
            ).last_hidden_state
        return hidden_BTD if prompts is None else prompts.each(hidden_BTD)

    def with_states(self, sequences: SomeSequences) -> SomeSequences:
        """The same sequences with room for the states behind the layers that roles share."""
        if self.shared is None:
            return sequences
        return replace(sequences, states=self.shared.new_states(sequences.lengths))

    @property
    def product_precision(self) -> Precision:
        """The precision of the actor's matrix products under PyTorch's present flags."""
        return product_precision(self.device, autocast=self.autocast)

    def precision(self) -> Any:
        """Context in which forwards run: autocast to the base's 16 bits, or none in float32."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    @property
    def place(self) -> Place:
        """What the active role runs on."""
        return self.places[self._active]

    @property
    def base(self) -> PreTrainedModel:
        """The causal language model of the active role, inside its PEFT wrapper."""
        return self.places[self._active].base

    @property
    def trunk(self) -> nn.Module:
        """The active role's base without its output head."""
        return self.places[self._active].trunk

    @torch.no_grad()
    def one_token_cache(self) -> Any:
        """The active base's own KV cache after a forward of one token; None if it has none.

        It shows what a model caches, because the keys of config.json that say so differ between
        families. Each base is run once, in evaluation mode.
        """
        base = self.base
        if base not in self._caches:
            embeddings: Any = base.get_input_embeddings()
            ids_BT = torch.zeros(1, 1, dtype=torch.long, device=embeddings.weight.device)
            with self.precision():
                out = self.trunk(input_ids=ids_BT, use_cache=True)
            self._caches[base] = getattr(out, "past_key_values", None)
        return self._caches[base]

    @property
    def lm_head(self) -> LMHead:
        """The active role's output head for the `linear_*` ops, in the dtype of its product.

        Its weight is looked up each time: an adapter may have a trainable copy of the head.
        """
        place = self.places[self._active]
        head: Any = place.base.get_output_embeddings()
        weight_VD, bias_V = head.weight, getattr(head, "bias", None)
        if self.autocast is not None:
            weight_VD = weight_VD.to(self.autocast)
            bias_V = None if bias_V is None else bias_V.to(self.autocast)
        softcap = getattr(place.base.config.get_text_config(), "final_logit_softcapping", None)
        return LMHead(weight_VD, bias_V, softcap, place.logit_scale)

    def value(self, hidden_ND: Tensor) -> Tensor:
        """The critic's values (N,) of hidden states, computed in the head's dtype, float32."""
        assert self.critic_head is not None
        return self.critic_head(hidden_ND.to(self.critic_head.weight.dtype)).squeeze(-1)

    def trainable_parameters(self, role: Role | str) -> list[nn.Parameter]:
        """The parameters that `role` trains; a critic on the actor's trunk trains only its head."""
        parameters = [] if role not in self.places else list(self.places[role].trainable)
        if role == "critic" and self.critic_head is not None:
            if self.shares_trunk:
                parameters = []
            parameters += self.critic_head.parameters()
        return parameters

    def table(self, reward: str) -> list[tuple[str, str, int]]:
        """A row for each role: name, description and number of trainable parameters.

        `reward` is the description of the rewards, because some of them have no place here.
        """
        words = {role: place.words for role, place in self.places.items()}
        words = {"critic": "none", **words, "reward": reward}
        return [
            (role, words[role], sum(p.numel() for p in self.trainable_parameters(role)))
            for role in ("actor", "reference", "reward", "critic")
        ]

    @torch.no_grad()
    def check_head(self, input_ids_T: list[int]) -> None:
        """Raise UserError if a model's logits are not `lm_head` applied to its hidden states."""
        ids = torch.tensor([input_ids_T[:16]], device=self.device)
        for role in ("actor", "reference"):
            with self.use(role):
                error = self._head_error(ids)
                kind = self.base.config.model_type
            if self.autocast == torch.float16 and not math.isfinite(error):
                raise UserError(
                    f"fp16: the hidden states of this model ({kind}) overflow float16, which ends "
                    "at 65504; use bf16: true, or leave both out"
                )
            if not error < LIMITS[self.product_precision].head:
                raise UserError(
                    f"model {kind}: its logits are not head(hidden) (log-prob off by {error:.3g}); "
                    "this architecture is not supported"
                )

    def _head_error(self, ids_BT: Tensor) -> float:
        """Absolute difference of one log-prob by `lm_head` and by the active model's own logits."""
        hidden = self.hidden(ids_BT, torch.ones_like(ids_BT))[0, -1:]
        with self.precision():
            logits = self.base(input_ids=ids_BT, use_cache=False).logits[0, -1:].float()
        head = self.lm_head
        token = logits.argmax(-1)
        by_head = nn.functional.linear(hidden.to(head.weight_VD.dtype), head.weight_VD, head.bias_V)
        head_logprob = token_logprobs(
            by_head.float(), token, softcap=head.softcap, logit_scale=head.scale
        ).logprob_N
        return (head_logprob - token_logprobs(logits, token).logprob_N).abs().item()
