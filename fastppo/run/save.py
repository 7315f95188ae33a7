"""What both stages write into output_dir: weights that PEFT and transformers read, and a record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from fastppo import __version__
from fastppo.config.memory import plan_decides_offloading
from fastppo.config.rewards import TEXT_RECORD
from fastppo.config.weights import BIN
from fastppo.errors import UserError
from fastppo.models.value_head import VALUE_HEAD_FILE, value_head_state
from fastppo.run import durable
from fastppo.templates.exported import as_trained

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.run.tracking import Trackers
    from fastppo.templates import Template


def save_model(
    model: Any,
    head: nn.Linear | None,
    tokenizer: Any,
    folder: Path,
    adapter: str = "default",
    template: Template | None = None,
    *,
    answers: bool = False,
) -> None:
    """Save the trained adapter (without one the whole model), the value head and the tokenizer.

    With the `template` of the training the tokenizer's chat template writes what was trained, and
    a record says how that was written. `answers`: what was trained reads answers, as rewards do.
    """
    save_weights(model, folder, adapter)
    if head is not None:
        save_file(value_head_state(head), folder / VALUE_HEAD_FILE)
    if template is None:
        tokenizer.save_pretrained(str(folder))
        return
    with as_trained(template, answers=answers):
        tokenizer.save_pretrained(str(folder))
    record = {
        "template": template.name,
        "default_system": template.default_system,
        "enable_thinking": template.enable_thinking,
        "preserve_thinking": template.preserve_thinking,
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (folder / TEXT_RECORD).write_text(text, encoding="utf-8")


def save_weights(
    model: Any, folder: Path, adapter: str = "default", more: Mapping[str, Tensor] | None = None
) -> None:
    """Save an adapter or a model: `default` and models into `folder`, other adapters below it.

    `more` are further tensors, saved with those of a whole model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        # False: whether the embeddings were resized is known here, and PEFT would ask the hub.
        model.save_pretrained(str(folder), selected_adapters=[adapter], save_embedding_layers=False)
        return
    # What trains is float32 even where the base was loaded in bfloat16; on disk it is all of the
    # base's dtype, which is what anybody would load it in.
    dtype = model.config.dtype
    cast: dict[int, Tensor] = {}  # by parameter, so that tied weights stay tied
    state = {
        name: cast.setdefault(id(value), value.detach().to(dtype))
        if value.is_floating_point()
        else value
        for name, value in model.state_dict(keep_vars=True).items()
    }
    model.save_pretrained(str(folder), state_dict={**state, **(more or {})})
    model.config.dtype = dtype  # save_pretrained notes that of the parameters
    model.config.save_pretrained(str(folder))


def save_with_value_head(
    model: Any, head: nn.Linear, tokenizer: Any, folder: Path, adapter: str = "default"
) -> None:
    """Save a model and its value head as TRL's AutoModelForCausalLMWithValueHead saves them.

    Of a whole model the head is among its weights, as `v_head.summary`; beside an adapter it is in
    a pytorch_model.bin of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = value_head_state(head)
    tokenizer.save_pretrained(str(folder))
    if not isinstance(model, PeftModel):
        save_weights(model, folder, adapter, saved)
        return
    save_weights(model, folder, adapter)
    inner = folder / adapter  # where PEFT puts what is not its default
    for path in inner.iterdir() if adapter != "default" else ():
        path.replace(folder / path.name)
    if adapter != "default":
        inner.rmdir()
    torch.save(saved, folder / BIN)


def note_run(
    folder: Path,
    decisions: dict[str, Any],
    trackers: Trackers | None = None,
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Write the run's record into `folder`: fastppo's version, the values chosen for `auto` keys,
    the run's names in its trackers, and its `identity` among the runs in output_dir."""
    record = {"fastppo": __version__, "decisions": decisions, **(identity or {})}
    if trackers is not None:
        record["trackers"] = trackers.runs
    durable.write_text(folder / durable.RUN, json.dumps(record) + "\n")


def with_decisions(config: Config, folder: Path) -> Config:
    """Return `config` with each key that is left to the plan as the run in `folder` had it."""
    try:
        record = json.loads((folder / durable.RUN).read_text(encoding="utf-8"))
        found = record["decisions"].items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(
            f"{config.source}: resume_from_checkpoint: {folder / durable.RUN} cannot be read; "
            "start anew without this key"
        ) from None
    open_keys = ["activation_offloading"] if plan_decides_offloading(config) else []
    return config.model_copy(
        update={k: value for k, value in found if getattr(config, k) == "auto" or k in open_keys}
    )


def begin(
    output_dir: Path,
    decisions: dict[str, Any],
    trackers: Trackers | None = None,
    resumed: Path | None = None,
) -> None:
    """Write the run's record into `output_dir`, so that it is known before its first checkpoint.

    `resumed` is the checkpoint from which it goes on.
    """
    durable.delete_partial(output_dir)
    note_run(output_dir, decisions, trackers, durable.new_identity(resumed))


def prepare_output_dir(output_dir: Path) -> None:
    """Make `output_dir`; raise UserError if that is not possible."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir {output_dir}: {error.strerror}; choose another") from None
