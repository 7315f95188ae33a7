"""Checkpoints and the final model, in folders that PEFT, transformers and LLaMA-Factory load."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from fastppo import seeds
from fastppo.config.rewards import BASE_RECORD
from fastppo.errors import Interrupted, TrainingStopped, UserError
from fastppo.models.adapters import adapters_to_merge
from fastppo.models.load import causal_lm
from fastppo.models.value_head import VALUE_HEAD_FILE, value_head_state
from fastppo.offload.activations import wrap
from fastppo.ppo import best, evaluation, lines, log
from fastppo.ppo.advantage import RunningScore
from fastppo.run import durable, record, results, training_state
from fastppo.run.agreement import check_agreement
from fastppo.run.save import begin, note_run, prepare_output_dir, save_model, save_weights
from fastppo.types import Answers

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.ppo.state import State


def save(state: State, folder: Path) -> None:
    """Save the actor in `folder`, where PEFT looks, and a separate critic in `folder`/critic."""
    roles = state.roles
    save_model(roles.model, roles.critic_head, state.tokenizer, folder, template=state.template)
    if roles.critic_head is not None and not roles.shares_trunk:
        critic, below = roles.places["critic"], folder / "critic"
        below.mkdir(exist_ok=True)
        save_weights(critic.model, folder if critic.adapter else below, "critic")
        save_file(value_head_state(roles.critic_head), below / VALUE_HEAD_FILE)
    merged = adapters_to_merge(state.config)
    if merged:
        text = json.dumps({"merged": merged}, indent=2) + "\n"
        (folder / BASE_RECORD).write_text(text, encoding="utf-8")
    log.write_trainer_state(state, folder)


def save_to_resume(state: State, output_dir: Path) -> Path:
    """Write `checkpoint-N`, with everything that later steps depend on, atomically."""
    folder = output_dir / f"checkpoint-{state.step}"
    place = durable.partial_folder(folder)
    save(state, place)
    tree = {
        "step": state.step,
        "seconds": state.seconds(),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "scaler": None if state.scaler is None else state.scaler.state_dict(),
        "kl_coef": state.controller.kl_coef,
        "running_score": asdict(state.running_score),
        "trained": [p.detach() for p in trainable_parameters(state)],
        "rows": state.metrics.rows,
        "before": None if state.before is None else vars(state.before),
        "random": state.random,
        "decisions": state.budgets.decisions(),
        "settings": settings(state.config),
        "surroundings": environment(state),
    }
    training_state.write(tree, place)
    note_run(place, state.budgets.decisions(), state.tracker, durable.identity_of(output_dir))
    durable.publish(place, folder)
    state.saved_step = state.step
    return folder


def save_together(state: State, output_dir: Path) -> None:
    """Write a checkpoint in process 0, and report it to the launcher from every process."""
    state.world.on_main(save_between_steps, state, output_dir)
    state.world.report_checkpoint(output_dir / f"checkpoint-{state.step}")


def save_between_steps(state: State, output_dir: Path) -> None:
    """Write a checkpoint and the curves, and delete checkpoints past `save_total_limit`."""
    save_to_resume(state, output_dir)
    evaluation.draw_all(state, output_dir)
    keep = None
    if state.config.load_best_model_at_end:
        found = best.best(state.evaluations, state.config)
        keep = None if found is None else found["step"]
    durable.keep_newest(output_dir, state.config.save_total_limit, keep)


@torch.no_grad()
def load_best(state: State, output_dir: Path) -> dict[str, Any] | None:
    """With `load_best_model_at_end`, put the policy of the best evaluation in place of the last.

    The last step's checkpoint is written first, so that an interrupted run resumes from it. The
    evaluation's files are then those of the best policy; the log keeps the last one's.

    Returns:
        The numbers of summary.json, or None if the last policy is the best.
    """
    if not state.config.load_best_model_at_end:
        return None
    for found in best.ranked(state.evaluations, state.config):
        folder = output_dir / f"checkpoint-{found['step']}"
        if found["step"] == state.step:
            return None
        own = durable.is_own(folder, output_dir)
        fault = durable.resume_fault(folder, hashes=True) if own else "it is of another run"
        if fault is None:
            break
        lines.notes([f"{folder} was the best, but {fault}: the next best is taken"])
    else:
        return None
    if state.saved_step != state.step:
        save_to_resume(state, output_dir)
    trained = training_state.read(folder)["trained"]
    for parameter, value in zip(trainable_parameters(state), trained, strict=True):
        parameter.copy_(value)
    state.best_step = found["step"]
    lines.notes([f"the policy of step {state.best_step} is the best of all that were evaluated"])
    return evaluation.evaluate(state)


def save_final(state: State, output_dir: Path) -> dict[str, Any] | None:
    """Save the last policy of a finished run, or its best; returns what `load_best` returns."""
    summary = load_best(state, output_dir)
    state.world.on_main(replace_final, state, output_dir)
    return summary


def replace_final(state: State, output_dir: Path) -> None:
    """Save the run into `output_dir` itself; each file replaces an older one atomically."""
    place = durable.partial_folder(output_dir / "checkpoint-final")
    save(state, place)
    durable.move_into(place, output_dir)


def trainable_parameters(state: State) -> list[nn.Parameter]:
    """Every trainable parameter, in the optimiser's order."""
    return [p for group in state.optimizer.param_groups for p in group["params"]]


