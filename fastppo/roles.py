"""Four roles on one frozen base: which adapter and head a pass runs through, and what trains.

| role      | weights                                              | trains |
|-----------|------------------------------------------------------|--------|
| actor     | base + LoRA `default`                                | yes    |
| reference | base, adapters off                                   | no     |
| reward    | base + LoRA `reward` + head (`reward_2`, ... if more) | no     |
| critic    | base + LoRA `critic` + head, or a head on the actor  | yes    |
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from fastppo.errors import UserError
from fastppo.offload import ActivationOffload
from fastppo.offload_auto import wrap
from fastppo.offload_config import micro_batch_tokens, offload_mode
from fastppo.ops import token_logprobs
from fastppo.reward_spec import HEAD_FILES

if TYPE_CHECKING:
    from fastppo.config import Config

Role = Literal["actor", "reference", "reward", "critic"]
VALUE_HEAD_FILE = HEAD_FILES[0]
# What transformers, PEFT, safetensors and torch raise at files that are not what they should be.
LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    SafetensorError,
    UnpicklingError,
)


def first_line(error: Exception) -> str:
    """Libraries explain at length; the first line says what."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class LMHead(NamedTuple):
    """What stands between the last hidden state and the logits."""

    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None


def load_tokenizer(config: Config) -> Any:
    """The tokenizer of `model_name_or_path`."""
    return AutoTokenizer.from_pretrained(
        config.model_name_or_path,
        revision=config.model_revision,
        cache_dir=config.cache_dir,
        trust_remote_code=config.trust_remote_code,
        **_gguf(config),
    )


def load_base(config: Config, device: torch.device) -> nn.Module:
    """The frozen base, in the dtype that the run computes in."""
    disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(
        config.model_name_or_path,
        revision=config.model_revision,
        cache_dir=config.cache_dir,
        trust_remote_code=config.trust_remote_code,
        dtype=torch.bfloat16 if config.bf16 else torch.float32,
        attn_implementation=attention(config.flash_attn),
        **_gguf(config),
    )
    base.requires_grad_(False)
    base.config.use_cache = False
    silence_dropout(base)
    return base.to(device)


def _gguf(config: Config) -> dict[str, str]:
    return {"gguf_file": config.model_gguf_file} if config.model_gguf_file else {}


def attention(flash_attn: str) -> str:
    """transformers' name for LLaMA-Factory's `flash_attn`."""
    names = {"auto": "sdpa", "sdpa": "sdpa", "disabled": "eager", "fa2": "flash_attention_2"}
    return names[flash_attn]


def silence_dropout(model: nn.Module) -> None:
    """Dropout off in every pass: with it, log-probs before and after no update at all would differ.

    Modules and the functional kinds alike: attention reads its rate from an attribute, not a
    module.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "hidden_dropout", "dropout_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def wrap_activations(config: Config, base: nn.Module) -> ActivationOffload:
    """Recompute or move activations as the file says; layers below the adapters stay out of it."""
    tokens = micro_batch_tokens(config)
    return wrap(base, offload_mode(config), tokens=tokens, offload_dir=config.offload_dir)


def linear_names(base: nn.Module) -> list[str]:
    """`lora_target: all`: every linear layer by its last name, never the output head."""
    head = base.get_output_embeddings()
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
    )


def lora_config(config: Config, base: nn.Module) -> LoraConfig:
    """The actor's (or, in stage rm, the reward model's) adapter as the YAML asks for it."""
    known = linear_names(base)
    if config.lora_target == "all":
        targets = known
    else:
        targets = [name.strip() for name in config.lora_target.split(",")]
        for name in targets:
            if not any(module == name or module.endswith(f".{name}") for module in known):
                raise UserError(
                    f"{config.source}: lora_target: this model has no linear layer '{name}'; "
                    f"it has {', '.join(known)}"
                )
    layers = None
    if config.lora_layers is not None:
        depth = base.config.num_hidden_layers
        layers = list(range(max(0, depth - config.lora_layers), depth))
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.resolved_lora_alpha,
        lora_dropout=config.lora_dropout if config.stage == "rm" else 0.0,
        target_modules=targets,
        layers_to_transform=layers,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def new_value_head(hidden_size: int, device: torch.device) -> nn.Linear:
    """A head that says 0 of everything: no noise in the first advantages."""
    head = nn.Linear(hidden_size, 1).to(device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def read_value_head(folder: Path) -> tuple[Tensor, Tensor]:
    """Weight (1, D) and bias (1,) of the head in `folder`, from safetensors where there is one."""
    path = next((folder / name for name in HEAD_FILES if (folder / name).is_file()), None)
    cure = "train one with stage: rm and name its output_dir"
    if path is None:
        raise UserError(f"reward_model: {folder} has no value head ({HEAD_FILES[0]}); {cure}")
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:  # tensors only: a pickle that would run code is refused
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        weight, bias = tensors["v_head.summary.weight"], tensors["v_head.summary.bias"]
        shapes = weight.dim(), tuple(bias.shape)
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"reward_model: {path} has no v_head.summary.weight and .bias; {cure}"
        ) from None
    except LOAD_ERRORS as error:
        raise UserError(
            f"reward_model: {path} cannot be read ({first_line(error)}); {cure}"
        ) from None
    if shapes != (2, (1,)):
        raise UserError(f"reward_model: {path} holds no head with one score; {cure}")
    return weight, bias


def load_value_head(folder: Path, hidden_size: int, device: torch.device) -> nn.Linear:
    """The head that stage rm, or LLaMA-Factory, wrote into `folder`."""
    weight, bias = read_value_head(folder)
    if weight.shape != (1, hidden_size):
        raise UserError(
            f"reward_model {folder}: its head is for hidden size {weight.shape[-1]}, the base has "
            f"{hidden_size}; train the reward model on the same model_name_or_path"
        )
    head = new_value_head(hidden_size, device)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return head


def value_head_state(head: nn.Linear) -> dict[str, Tensor]:
    """The head under LLaMA-Factory's keys."""
    return {
        "v_head.summary.weight": head.weight.detach().cpu().contiguous(),
        "v_head.summary.bias": head.bias.detach().cpu().contiguous(),
    }


