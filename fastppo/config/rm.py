"""Keys of stage rm only. No torch here."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from fastppo.config.key import HF, LF, OWN, Keys, Stage, key


class RMKeys(Keys):
    """Keys that only the training of a reward model uses."""

    title = "Reward model (stage rm)"
    own_stage: ClassVar[Stage | None] = "rm"

    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = key(
        0.0, LF, "Dropout in the adapters, only in stage rm: PPO's log-probs need dropout off."
    )
    calibrate_reward: bool = key(
        False,
        OWN,
        "In stage rm: scale the head so that scores of held-out answers have mean 0, std 1.",
    )
    save_only_model: bool = key(
        False, HF, "In stage rm: checkpoints without optimiser state; in ppo they always have it."
    )
    keep_lower_states: bool = key(
        True,
        OWN,
        "In stage rm, with lora_layers or freeze and two epochs or more: run the frozen lowest "
        "layers once, and keep their states in a temporary file in output_dir; false runs them in "
        "every epoch.",
    )
