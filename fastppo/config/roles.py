"""The keys of the roles: what trains, where it starts, and models beside the base; and what goes
together of them. No torch here.
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
    """The part of a run that says what of the base trains, and from which adapters it starts."""

    title = "What trains"

    finetuning_type: Literal["lora", "freeze", "full"] = key(
        "lora", LF, "What of the policy trains: adapters, some layers, or all."
    )
    lora_rank: Positive = key(8, LF, "Rank of the adapters.")
    lora_alpha: Positive | None = key(None, LF, "Scale of the adapters; null is twice the rank.")
    lora_target: str = key(
        "all", LF, "Names of the adapted linear layers, comma separated; all of them."
    )
    lora_layers: Positive | None = key(
        None, OWN, "Adapters on so many upper layers only; null is all."
    )
    use_rslora: bool = key(False, LF, "Rank-stabilised scaling of the adapters.")
    use_dora: bool = key(False, LF, "Weight-decomposed adapters.")
    loraplus_lr_ratio: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] | None = key(
        None, LF, "LoRA+: learning rate of the adapters' B over that of A."
    )
    additional_target: str | None = key(
        None, LF, "With lora: modules that train whole and are saved with the adapter."
    )
    adapter_name_or_path: str | None = key(
        None, LF, "Adapters to start from; all but the last are merged, the last trains on."
    )
    create_new_adapter: bool = key(False, LF, "Merge the last one too, and train a new adapter.")
    freeze_trainable_layers: int = key(
        2, LF, "With freeze: so many last layers train; negative is the first."
    )
    freeze_trainable_modules: str = key(
        "all", LF, "With freeze: modules that train in those layers, such as mlp,self_attn."
    )
    freeze_extra_modules: str | None = key(
        None, LF, "With freeze: modules outside the layers that train too, such as norm."
    )

    @property
    def resolved_lora_alpha(self) -> int:
        """lora_alpha, or LLaMA-Factory's twice the rank."""
        return self.lora_alpha if self.lora_alpha is not None else 2 * self.lora_rank


class CriticKeys(Keys):
    """The part of a run that says which weights the critic has."""

    title = "Critic (stage ppo)"
    own_stage: ClassVar[Stage | None] = "ppo"

    critic: Literal["adapter", "shared", "model"] = key(
        "adapter",
        OWN,
        "adapter has an adapter and head of its own, shared a head on the actor's trunk, model a "
        "whole model.",
    )
    critic_model: str | None = key(
        None, OWN, "With critic: model, which; null is a second copy of the base."
    )
    critic_finetuning_type: Literal["lora", "freeze", "full"] | None = key(
        None, OWN, "With critic: model, what of it trains; null is finetuning_type."
    )
    value_head_init: Literal["reward", "zeros"] = key(
        "reward", OWN, "Where the critic's head starts: from the reward model's, or at 0."
    )


class ReferenceKeys(Keys):
    """The part of a run that says which frozen models lie beside the base."""

    title = "Reference, and frozen models (stage ppo)"
    own_stage: ClassVar[Stage | None] = "ppo"

    ref_model: str | None = key(
        None, LF, "A reference model of its own; null is where the policy starts."
    )
    ref_model_adapters: str | None = key(None, LF, "Adapters that are merged into ref_model.")
    ref_model_quantization_bit: Literal[4, 8] | None = key(
        None, LF, "As quantization_bit, for ref_model."
    )
    stream_frozen: bool = key(
        False,
        OWN,
        "Whole frozen models (ref_model, reward_model_type: full) lie in host memory and "
        "pass through the device layer by layer, see docs/offload.md.",
    )


def check_roles(config: Config) -> None:
    """Raise ValueError with the key and the cure where two settings contradict each other."""
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
    """`finetuning_type: freeze`, of the actor or the critic, has to leave something to train."""
    kinds = (config.finetuning_type, config.critic_finetuning_type)
    if "freeze" in kinds and not (config.freeze_trainable_layers or config.freeze_extra_modules):
        raise ValueError("freeze_trainable_layers: 0 trains nothing; give a number of layers")


def check_quantised(key: str, bits: int | None, adapters_key: str, config: Config) -> None:
    """Quantised weights take no merge, so there is room for one adapter."""
    adapters = getattr(config, adapters_key)
    if bits is not None and adapters is not None and "," in adapters:
        raise ValueError(
            f"{adapters_key}: a model under {key} takes one adapter; merge the others first"
        )


def check_critic(config: Config) -> None:
    """`critic_model` and `critic_finetuning_type` belong to `critic: model`."""
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
    """Folder of the adapter that a run without training evaluates, and its configuration.

    With `finetuning_type` other than lora it is a whole model's folder. It is `output_dir` if a run
    saved something there: then this configuration is that run's, its reference included. Otherwise
    it is the last of `adapter_name_or_path`, and the reference is the base with the adapters before
    it.

    Raises:
        UserError: there is neither.
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
