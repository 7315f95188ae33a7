"""The PPO loop: prompts -> rollout -> scored -> experience -> update -> metrics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo import checkpoint, console, durable, guards, plots, results
from fastppo.advantage import estimate
from fastppo.errors import Interrupted
from fastppo.evaluation import evaluate
from fastppo.finish import finish
from fastppo.phases import sampled, scored
from fastppo.settle import advising
from fastppo.state import State, init_state, optimizer_steps, prompts_of_step, total_steps
from fastppo.summary import step_row
from fastppo.training_state import random_state
from fastppo.update import shares_first_pass, update

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.data import Records


def step_update(state: State) -> State:
    """One PPO step: sample, score, estimate, learn; the same state, one step on."""
    config, roles, clock = state.config, state.roles, console.Clock()
    seed = config.seed + 1_000_003 * (state.step + 1)
    batch, warm = prompts_of_step(state), state.step >= config.critic_warmup
    state.stop.check()
    with clock("rollout"), roles.use("actor"):
        rollout = sampled(state, batch, seed=seed)
    state.stop.check()
    with clock("score"):
        keep = warm and shares_first_pass(config, state.budgets)
        judged = scored(state, rollout, exact_kl=config.kl_penalty == "full", keep=keep)
    state.stop.check()
    with clock("advantage"):
        experience = estimate(judged, config, state.controller, state.running_score)
    with clock("update"):
        first = state.step * optimizer_steps(config)
        ptx = None if state.ptx is None else state.ptx.stream(first, roles.device)
        rows = state.metrics.rows
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


def learn(state: State, steps: int, output_dir: Path) -> None:
    """All steps that are left, with the evaluations and checkpoints between them."""
    config, epoch = state.config, len(state.prompts) / state.config.prompts_a_step
    if config.eval_on_start and state.step == 0:
        evaluation(state)
    with console.progress(config, steps, state.step) as bar:
        while state.step < steps:
            state = step_update(state)
            bar.advance(bar.task_ids[0])
            results.log_step(state)
            if config.acts("logging", state.step, steps, epoch):
                console.step_line(state, steps)
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
                durable.keep_newest(output_dir, config.save_total_limit)
    state.stop.check()


def run(config: Config, records: Records) -> None:
    """Stage ppo from the first line to the last file."""
    output_dir = Path(config.output_dir)
    folder, notes = durable.to_resume(config)
    if config.resume_from_checkpoint:
        config = checkpoint.decided(config, folder or output_dir)
    state = init_state(config, records)
    steps = total_steps(config, len(state.prompts))
    console.first_lines(state, steps)
    checkpoint.prepare_output_dir(output_dir)
    advice = advising(state.plan, state.config, state.budgets, state.roles.device)
    with durable.space(output_dir), state.stop, advice:
        for line in [*notes, *checkpoint.start(state, folder, output_dir)]:
            console.console.print(f"  {line}")
        try:
            learn(state, steps, output_dir)
        except Interrupted as stop:
            raise checkpoint.save_and_stop(state, stop, output_dir) from None
        summary = evaluate(state)
        checkpoint.save_final(state, output_dir)
        finish(state, records)
        if config.plot_loss:
            plots.plot_ppo(state.metrics.rows, config, output_dir)
        if state.tracker is not None:
            state.tracker.log(as_eval(summary), state.step)
            state.tracker.close()
        console.last_lines(state, summary)


def evaluation(state: State) -> None:
    """Evaluate along the way: a line, and what trackers get of it."""
    summary = evaluate(state)
    console.evaluation_line(summary)
    if state.tracker is not None:
        state.tracker.log(as_eval(summary), state.step)
    state.random = random_state()  # rewards and judges may have drawn from it


def as_eval(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary's numbers under names that trackers put into a panel of their own."""
    return {f"eval/{name}": value for name, value in summary.items()}
