"""The PPO loop: prompts -> rollout -> scored -> experience -> update -> metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.errors import Interrupted
from fastppo.memory.auto import advice_on_failure
from fastppo.ppo import checkpoint, guards, lines, log
from fastppo.ppo.advantage import estimate
from fastppo.ppo.evaluation import draw, evaluate
from fastppo.ppo.finish import finish
from fastppo.ppo.phases import sampled, scored
from fastppo.ppo.state import State, init_state, optimizer_steps, prompts_of_step, total_steps
from fastppo.ppo.step_row import step_row
from fastppo.ppo.update import shares_first_pass, update
from fastppo.run import console, durable, plots, save
from fastppo.seeds import random_state, seed_of

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.data import Records


DRAWING_SHARE = 0.05  # of a run's time, for the picture that is drawn as it goes


def step_update(state: State) -> State:
    """One PPO step: sample, score, estimate, learn; the same state, one step on.

    A signal drops the step at any point up to its end, and the state is that of the step before.
    """
    config, roles, clock = state.config, state.roles, console.Clock()
    seed = seed_of(config.seed, "step", state.step + 1)
    batch, warm = prompts_of_step(state), state.step >= config.critic_warmup
    rows = state.metrics.rows
    with dropped_at_a_signal(state):
        with state.stop.at_once():
            with clock("rollout"), roles.use("actor"):
                rollout = sampled(state, batch, seed=seed)
            with clock("score"):
                keep = warm and shares_first_pass(config, state.budgets)
                judged = scored(state, rollout, exact_kl=config.kl_penalty == "full", keep=keep)
            with clock("advantage"):
                experience = estimate(judged, config, state.controller, state.running_score)
        with clock("update"), can_be_undone(state):
            first = state.step * optimizer_steps(config)
            ptx = None if state.ptx is None else state.ptx.stream(first, roles.device)
            learned = update(
                roles,
                experience,
                config,
                state.optimizer,
                seed=seed,
                train_actor=warm,
                ptx=ptx,
                budgets=state.budgets,
                nonfinite_run=rows[-1]["nonfinite_run"] if rows else 0.0,
            )
    state.step += 1
    row = step_row(state, experience, learned, clock)
    row |= guards.flags(rows, row, config, roles.product_precision)
    if warm:  # before, the KL is 0 whatever beta is
        state.controller.update(row["kl_controlled"], len(batch))
    state.scheduler.step()
    state.metrics.add(row)
    if state.tracker is not None:
        state.tracker.log(row, state.step)
    guards.check_finite(row, experience, config)
    state.random = random_state()
    return state


@contextmanager
def dropped_at_a_signal(state: State) -> Iterator[None]:
    """Where a signal leaves the block, what the step had changed is put back."""
    running, decisions = replace(state.running_score), state.budgets.decisions()
    state.snapshot.taken = False
    try:
        yield
    except Interrupted:
        if state.snapshot.taken:
            state.snapshot.restore()
        state.running_score = running
        state.budgets.adopt(decisions)
        raise


def can_be_undone(state: State) -> AbstractContextManager[None]:
    """A signal leaves the block at once, for a copy of what trains is kept from before it.

    There is none where nobody listens for signals, or where it is too large to keep: then the
    update is finished first.
    """
    if state.stop.listens and state.snapshot.take():
        return state.stop.at_once()
    state.stop.check()  # one that came a peak ago ended the listening
    return nullcontext()


def learn(state: State, steps: int, output_dir: Path) -> None:
    """All steps that are left, with the evaluations and checkpoints between them."""
    config, epoch = state.config, len(state.prompts) / state.config.prompts_a_step
    done = any(each["step"] == state.step for each in state.evaluations)
    if state.step == 0:
        due = config.eval_on_start
    else:  # a signal had cut it off, and the run goes on with it
        due = config.acts("eval", state.step, steps, epoch) and state.step < steps and not done
    if due:
        evaluation(state)
    with console.progress(config, steps, state.step) as bar:
        while state.step < steps:
            state = step_update(state)
            bar.advance(bar.task_ids[0])
            log.log_step(state)
            if config.acts("logging", state.step, steps, epoch):
                lines.step_line(state, steps)
                draw(state, share=DRAWING_SHARE)
            for line in guards.warnings(state.metrics.rows):
                console.console.print(f"[yellow]warning:[/yellow] {line}")
            if state.step == 1:
                console.memory_line(
                    state.plan,
                    state.roles.device,
                    cutoff_len=max(len(prompt.ids) for prompt in state.prompts),
                    max_new_tokens=int(state.metrics.rows[-1]["response_length_max"]),
                )
            # The last one is evaluated below.
            if config.acts("eval", state.step, steps, epoch) and state.step < steps:
                evaluation(state)
            if config.acts("save", state.step, steps, epoch) and state.step < steps:
                checkpoint.save_to_resume(state, output_dir)
                pictures(state, output_dir)
                durable.keep_newest(output_dir, config.save_total_limit)
    state.stop.check()


def run(config: Config, records: Records) -> None:
    """Stage ppo from the first line to the last file."""
    output_dir = Path(config.output_dir)
    folder, notes = durable.to_resume(config)
    if config.resume_from_checkpoint:
        config = save.with_decisions(config, folder or output_dir)
    state = init_state(config, records, folder)
    steps = total_steps(config, len(state.prompts))
    lines.first_lines(state, steps)
    save.prepare_output_dir(output_dir)
    advice = advice_on_failure(state.plan, state.config, state.budgets, state.roles.device)
    with durable.space(output_dir), state.stop, advice:
        for line in [*notes, *checkpoint.start(state, folder, output_dir)]:
            console.console.print(f"  {line}")
        try:
            learn(state, steps, output_dir)
            summary = evaluate(state)
            checkpoint.save_final(state, output_dir)
            finish(state, records)
        except Interrupted as stop:
            stopped = checkpoint.save_and_stop(state, stop, output_dir)
            with suppress(Exception):
                pictures(state, output_dir)
            raise stopped from None
        except Exception:
            with suppress(Exception):  # what stopped the run is what there is to say
                pictures(state, output_dir)
            raise
        pictures(state, output_dir)
        if state.tracker is not None:
            state.tracker.log(as_eval(summary), state.step)
            state.tracker.close()
        lines.last_lines(state, summary)


def pictures(state: State, output_dir: Path) -> None:
    """The curves of all steps so far, and with `plot_loss` LLaMA-Factory's two."""
    draw(state)
    if state.config.plot_loss and state.metrics.rows:
        plots.plot_log(log.log_history(state), ("loss", "reward"), output_dir)


def evaluation(state: State) -> None:
    """Evaluate along the way: a line, and what trackers get of it."""
    summary = evaluate(state)
    lines.evaluation_line(summary)
    if state.tracker is not None:
        state.tracker.log(as_eval(summary), state.step)
    state.random = random_state()  # rewards and judges may have drawn from it


def as_eval(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary's numbers under names that trackers put into a panel of their own."""
    return {f"eval/{name}": value for name, value in summary.items()}
