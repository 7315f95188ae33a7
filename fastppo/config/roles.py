"""Keys of the roles: what trains, where it starts, and which models there are besides the base; and
checks of how the keys go together. No torch here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from fastppo.config.below import adapters_below
from fastppo.config.key import LF, OWN, Keys, Positive, Stage, key
from fastppo.config.rewards import split
from fastppo.errors import UserError

if TYPE_CHECKING:
    from fastppo.config.schema import Config

ROLES_LISTS = (
    "lora_target",
    "adapter_name_or_path",
    "additional_target",
    "freeze_extra_modules",
    "freeze_trainable_modules",
    "ref_model_adapters",
)


class TuningKeys(Keys):
    """Keys that say which parameters of the base train, and from which adapters training starts."""

    title = "What trains"

    finetuning_type: Literal["lora", "freeze", "full"] = key(
        "lora", LF, "Which parameters of the policy train: adapters, some layers, or all."
    )
    lora_rank: Positive = key(8, LF, "Rank of the adapters.")
    lora_alpha: Positive | None = key(None, LF, "Scale of the adapters; null is twice the rank.")
    lora_target: str = key(
        "all",
        LF,
        "Names of the adapted linear layers, comma separated; all adapts all that process text, "
        "except the output head.",
    )
    lora_layers: Positive | None = key(
        None, OWN, "Adapt only this number of upper layers; null is all."
    )
    use_rslora: bool = key(False, LF, "Rank-stabilised scaling of the adapters.")
    use_dora: bool = key(False, LF, "Weight-decomposed adapters.")
    loraplus_lr_ratio: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] | None = key(
        None, LF, "LoRA+: learning rate of the adapters' B divided by that of A."
    )
    additional_target: str | None = key(
        None,
        LF,
        "With lora: modules whose weights also train, all of them, and are saved with the adapter.",
    )
    adapter_name_or_path: str | None = key(
        None,
        LF,
        "Adapters to start from; all but the last are merged, and training continues the last.",
    )
    create_new_adapter: bool = key(False, LF, "Also merge the last one, and train a new adapter.")
    freeze_trainable_layers: int = key(
        2, LF, "With freeze: number of last layers that train; if negative, of first layers."
    )
    freeze_trainable_modules: str = key(
        "all", LF, "With freeze: the modules of those layers that train, such as mlp,self_attn."
    )
    freeze_extra_modules: str | None = key(
        None, LF, "With freeze: modules outside the layers that also train, such as norm."
    )

    @property
    def resolved_lora_alpha(self) -> int:
        """lora_alpha if it is set, else twice the rank, as in LLaMA-Factory."""
        return self.lora_alpha if self.lora_alpha is not None else 2 * self.lora_rank


class CriticKeys(Keys):
    """Keys of the critic's weights."""

    title = "Critic (stage ppo)"
    own_stage: ClassVar[Stage | None] = "ppo"

    critic: Literal["adapter", "shared", "model"] = key(
        "adapter",
        OWN,
        "adapter: an adapter and head on the base; shared: a head on the actor's trunk; model: "
        "a separate model.",
    )
    critic_model: str | None = key(
        None,
        OWN,
        "With critic: model, the model, or an adapter with a value head; null is a second copy of "
        "the base.",
    )
    critic_finetuning_type: Literal["lora", "freeze", "full"] | None = key(
        None, OWN, "With critic: model, which of its parameters train; null is finetuning_type."
    )
    value_head_init: Literal["reward", "zeros", "model"] = key(
        "reward",
        OWN,
        "Initial head of the critic: the reward model's (without one zeros), zeros, or model: the "
        "one saved with the policy that training starts from, as TRL and earlier runs save it.",
    )


class ReferenceKeys(Keys):
    """Keys of the frozen models besides the base."""

    title = "Reference, and frozen models (stage ppo)"
    own_stage: ClassVar[Stage | None] = "ppo"

    ref_model: str | None = key(
        None, LF, "A separate reference model; null is the policy at the start."
    )
    ref_model_adapters: str | None = key(None, LF, "Adapters that are merged into ref_model.")
    ref_model_quantization_bit: Literal[4, 8] | None = key(
        None, LF, "Like quantization_bit, for ref_model."
    )
    stream_frozen: bool = key(
        False,
        OWN,
        "Keep separate frozen models (ref_model, reward_model_type: full) in host memory and "
        "stream their layers to the device, see docs/offload.md.",
    )


