"""The PPO loop: prompts -> rollout -> scored -> experience -> update -> metrics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastppo import checkpoint, console
from fastppo.advantage import estimate
from fastppo.errors import UserError
from fastppo.evaluation import evaluate
from fastppo.rollout import Sampling, sample
from fastppo.score import score
from fastppo.state import State, init_state, optimizer_steps, prompts_of_step, total_steps
from fastppo.summary import step_row
from fastppo.update import update

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.data import Records


def step_update(state: State) -> State:
    """One PPO step: sample, score, estimate, learn; the same state, one step on."""
    config, roles, clock = state.config, state.roles, console.Clock()
    seed = config.seed + 1_000_003 * (state.step + 1)
    batch = prompts_of_step(state)
    sampling = Sampling.of(config)
    with clock("rollout"), roles.use("actor"):
        rollout = sample(
            roles,
            batch,
            sampling=sampling,
            template=state.template,
            tokenizer=state.tokenizer,
            seed=seed,
        )
    with clock("score"):
        scored = score(
            roles,
            rollout,
            state.reward,
            temperature=config.temperature,
            batch_size=config.per_device_train_batch_size,
            exact_kl=config.kl_penalty == "full",
        )
    with clock("advantage"):
        experience = estimate(scored, config, state.controller, state.running_score)
    with clock("update"):
        warm = state.step >= config.critic_warmup
        first = state.step * optimizer_steps(config)
        ptx = None if state.ptx is None else state.ptx.stream(first, roles.device)
        learned = update(
            roles, experience, config, state.optimizer, seed=seed, train_actor=warm, ptx=ptx
        )
    state.step += 1
    row = step_row(state, experience, learned, clock)
    if warm:  # before, the KL is 0 whatever beta is
        state.controller.update(row["kl_controlled"], len(batch))
    state.scheduler.step()
    state.metrics.add(row)
    if state.tracker is not None:
        state.tracker.log(row, step=state.step)
    return state


def resume(state: State, output_dir: Path) -> None:
    """`resume_from_checkpoint`: a folder, or true for the newest checkpoint in `output_dir`."""
    wanted = state.config.resume_from_checkpoint
    folder = checkpoint.newest(output_dir) if wanted is True else Path(str(wanted))
    if folder is None:
        raise UserError(
            f"resume_from_checkpoint: true, but {output_dir} has no checkpoint-N; name one, or "
            f"start "
            "anew without this key"
        )
    checkpoint.resume(state, folder)
    console.console.print(f"  resumes after step {state.step} from {folder}")


def run(config: Config, records: Records) -> None:
    """Stage ppo from the first line to the last file."""
    output_dir = Path(config.output_dir)
    state = init_state(config, records)
    steps = total_steps(config, len(state.prompts))
    console.first_lines(state, steps)
    checkpoint.prepare_output_dir(output_dir)
    if config.resume_from_checkpoint:
        resume(state, output_dir)
    while state.step < steps:
        state = step_update(state)
        console.step_line(state, steps)
        if state.step == 1:
            console.memory_line(state)
        if config.eval_strategy == "steps" and state.step % (config.eval_steps or 500) == 0:
            console.evaluation_line(evaluate(state))
        if state.step % config.save_steps == 0 and state.step < steps:
            checkpoint.save_to_resume(state, output_dir)
            checkpoint.keep_newest(output_dir, config.save_total_limit)
    summary = evaluate(state)
    checkpoint.save(state, output_dir)
    if state.tracker is not None:
        state.tracker.end_training()
    console.last_lines(state, summary)
