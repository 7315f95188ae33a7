"""The PPO loop: prompts -> rollout -> scored -> experience -> update -> metrics."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastppo.errors import Interrupted
from fastppo.memory.auto import advice_on_failure
from fastppo.memory.retry import retry
from fastppo.models.batch import largest_micro_batch
from fastppo.ppo import best, checkpoint, evaluation, guards, lines, log
from fastppo.ppo.advantage import estimate
from fastppo.ppo.engine import EngineLost, closing
from fastppo.ppo.filter_groups import refill
from fastppo.ppo.metrics import Clock, step_row
from fastppo.ppo.observer import Observer
from fastppo.ppo.rollout import next_prompts, own_rows, sample, settings
from fastppo.ppo.score import first_pass_tokens, gather_scored, score, step_rewards
from fastppo.ppo.snapshot import interruptible_update, undo_if_interrupted
from fastppo.ppo.state import State, init_state
from fastppo.ppo.update import demonstrations, update
from fastppo.run import durable, live, save
from fastppo.run.world import ALONE, World
from fastppo.seeds import random_state, seed_of

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.data import Records


def step_update(state: State) -> State:
    """One PPO step: sample, score, estimate advantages, update; returns the changed `state`.

    If a signal interrupts the step, the state is that of the step before.
    """
    config, roles, budgets, clock = state.config, state.roles, state.budgets, Clock()
    rows, signals = state.metrics.rows, state.stop.active  # can a signal interrupt the step?
    seed = seed_of(config.seed, "step", state.step + 1)
    prompts, train_actor = next_prompts(state), state.step >= config.critic_warmup
    own, world = own_rows(state, len(prompts)), state.world
    with undo_if_interrupted(state) if signals else nullcontext():
        with state.stop.at_once() if signals else nullcontext():
            with clock("rollout"), roles.use("actor"):
                rollout = retry("rollout", budgets, used=partial(len, prompts[own]))(sample)(
                    roles, prompts[own], seed=seed, first_row=own.start, **settings(state)
                )
            with clock("score"), world.together():
                rewards = step_rewards(state, rollout := roles.with_states(rollout), own.start)
            if config.filter_groups:
                rollout, rewards = refill(state, (rollout, rewards), seed, clock)
            with clock("score"):
                used = partial(largest_micro_batch, rollout, budgets.scoring)
                scored = retry("score", budgets, used=used)(score)(
                    roles,
                    rollout,
                    rewards,
                    temperature=config.temperature,
                    budget=budgets.scoring,
                    exact_kl=config.kl_penalty == "full",
                    keep=train_actor * first_pass_tokens(config, budgets, len(rollout.prompts)),
                    chunk_bytes=budgets.chunk_bytes,
                )
            with clock("advantage"):
                scored = gather_scored(scored, prompts, own.start, state.template.pad_id, world)
                experience = estimate(scored, config, state.controller, state.running_score)
        with clock("update"), interruptible_update(state) if signals else nullcontext():
            learned = update(
                roles,
                experience,
                config,
                state.optimizer,
                seed=seed,
                train_actor=train_actor,
                ptx=demonstrations(state),
                budgets=budgets,
                nonfinite_run=rows[-1]["nonfinite_run"] if rows else 0.0,
                scaler=state.scaler,
                world=world,
            )
    state.step += 1
    row = step_row(state, experience, learned, clock)
    row |= guards.flags(rows, row, config, roles.product_precision)
    if train_actor:  # during critic_warmup the KL is 0 for any beta
        state.controller.update(row["kl_controlled"], len(experience.score_B))
    if row["optimizer_steps"] or not row.get("overflow_steps"):  # as in transformers
        state.scheduler.step()
    state.metrics.add(row)
    if state.tracker is not None:
        state.tracker.log(row, state.step)
    guards.check_finite(row, experience, config, writes=world.main)
    state.random = random_state()
    return state


def train(state: State, output_dir: Path, observer: Observer) -> None:
    """Run all remaining steps, with the evaluations and checkpoints between them."""
    observer.train_begin(state)
    if evaluation.is_due(state):
        evaluation.evaluate_between_steps(state, observer)
    with live.LiveView(state.config, state.total_steps, state.step) as view:
        while state.step < state.total_steps and not (observer.stops or best.stops_early(state)):
            observer.step_begin(state)
            state = step_update(state)
            due = observer.step_end(state)
            lines.advance(view, state)
            log.log_step(state)
            lines.step_lines(state, logs=due.log)
            if due.log:
                evaluation.draw_between_steps(state)
                observer.logged(state)
            if due.evaluate:
                evaluation.evaluate_between_steps(state, observer)
            if due.save or best.is_new_best(state):
                checkpoint.save_together(state, output_dir)
                observer.saved(state)
    state.stop.check()


def run(config: Config, records: Records, world: World = ALONE) -> None:
    """Stage ppo: load, train, evaluate, and write everything into output_dir and metrics_dir."""
    start = folder, _ = durable.checkpoint_to_resume(config)
    if config.resume_from_checkpoint:
        config = save.with_decisions(config, folder or Path(config.output_dir))
    fit(init_state(config, records, folder, world), records, start, Observer())


def fit(state: State, records: Records, start: durable.Start, observer: Observer) -> None:
    """Train what is loaded, on from the checkpoint that `start` names, and write all files."""
    (folder, notes), output_dir = start, Path(state.config.output_dir)
    lines.first_lines(state, state.total_steps)
    checkpoint.prepare(state, folder, output_dir)
    advice = advice_on_failure(state.plan, state.config, state.budgets, state.roles.device)
    with durable.stop_on_full_disk(output_dir), state.stop, advice, closing(state.engine):
        lines.notes([*notes, *checkpoint.start(state, folder, output_dir)])
        with evaluation.draw_at_end(state, output_dir):
            try:
                train(state, output_dir, observer)
                summary = evaluation.evaluate(state)
                observer.evaluated(state)
                final = checkpoint.save_final(state, output_dir) or summary
                evaluation.write_results(state, records)
            except (Interrupted, EngineLost) as stop:
                raise checkpoint.save_and_stop(state, stop, output_dir) from None
        evaluation.close_trackers(state, summary)
        lines.last_lines(state, final)
        observer.train_end(state)
