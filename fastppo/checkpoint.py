"""Folders that PEFT, transformers and LLaMA-Factory read: adapter or model, head, tokenizer."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from fastppo import results
from fastppo.advantage import RunningScore
from fastppo.base import causal_lm
from fastppo.errors import UserError
from fastppo.heads import VALUE_HEAD_FILE, value_head_state
from fastppo.offload import wrap
from fastppo.reward_spec import BASE_RECORD
from fastppo.tuning import merge_list

if TYPE_CHECKING:
    from fastppo.state import State

TRAINING_STATE = "training_state.pt"


def save_model(
    model: nn.Module,
    head: nn.Linear | None,
    tokenizer: Any,
    folder: Path,
    adapter: str = "default",
) -> None:
    """The adapter that trained, or the whole model where there is none; head and tokenizer."""
    save_weights(model, folder, adapter)
    if head is not None:
        save_file(value_head_state(head), folder / VALUE_HEAD_FILE)
    tokenizer.save_pretrained(str(folder))


def save_weights(model: nn.Module, folder: Path, adapter: str = "default") -> None:
    """`default` at the root of `folder`, another adapter below it; a model at the root."""
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
    model.save_pretrained(str(folder), state_dict=state)
    model.config.dtype = dtype  # save_pretrained notes that of the parameters
    model.config.save_pretrained(str(folder))


def save(state: State, folder: Path) -> None:
    """Actor at the root, where plain PEFT looks; the critic, if it has its own weights, below."""
    roles = state.roles
    save_model(roles.model, roles.critic_head, state.tokenizer, folder)
    if roles.critic_head is not None and not roles.shares_trunk:
        critic, below = roles.seats["critic"], folder / "critic"
        below.mkdir(exist_ok=True)
        save_weights(critic.model, folder if critic.adapter else below, "critic")
        save_file(value_head_state(roles.critic_head), below / VALUE_HEAD_FILE)
    below = merge_list(state.config)
    if below:
        text = json.dumps({"merged": below}, indent=2) + "\n"
        (folder / BASE_RECORD).write_text(text, encoding="utf-8")
    results.write_trainer_state(state, folder)


def save_to_resume(state: State, output_dir: Path) -> None:
    """`checkpoint-N` with all that the steps after N depend on; there whole or not at all."""
    folder = output_dir / f"checkpoint-{state.step}"
    beside = output_dir / f".checkpoint-{state.step}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    save(state, beside)
    torch.save(
        {
            "step": state.step,
            "optimizer": state.optimizer.state_dict(),
            "scheduler": state.scheduler.state_dict(),
            "kl_coef": state.controller.kl_coef,
            "running_score": asdict(state.running_score),
            "trained": [p.detach() for p in trained(state)],
            "rows": state.metrics.rows,
            "decisions": state.budgets.decisions(),
        },
        beside / TRAINING_STATE,
    )
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def trained(state: State) -> list[nn.Parameter]:
    """Every trained parameter, in the optimiser's order."""
    return [p for group in state.optimizer.param_groups for p in group["params"]]


def newest(output_dir: Path) -> Path | None:
    """The checkpoint-N of the largest N in `output_dir` that can be resumed from."""
    found = [path for path in checkpoints(output_dir) if (path / TRAINING_STATE).is_file()]
    return found[-1] if found else None


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoint-N, the oldest first."""
    return sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@torch.no_grad()
def resume(state: State, folder: Path) -> None:
    """Go on where `folder` was saved: weights, optimiser, schedule, beta, statistics, rows."""
    if not (folder / TRAINING_STATE).is_file():
        raise UserError(
            f"resume_from_checkpoint {folder}: no {TRAINING_STATE} there; name a checkpoint-N "
            f"folder "
            "that fastppo wrote in stage ppo"
        )
    saved = torch.load(folder / TRAINING_STATE, map_location=state.roles.device, weights_only=True)
    parameters = trained(state)
    if [p.shape for p in parameters] != [p.shape for p in saved["trained"]]:
        raise UserError(
            f"resume_from_checkpoint {folder}: what trained there has other shapes; keep "
            "lora_rank, lora_target, finetuning_type, critic and advantage as they were"
        )
    for parameter, value in zip(parameters, saved["trained"], strict=True):
        parameter.copy_(value)
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scheduler.load_state_dict(saved["scheduler"])
    state.controller.kl_coef = saved["kl_coef"]
    state.running_score = RunningScore(**saved["running_score"])
    state.step = saved["step"]
    state.budgets.adopt(saved["decisions"])
    mode, place = state.budgets.activation_offloading, state.config.offload_dir
    for base in {causal_lm(seat.model) for seat in state.roles.seats.values() if seat.trained}:
        wrap(base, mode, offload_dir=place)
    names = {name for row in saved["rows"] for name in row if name.startswith("reward/")}
    if not names <= set(state.metrics.reward_columns):
        raise UserError(
            f"resume_from_checkpoint {folder}: it has rewards {', '.join(sorted(names))}; keep "
            "reward_model as it was"
        )
    for row in saved["rows"]:
        state.metrics.add(row)
    state.evaluations = results.evaluations_in(folder)


def keep_newest(output_dir: Path, limit: int | None) -> None:
    """`save_total_limit`: delete the oldest checkpoint-N past it."""
    if limit is None:
        return
    found = checkpoints(output_dir)
    for path in found[: max(0, len(found) - limit)]:
        shutil.rmtree(path)


def prepare_output_dir(output_dir: Path) -> None:
    """Make `output_dir`, or say why it cannot be made, before any work is done."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir {output_dir}: {error.strerror}; choose another") from None