def check_roles(config: Config) -> None:
    """Raise ValueError, with key and cure, if two settings contradict each other."""
    kind = config.finetuning_type
    if kind != "lora":
        for key in ("adapter_name_or_path", "quantization_bit", "loraplus_lr_ratio"):
            if getattr(config, key) is not None:
                raise ValueError(f"{key}: works with finetuning_type: lora only; leave it out")
        if config.reward_adapters:
            raise ValueError(
                "reward_model_type: lora needs finetuning_type: lora, whose base stays as the "
                "reward adapter knows it; use another reward_model_type"
            )
    check_freeze(config)
    check_quantised("quantization_bit", config.quantization_bit, "adapter_name_or_path", config)
    if config.quantization_bit and config.adapter_name_or_path and config.create_new_adapter:
        raise ValueError(
            "create_new_adapter: a quantised base takes no merged adapter; leave it out, or "
            "quantization_bit"
        )
    if config.ref_model is None:
        for key in ("ref_model_adapters", "ref_model_quantization_bit"):
            if getattr(config, key) is not None:
                raise ValueError(f"{key}: needs ref_model; name one or leave it out")
    check_quantised(
        "ref_model_quantization_bit",
        config.ref_model_quantization_bit,
        "ref_model_adapters",
        config,
    )
    check_critic(config)


def check_freeze(config: Config) -> None:
    """Check that `finetuning_type: freeze`, of actor or critic, trains at least one layer."""
    kinds = (config.finetuning_type, config.critic_finetuning_type)
    if "freeze" in kinds and not (config.freeze_trainable_layers or config.freeze_extra_modules):
        raise ValueError("freeze_trainable_layers: 0 trains nothing; give a number of layers")


def check_quantised(key: str, bits: int | None, adapters_key: str, config: Config) -> None:
    """Check that a quantised model has at most one adapter: others could not be merged."""
    adapters = getattr(config, adapters_key)
    if bits is not None and adapters is not None and "," in adapters:
        raise ValueError(
            f"{adapters_key}: a model under {key} takes one adapter; merge the others first"
        )


def check_critic(config: Config) -> None:
    """Check that `critic_model` and `critic_finetuning_type` are set only with `critic: model`."""
    if config.critic != "model":
        for key in ("critic_model", "critic_finetuning_type"):
            if getattr(config, key) is not None:
                raise ValueError(f"{key}: needs critic: model; set that or leave it out")
        return
    kind = config.critic_finetuning_type or config.finetuning_type
    if kind == "lora" and config.critic_model is None:
        raise ValueError(
            "critic: model with LoRA and no critic_model is critic: adapter with a second base in "
            "memory; use critic: adapter, or set critic_finetuning_type: full or critic_model"
        )


def folder_to_evaluate(config: Config) -> tuple[Path, Config]:
    """Folder of the adapter (or whole model) that a run without training evaluates, and its
    configuration.

    If a run has saved its result in `output_dir`, that is the folder, and the reference is the one
    of that run. Otherwise the folder is the last of `adapter_name_or_path`, and the reference is
    the base with the adapters before it.

    Raises:
        UserError: neither exists.
    """
    output_dir = Path(config.output_dir)
    file = "adapter_config.json" if config.finetuning_type == "lora" else "config.json"
    adapters = split(config.adapter_name_or_path) if config.adapter_name_or_path else []
    if (output_dir / file).is_file():
        merged = adapters if config.create_new_adapter else adapters[:-1]
        check_base_of_run(config, output_dir, merged)
        return output_dir, config
    if not adapters:
        raise UserError(
            f"{config.source}: do_train: is off, and output_dir {output_dir} has nothing trained "
            f"({file}); name the folder of a run in output_dir or adapter_name_or_path"
        )
    below = ",".join(adapters[:-1]) or None
    update = {"adapter_name_or_path": below, "create_new_adapter": below is not None}
    return Path(adapters[-1]), config.model_copy(update=update)


def check_base_of_run(config: Config, folder: Path, merged: list[str]) -> None:
    """Refuse to evaluate the adapter in `folder` on another base than it was trained on.

    `merged` are the adapters that this configuration merges into the base.
    """
    below = adapters_below(folder)
    if [Path(name).name for name in merged] != [Path(name).name for name in below]:
        there, here = (", ".join(names) or "nothing" for names in (below, merged))
        cure = (
            f"set adapter_name_or_path: {','.join(below)} and create_new_adapter: true"
            if below
            else "leave out create_new_adapter, and adapter_name_or_path but for its last"
        )
        raise UserError(
            f"{config.source}: output_dir: {folder} was trained on a base with {there} merged into "
            f"it, and here it is {here}; {cure}"
        )
