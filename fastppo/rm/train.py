"""Stage rm: a reward model (an adapter and a head) from pairs of better and worse answers."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import EarlyStoppingCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from fastppo import __version__
from fastppo.config.roles import folder_to_evaluate
from fastppo.data import encode_pairs
from fastppo.errors import Interrupted, TrainingStopped
from fastppo.memory.auto import advice_on_failure, resolve_auto
from fastppo.memory.budgets import Budgets
from fastppo.memory.retry import retry
from fastppo.models.adapters import adapters_to_merge, experts_note
from fastppo.models.limits import (
    check_rows,
    drop_pad_without_row,
    embedding_rows,
    note_beyond_training,
)
from fastppo.models.load import autocast_dtype, causal_lm, load_tokenizer, wrap_activations
from fastppo.models.rounding import note_on_16_bits
from fastppo.models.scaler import make_scaler
from fastppo.rewards.adapter import read_score_at
from fastppo.rm.arguments import fit_micro_batches, lora_plus, training_arguments
from fastppo.rm.callbacks import LogFile, LogToTrackers, PrintLogs, ProgressBar
from fastppo.rm.evaluation import evaluate
from fastppo.rm.load import (
    folder_of_head,
    head_notes,
    load_finished,
    load_head,
    load_trainable_model,
)
from fastppo.rm.lower_layers import find_lower_layers
from fastppo.rm.model import ParameterCopy, RewardModel, calibrate
from fastppo.rm.pair_prompts import share_pair_prompts
from fastppo.rm.pairs import Pairs, collate
from fastppo.rm.trainer import PairTrainer, compute_metrics
from fastppo.run import console, durable, record, results, save
from fastppo.run.agreement import check_agreement
from fastppo.run.launch import choose_device, hide_launcher_variables, note_on_device
from fastppo.run.stopping import Stop
from fastppo.run.tracking import Trackers
from fastppo.run.world import ALONE, World
from fastppo.templates import Template, get_template, note_on_template

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.data import Records
    from fastppo.memory.plan import Plan


@dataclass(frozen=True)
class Setup:
    """Everything that a run of stage rm needs to train or evaluate."""

    config: Config
    device: torch.device
    tokenizer: Any
    template: Template
    score_at: str  # the token that is scored: eos, or suffix (what the template writes after it)
    train_pairs: Pairs
    eval_pairs: Pairs  # held out; may be empty
    plan: Plan | None
    budgets: Budgets
    model: RewardModel
    activations: str  # mode of activation_offloading, with auto resolved
    evaluated: Path | None  # the finished model that a run without training evaluates
    resumed: Path | None  # the checkpoint that training continues from
    notes: list[str]  # about the configuration, to be printed
    resume_notes: list[str]
    world: World  # the run's processes


def run(config: Config, records: Records, world: World = ALONE) -> None:
    """Train a reward model on the pairs, evaluate it on those held out, and save it.

    Without training it evaluates a finished model of fastppo or LLaMA-Factory. If the disk is full
    or a signal arrives, the run ends with a one-line message.
    """
    output_dir = Path(config.output_dir)
    with durable.stop_on_full_disk(output_dir):
        setup = set_up(config, records, world)
        print_first_lines(setup)
        check_agreement(
            world,
            setup.config,
            decided=setup.budgets.decisions(),
            rows=(
                ids
                for pair in (*setup.train_pairs.pairs, *setup.eval_pairs.pairs)
                for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
            ),
            models=[setup.model],
            resumed=setup.resumed,
        )
        world.on_main(save.prepare_output_dir, output_dir)
        with Stop() as stop:  # earlier, there is nothing to save
            if setup.evaluated is None:
                train(setup, stop)
            else:
                evaluate(make_trainer(setup, stop), setup.config, setup.eval_pairs, finished=False)


def set_up(config: Config, records: Records, world: World) -> Setup:
    """Encode the pairs, resolve `auto` keys, and load the model."""
    resumed, resume_notes = durable.checkpoint_to_resume(config)
    if config.resume_from_checkpoint:
        config = save.with_decisions(config, resumed or Path(config.output_dir))
    device = choose_device(config)
    evaluated = None
    if not config.trains:
        evaluated, config = folder_to_evaluate(config)
    tokenizer, rows = load_tokenizer(config), embedding_rows(config)
    pad_note = drop_pad_without_row(tokenizer, rows)
    template = get_template(
        config.template,
        tokenizer,
        enable_thinking=config.enable_thinking,
        preserve_thinking=config.preserve_thinking,
        default_system=config.default_system,
    )
    start = evaluated or folder_of_head(config)
    score_at = "eos"
    if start is not None:
        score_at = read_score_at(start) or ("suffix" if template.suffix_ids else "eos")
    train_pairs, eval_pairs = (
        Pairs(
            encode_pairs(
                part,
                template,
                config.cutoff_len,
                config.default_system,
                lf_truncation=config.lf_truncation,
                suffix=score_at == "suffix",
            )
        )
        for part in (records.train, records.eval)
    )
    check_rows(tokenizer, rows, [[template.eos_id]], "template", "the end of an answer")
    for pair in (*train_pairs.pairs, *eval_pairs.pairs):
        texts = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        check_rows(tokenizer, rows, texts, "dataset", "a pair")
    found = (
        pad_note,
        note_on_template(config.template, template),
        note_beyond_training(config, max(train_pairs.longest, eval_pairs.longest)),
        note_on_16_bits(device, autocast_dtype(config, device)),
        note_on_device(config, device),
    )
    config, plan, auto_notes = resolve_auto(
        config, device, world, cutoff_len=max(train_pairs.longest, eval_pairs.longest)
    )
    auto_notes += [line for line in found if line is not None]
    budgets = Budgets.of(config)
    set_seed(config.seed)
    with advice_on_failure(plan, config, budgets, device):
        if evaluated is None:
            model = load_trainable_model(config, device)
        else:
            model = load_finished(config, evaluated, device)
    head = load_head(config, start, model, device)
    offload = wrap_activations(config, causal_lm(model))
    reward = RewardModel(model, head, autocast=autocast_dtype(config, device))
    if evaluated is None:
        reward.lower, lower_notes = find_lower_layers(
            config, reward, train_pairs, eval_pairs, world
        )
        auto_notes += lower_notes
    if reward.lower is None:
        some = (train_pairs.pairs or eval_pairs.pairs)[0]
        text = [*some.prompt_ids, *some.chosen_ids]
        reward.sharing, sharing_notes = share_pair_prompts(config, reward, text)
        auto_notes += sharing_notes
    return Setup(
        config,
        device,
        tokenizer,
        template,
        score_at,
        train_pairs,
        eval_pairs,
        plan,
        budgets,
        reward,
        offload.mode,
        evaluated,
        resumed,
        notes=[
            *auto_notes,
            *experts_note(causal_lm(model), config.finetuning_type),
            *config.notes,
            *head_notes(config, start, evaluated),
        ],
        resume_notes=resume_notes,
        world=world,
    )


def print_first_lines(setup: Setup) -> None:
    """Print what runs, on which device, with how many pairs, and the notes."""
    config, model, echo = setup.config, setup.model, console.console.print
    what = "adapter" if config.finetuning_type == "lora" else f"base ({config.finetuning_type})"
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    echo(f"[bold]fastppo {__version__}[/bold], stage rm, {config.model_name_or_path}")
    held_out = f"{len(setup.eval_pairs)} held out"
    if setup.evaluated is None:
        pairs = f"{len(setup.train_pairs)} pairs to train on, {held_out}"
        role = f"{what} and head train {trainable:,}"
    else:
        pairs, role = held_out, f"evaluates {setup.evaluated}, read at {setup.score_at}"
    precision = console.precision_name(model.autocast)
    echo(f"  device {setup.device}, {precision}, {pairs}; {role}")
    echo(f"  activations: {setup.activations}; writes {Path(config.output_dir)}")
    if model.lower is not None:
        echo(f"  {model.lower.describe()}")
    for line in setup.notes:
        echo(f"  [yellow]note:[/yellow] {line}")
    for line in setup.resume_notes:
        echo(f"  {line}")
    if setup.resumed is not None:
        echo(f"  resumes from {setup.resumed}")


@hide_launcher_variables()
def make_trainer(setup: Setup, stop: Stop) -> PairTrainer:
    """The trainer over the pairs, with fastppo's callbacks and checkpoints."""
    config, template, world = setup.config, setup.template, setup.world
    fitted = fit_micro_batches(config, setup.budgets, world.size)
    trainer = PairTrainer(
        model=setup.model,
        args=training_arguments(fitted, len(setup.train_pairs), setup.device),
        train_dataset=setup.train_pairs,
        eval_dataset=setup.eval_pairs if len(setup.eval_pairs) else None,
        data_collator=lambda pairs: collate(pairs, template.pad_id),
        compute_metrics=compute_metrics,
        callbacks=[
            PrintLogs(setup.plan, setup.device, setup.train_pairs.longest),
            ProgressBar(config),
            *([LogFile()] if world.main else []),
        ],
        optimizers=(lora_plus(config, setup.model) if setup.evaluated is None else None, None),
        stop=stop,
        max_bad_steps=config.max_bad_steps,
        scaler=make_scaler(setup.model.autocast, setup.device),
        decisions=setup.budgets.decisions(),
        world=world,
    )
    trainer.tokenizer, trainer.template = setup.tokenizer, template
    trainer.in_order = config.disable_shuffling
    trainer.plots = config.plot_loss
    trainer.record = {
        "score_at": setup.score_at,
        "template": template.name,
        "merged": adapters_to_merge(config),
        "fastppo": __version__,
    }
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(setup: Setup, stop: Stop) -> None:
    """Train (alone again with half of the micro-batch if memory runs out), evaluate and save."""
    config, budgets, world = setup.config, setup.budgets, setup.world
    with world.together():
        trackers = Trackers.of(config, setup.resumed) if world.main else None
    with advice_on_failure(setup.plan, config, budgets, setup.device):
        if config.finetuning_type == "lora" and world.size == 1:
            start = ParameterCopy(setup.model)
            trainer = retry(
                "update",
                budgets,
                used=lambda: budgets.update.tokens or 0,
                clean=start.restore,
            )(fit)(setup, stop, trackers)
        else:  # the parameters are too large to copy, or other processes would not start again
            trainer = fit(setup, stop, trackers)
        try:
            evaluate(trainer, config, setup.eval_pairs, finished=True)
        except Interrupted as interrupted:
            folder = Path(config.output_dir)
            cut = f"the reward model in {folder} is whole, its evaluation was cut off"
            raise Interrupted(interrupted.signal, cut) from None
    trainer.draw()
    if trackers is not None:
        trackers.close()