@dataclass
class Roles:
    """One base with its adapters and heads. `use(role)` is the only way to switch between them."""

    model: PeftModel
    adapters: dict[str, str | None]  # by role; None: adapters off
    reward_heads: dict[str, nn.Linear]  # by the adapter that each goes with
    critic_head: nn.Linear | None  # None: an advantage without a critic
    device: torch.device
    autocast: bool

    def __post_init__(self) -> None:
        self._active = "actor"
        trained = {self.adapters["actor"], self.adapters.get("critic")} - {None}
        # PEFT's own switches set requires_grad on adapters as they go; this is what stays true.
        self._requires_grad = {
            parameter: any(f".{name}." in key or key.endswith(f".{name}") for name in trained)
            for key, parameter in self.model.named_parameters()
        }
        if self.critic_head is not None:
            self.critic_head.requires_grad_(True)
        for head in self.reward_heads.values():
            head.requires_grad_(False)
        self._activate("actor")

    @property
    def has_critic(self) -> bool:
        """Whether there is a critic at all."""
        return self.critic_head is not None

    @property
    def shares_trunk(self) -> bool:
        """Whether the critic is a head on the actor's trunk."""
        return self.adapters.get("critic") == self.adapters["actor"]

    @contextmanager
    def use(self, role: str) -> Iterator[None]:
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
        adapter = self.adapters[role]
        if adapter is None:
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(adapter)
        for parameter, trains in self._requires_grad.items():
            parameter.requires_grad_(trains)
        self._active = role

    def train(self) -> None:
        """Training mode: layers are checkpointed in it."""
        self.model.train()

    def eval(self) -> None:
        """Evaluation mode: sampling keeps its KV cache, scoring recomputes nothing."""
        self.model.eval()

    def hidden(self, input_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The last hidden states (B, T, D) of the active role; right-padded rows, no logits."""
        with self.precision():
            return self.trunk(
                input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False
            ).last_hidden_state

    def precision(self) -> Any:
        """Autocast where the base is bf16: PEFT keeps adapters in float32, GEMMs should not be."""
        if not self.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @property
    def base(self) -> nn.Module:
        """The causal language model inside the PEFT wrapper."""
        return self.model.get_base_model()

    @property
    def trunk(self) -> nn.Module:
        """The base without its output head."""
        return getattr(self.base, self.base.base_model_prefix)

    @property
    def lm_head(self) -> LMHead:
        """The output head, for the `linear_*` ops."""
        head = self.base.get_output_embeddings()
        softcap = getattr(self.base.config.get_text_config(), "final_logit_softcapping", None)
        return LMHead(head.weight, getattr(head, "bias", None), softcap)

    def value(self, hidden_ND: Tensor) -> Tensor:
        """The critic's V (N,), in the head's float32 whatever the trunk computes in."""
        return self.critic_head(hidden_ND.to(self.critic_head.weight.dtype)).squeeze(-1)

    def trained_parameters(self, role: Role) -> list[nn.Parameter]:
        """What an optimiser of `role` holds; with a shared trunk the critic has only its head."""
        if role in ("reference", "reward") or (role == "critic" and not self.has_critic):
            return []
        if role == "critic" and self.shares_trunk:
            return list(self.critic_head.parameters())
        adapter = self.adapters[role]
        own = [
            parameter
            for key, parameter in self.model.named_parameters()
            if f".{adapter}." in key or key.endswith(f".{adapter}")
        ]
        return own + (list(self.critic_head.parameters()) if role == "critic" else [])

    def table(self, reward: str) -> list[tuple[str, str, int]]:
        """Role, weights in words, trainable count: what the first lines of a run print."""
        critic = "head on the actor" if self.shares_trunk else "base + LoRA 'critic' + head"
        words: dict[Role, str] = {
            "actor": "base + LoRA 'default'",
            "reference": "base, adapters off",
            "reward": reward,
            "critic": critic if self.has_critic else "none",
        }
        return [
            (role, text, sum(p.numel() for p in self.trained_parameters(role)))
            for role, text in words.items()
        ]

    @torch.no_grad()
    def check_head(self, input_ids_T: list[int]) -> None:
        """Refuse an architecture that does more between trunk and logits than `lm_head` knows."""
        ids = torch.tensor([input_ids_T[:16]], device=self.device)
        hidden = self.hidden(ids, torch.ones_like(ids))[0, -1:]
        with self.precision():
            logits = self.base(input_ids=ids).logits[0, -1:].float()
        head = self.lm_head
        token = logits.argmax(-1)
        mine = nn.functional.linear(hidden.to(head.weight_VD.dtype), head.weight_VD, head.bias_V)
        mine_logprob = token_logprobs(mine.float(), token, softcap=head.softcap).logprob_N
        error = (mine_logprob - token_logprobs(logits, token).logprob_N).abs().item()
        if not error < (0.05 if self.autocast else 1e-3):
            raise UserError(
                f"model {self.base.config.model_type}: its logits are not head(hidden) (log-prob "
                f"off "
                f"by {error:.3g}); this architecture is not supported"
            )


def load_adapter(model: PeftModel, folder: str, name: str, **how: bool) -> None:
    """Hang the adapter in `folder` on the base; one that is broken or another base's is refused."""
    try:
        model.load_adapter(folder, adapter_name=name, **how)
    except LOAD_ERRORS as error:
        raise UserError(
            f"reward_model: the adapter in {folder} cannot be loaded ({first_line(error)}); train "
            "it with stage: rm on the same model_name_or_path"
        ) from None


def build(config: Config, device: torch.device, base: nn.Module | None = None) -> Roles:
    """Load the base once and hang the four roles on it."""
    base = load_base(config, device) if base is None else base
    own_adapter = lora_config(config, base)
    model = get_peft_model(base, own_adapter, adapter_name="default")
    hidden_size = base.config.get_text_config().hidden_size
    adapters: dict[str, str | None] = {"actor": "default", "reference": None}
    reward_heads: dict[str, nn.Linear] = {}
    for name, folder in config.reward_adapters.items():
        # Frozen, so it stays in the base's dtype instead of PEFT's float32.
        load_adapter(model, folder, name, autocast_adapter_dtype=False)
        reward_heads[name] = load_value_head(Path(folder), hidden_size, device)
        adapters[name] = name
    critic_head = new_value_head(hidden_size, device) if config.has_critic else None
    if critic_head is not None and config.critic == "shared":
        adapters["critic"] = "default"
    elif critic_head is not None:
        adapters["critic"] = "critic"
        if reward_heads:
            load_adapter(model, config.reward_adapters["reward"], "critic", is_trainable=True)
            if config.value_head_init == "reward":
                critic_head.load_state_dict(reward_heads["reward"].state_dict())
        else:
            model.add_adapter("critic", own_adapter)
    silence_dropout(model)
    model.to(device)
    wrap_activations(config, base)
    model.eval()
    return Roles(model, adapters, reward_heads, critic_head, device, autocast=config.bf16)