# Keys that may change between a checkpoint and the run that resumes it.
MAY_CHANGE = {
    "source",
    "ignored",
    "former",
    "output_dir",
    "metrics_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "save_steps",
    "save_total_limit",
    "save_strategy",
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "disable_tqdm",
    "plot_loss",
    "eval_strategy",
    "eval_delay",
    "eval_on_start",
    "eval_steps",
    "eval_max_samples",
    "eval_judge",
    "early_stopping_steps",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "per_device_eval_batch_size",
    "report_to",
    "run_name",
    "project",
    "logging_dir",
    "reward_api_timeout",
    "reward_api_retries",
    "vllm_mode",
    "vllm_server_base_url",
    "vllm_server_timeout",
    "vllm_adapter_dir",
    "vllm_gpu_memory_utilization",
    "vllm_enable_sleep_mode",
    "vllm_tensor_parallel_size",
    # Decided by the memory plan, and stored in the checkpoint as `decisions`.
    "activation_offloading",
    "chunk_bytes",
    "generation_batch",
    "log_prob_max_token_len_per_gpu",
    "ppo_max_token_len_per_gpu",
    "offload_dir",
    "max_bad_steps",
    "do_train",
    "do_eval",
    "cache_dir",
    "ddp_timeout",
}
# Keys whose values the checkpoint itself holds: another value in the YAML would have no effect.
STORED_IN_CHECKPOINT = {
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "critic_learning_rate",
    "init_kl_coef",
    "learning_rate",
    "optim",
    "weight_decay",
}


def settings(config: Config) -> dict[str, str]:
    """Key -> digest of its value, for the keys that steps depend on; digests hide URLs' secrets."""
    values = config.model_dump(mode="json", exclude=MAY_CHANGE)
    return {key: digest(value) for key, value in values.items()}


