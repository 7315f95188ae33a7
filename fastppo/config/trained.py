"""Where what was trained before lies, for a run that evaluates it and trains nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastppo.config.rewards import split
from fastppo.errors import UserError

if TYPE_CHECKING:
    from fastppo.config.schema import Config


def trained_before(config: Config) -> tuple[Path, Config]:
    """The folder of adapter or model, and the configuration of what it is measured against.

    `output_dir` where a run has saved one: the file is that run's, and so is its reference. Else
    the last of `adapter_name_or_path`: its reference is what it stands on.
    """
    output_dir = Path(config.output_dir)
    file = "adapter_config.json" if config.finetuning_type == "lora" else "config.json"
    if (output_dir / file).is_file():
        return output_dir, config
    adapters = split(config.adapter_name_or_path) if config.adapter_name_or_path else []
    if not adapters:
        raise UserError(
            f"{config.source}: do_train: is off, and output_dir {output_dir} has nothing trained "
            f"({file}); name the folder of a run in output_dir or adapter_name_or_path"
        )
    below = ",".join(adapters[:-1]) or None
    update = {"adapter_name_or_path": below, "create_new_adapter": below is not None}
    return Path(adapters[-1]), config.model_copy(update=update)