def fit(setup: Setup, stop: Stop, trackers: Trackers | None) -> PairTrainer:
    """Train from the start or from a checkpoint, and save; returns the trainer."""
    config = setup.config
    trainer = make_trainer(setup, stop)
    trainer.trackers = trackers
    if config.early_stopping_steps is not None:
        trainer.add_callback(EarlyStoppingCallback(config.early_stopping_steps))
    if trackers is not None:
        trainer.add_callback(LogToTrackers(trackers))
    for line in setup.world.on_main(begin_files, setup, trackers):
        console.console.print(f"  {line}", markup=False)
    checkpoint = None if setup.resumed is None else str(setup.resumed)
    scores = None
    try:
        if (lower := setup.model.lower) is not None and lower.states is None:
            began = time.perf_counter()
            with stop.at_once():
                lower.write(setup.model, 2 * trainer.args.per_device_eval_batch_size)
            taken = time.perf_counter() - began
            console.console.print(f"  they ran on {len(lower.texts):,} texts in {taken:.0f} s")
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if config.calibrate_reward:
            scores = trainer.predict(setup.eval_pairs or setup.train_pairs).predictions
    except Interrupted as interrupted:
        raise save_and_stop(trainer, interrupted) from None
    except Exception:
        with suppress(Exception):  # the error to report is the one that stopped the run
            trainer.draw()
        raise
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressBar):
                callback.stop()
    head = setup.model.head
    if not all(torch.isfinite(p).all() for p in head.parameters()):
        raise TrainingStopped("the reward model's head is not finite; lower learning_rate")
    if scores is not None:
        calibrate(head, torch.as_tensor(scores).flatten())
    setup.world.on_main(trainer.save_model)
    trainer.save_metrics("train", result.metrics)
    return trainer


def begin_files(setup: Setup, trackers: Trackers | None) -> list[str]:
    """Begin the records in output_dir, without an earlier run's; returns notes on what stays."""
    output_dir = Path(setup.config.output_dir)
    if setup.resumed is None:
        results.clear(output_dir)
    save.begin(output_dir, setup.budgets.decisions(), trackers, setup.resumed)
    record.begin(setup.config, setup.device, setup.notes, setup.plan)
    return durable.others_line(output_dir) if setup.resumed is None else []


def save_and_stop(trainer: PairTrainer, interrupted: Interrupted) -> Interrupted:
    """Save the last complete step; returns an interruption that says how to resume."""
    if not trainer.world.main:
        return Interrupted(interrupted.signal, "process 0 saves the last complete step")
    folder = trainer.save_last_step()
    with suppress(Exception):
        trainer.draw()
    if folder is None:
        return Interrupted(interrupted.signal, "no step was finished, so nothing was saved")
    return Interrupted(interrupted.signal, f"resume_from_checkpoint: true goes on from {folder}")