def digest(value: Any) -> str:
    """A short hash of the value of a key."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def environment(state: State) -> dict[str, str]:
    """What else affects the exact results: the prompts, the devices and their libraries."""
    device, world = state.roles.device, state.world
    ids = json.dumps([prompt.ids for prompt in state.prompts])
    return {
        **({"the number of processes": str(world.size)} if world.size > 1 else {}),
        "the prompts": hashlib.sha256(ids.encode()).hexdigest(),
        "torch's version": torch.__version__,
        "the device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "the number of threads": str(torch.get_num_threads()),
        "FASTPPO_BACKEND": os.environ.get("FASTPPO_BACKEND", ""),
    }


def check_processes_agree(state: State, resumed: Path | None) -> None:
    """Check that all processes run the same: keys, data, versions, weights, checkpoint.

    Raises:
        UserError: what differs, and in which process.
    """
    demonstrations = () if state.ptx is None else state.ptx.pairs
    check_agreement(
        state.world,
        state.config,
        decided=state.budgets.decisions(),
        rows=chain(
            (prompt.ids for prompt in (*state.prompts, *state.eval_prompts)),
            chain.from_iterable(demonstrations),
        ),
        models=[place.model for place in state.roles.places.values()],
        resumed=resumed,
    )


def check_same(state: State, saved: dict[str, Any], folder: Path) -> list[str]:
    """Check that `folder` can be resumed; returns the names of what has changed since then."""
    key = f"{state.config.source}: resume_from_checkpoint: {folder}"
    now, then = settings(state.config), saved["settings"]
    fields = type(state.config).model_fields
    # A key that is newer than the checkpoint was as good as at its default.
    new = {name: digest(fields[name].default) for name in now if name not in then}
    changed = sorted(name for name in now if now[name] != {**then, **new}[name])
    for name in changed:
        if name in STORED_IN_CHECKPOINT:
            raise UserError(
                f"{key} was trained with another {name}, which it carries on; put the old value "
                "back, or start anew"
            )
    if [p.shape for p in trainable_parameters(state)] != [p.shape for p in saved["trained"]]:
        raise UserError(
            f"{key}: what trained there has other shapes; keep lora_rank, lora_target, "
            "finetuning_type, critic and advantage as they were"
        )
    names = {name for row in saved["rows"] for name in row if name.startswith("reward/")}
    if not names <= set(state.metrics.reward_columns):
        raise UserError(
            f"{key}: it has rewards {', '.join(sorted(names))}; keep reward_model as it was"
        )
    present, before = environment(state), saved["surroundings"]
    return changed + [x for x in present | before if present.get(x) != before.get(x)]


@torch.no_grad()
def resume(state: State, folder: Path) -> list[str]:
    """Load everything that later steps depend on from the checkpoint in `folder`.

    Returns:
        The names of what has changed since; if nothing has, the run continues bit for bit.
    """
    saved = training_state.read(folder)
    if "trained" not in saved:
        raise UserError(
            f"{state.config.source}: resume_from_checkpoint: {folder} is of stage rm; name one of "
            "stage ppo"
        )
    changed = check_same(state, saved, folder)
    for parameter, value in zip(trainable_parameters(state), saved["trained"], strict=True):
        parameter.copy_(value)
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scheduler.load_state_dict(saved["scheduler"])
    if state.scaler is not None and saved.get("scaler") is not None:
        state.scaler.load_state_dict(saved["scaler"])
    state.controller.kl_coef = saved["kl_coef"]
    state.running_score = RunningScore(**saved["running_score"])
    state.step = saved["step"]
    state.budgets.adopt(saved["decisions"])
    mode, offload_dir = state.budgets.activation_offloading, state.config.offload_dir
    trained = [place.model for place in state.roles.places.values() if place.trainable]
    for base in {causal_lm(model) for model in trained}:
        wrap(base, mode, offload_dir=offload_dir)
    state.began -= saved["seconds"]
    state.before = None if saved["before"] is None else Answers(**saved["before"])
    # The evaluation after the last step runs again, and its files are written again.
    found = log.read_evaluations(folder)
    state.evaluations = [each for each in found if each["step"] < state.total_steps]
    state.metrics.resume(saved["rows"])
    state.random = saved["random"]
    seeds.set_random_state(state.random)
    return changed


def prepare(state: State, folder: Path | None, output_dir: Path) -> None:
    """Make `output_dir`, if all processes have the same run."""
    check_processes_agree(state, folder)
    state.world.on_main(prepare_output_dir, output_dir)


def start(state: State, folder: Path | None, output_dir: Path) -> list[str]:
    """Start a new run in `output_dir`, or resume from `folder`; returns notes for the terminal."""
    notes = []
    if folder is not None:
        changed = resume(state, folder)
        notes.append(f"resumes after step {state.step} from {folder}")
        if changed:
            notes.append(f"not bit for bit, for these changed since: {', '.join(changed)}")
    return [*notes, *state.world.on_main(begin_files, state, folder, output_dir)]


def begin_files(state: State, folder: Path | None, output_dir: Path) -> list[str]:
    """Begin the log and the records in `output_dir`; those of an earlier run are deleted.

    Returns:
        A note if checkpoints of an earlier run stay beside those of a new one.
    """
    if folder is None:
        results.clear(output_dir)
    evaluated = any(each["step"] == state.step for each in state.evaluations)
    results.begin_log(output_dir, state.step, evaluated=evaluated)
    begin(output_dir, state.budgets.decisions(), state.tracker, folder)
    printed = [*state.notes, *state.roles.notes, *state.config.notes]
    record.begin(state.config, state.roles.device, printed, state.plan)
    return durable.others_line(output_dir) if folder is None else []


def save_and_stop(
    state: State, stop: Interrupted | TrainingStopped, output_dir: Path
) -> Interrupted | TrainingStopped:
    """Save the last complete step; returns `stop` with the name of the checkpoint.

    No process asks another: a step that is not complete has nothing to save, and the last complete
    one is the same in all of them, so the first process saves it.
    """
    if not state.world.main:
        said = "process 0 saves the last complete step"
    else:
        said = save_last_step(state, output_dir)
    if isinstance(stop, Interrupted):
        return Interrupted(stop.signal, said)
    return TrainingStopped(f"{stop}; {said}")


def save_last_step(state: State, output_dir: Path) -> str:
    """Save the last complete step, unless it is; returns how the run goes on."""
    if state.step == 0:
        return "no step was finished, so nothing was saved"
    folder = output_dir / f"checkpoint-{state.step}"
    if state.saved_step != state.step:
        save_to_resume(state, output_dir)
    return f"resume_from_checkpoint: true goes on from {folder}"
