"""The lines that a PPO run prints on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from fastppo import __version__
from fastppo.config.effect import without_effect
from fastppo.ops.backend import choose
from fastppo.ppo import guards
from fastppo.ppo.metrics import CSV, CURVES, SUMMARY
from fastppo.ppo.optimizer import idle_steps
from fastppo.ppo.sampling import Sampling
from fastppo.run import console as terminal
from fastppo.run import record
from fastppo.run.console import console, counted, format_duration, format_score

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.ppo.state import State
    from fastppo.run.live import LiveView


def largest_beta_change(config: Config, steps: int) -> float:
    """The largest relative change of beta that the KL controller can make in the whole run."""
    step = 0.2 * min(config.rollout_batch_size / config.horizon, 1.0)
    return math.expm1(min(steps * math.log1p(step), 700.0))  # e**710 is too large for a float


def notices(config: Config, steps: int) -> list[str]:
    """Notes on settings that have no effect, or not the effect that a user may expect."""
    lines = list(config.notes)
    truncating = Sampling.of(config).truncates
    if truncating:
        lines.append(
            f"{', '.join(truncating)}: the sampler is not the policy that trains; the column "
            "sampler_gap shows by how much, and KL can turn negative"
        )
    if config.min_new_tokens:
        truncating = [*truncating, "min_new_tokens"]
    if truncating and config.importance_mode is not None:
        lines.append(
            f"rollout_is: {config.importance_mode}: with {', '.join(truncating)} the sampler draws "
            "from another distribution, which the weights correct for the tokens that it can draw, "
            "and cannot for those that it never does"
        )
    if config.without_meaning:
        lines.append(
            f"{', '.join(config.without_meaning)}: nothing to advantage: {config.advantage}, and "
            "without effect"
        )
    acting = without_effect(config)
    lines += [f"{name}: {acting[name]}" for name in acting if name in config.model_fields_set]
    if config.critic_warmup >= steps:
        lines.append(
            f"critic_warmup: {config.critic_warmup} leaves none of the {steps} steps to the "
            "policy; lower it, or raise max_steps"
        )
    change = largest_beta_change(config, steps)
    if config.adap_kl_ctrl and change < 0.05:
        lines.append(
            f"this run is too short for the KL controller: over {counted(steps, 'step')} beta can "
            f"move by {change:.2%} at most (horizon {config.horizon:g}); lower horizon to let it "
            "adapt"
        )
    responses = config.rollout_batch_size
    if config.adap_kl_ctrl and config.horizon < responses:
        lines.append(
            f"horizon: {config.horizon:g} is shorter than a step of {responses} responses, and "
            f"acts as {responses}: beta moves by at most 20% a step"
        )
    return lines


def first_lines(state: State, steps: int) -> None:
    """Print what will run, on which device and with which roles, and where the files go."""
    config, base = state.config, state.roles.base
    model_config: Any = base.config
    offload: Any = base.activation_offload
    batch = config.rollout_batch_size
    length = "held out" if state.eval_is_held_out else "from the training set"
    ops = choose("linear_policy_loss", None, torch.empty(0, device=state.roles.device))
    console.print(f"[bold]fastppo {__version__}[/bold], stage ppo, {config.model_name_or_path}")
    console.print(
        f"  device {state.roles.device}, {terminal.precision_name(state.roles.autocast)}, "
        f"attention {model_config._attn_implementation}, ops: {ops}, "
        f"activations: {offload.mode}"
    )
    console.print(
        f"  {counted(steps, 'step')} of {counted(batch, 'response')} to "
        f"{counted(config.prompts_a_step, 'prompt')} "
        f"({len(state.prompts)} in the set), advantage {config.advantage}, "
        f"{counted(config.ppo_epochs, 'epoch')} each; evaluation on "
        f"{counted(len(state.eval_prompts), 'prompt')} {length}"
    )
    table = Table("role", "weights", "trainable", box=None, padding=(0, 2))
    for role, weights, count in state.roles.table(state.reward.table()):
        table.add_row(role, weights, f"{count:,}")
    console.print(table)
    if state.roles.shared is not None:
        console.print(f"  {state.roles.shared.describe()}")
    console.print(f"  writes {config.output_dir} and {config.metrics_dir}/")
    idle = idle_steps(state.scheduler, steps)
    lines = [*state.notes, *state.roles.notes, *notices(config, steps)]
    if idle:
        lines.append(
            f"the learning rate is 0 in {idle} of the {steps} steps, whose rollouts teach nothing; "
            "look at learning_rate, lr_scheduler_type and lr_scheduler_kwargs"
        )
    for line in lines:
        console.print(f"  [yellow]note:[/yellow] {line}")


def notes(texts: Sequence[str]) -> None:
    """Print notes on where the run starts."""
    for text in texts:
        console.print(f"  {text}")


def step_lines(state: State, *, logs: bool) -> None:
    """Print a line on the last step if it is to be logged, and what deserves attention."""
    if logs:
        step_line(state, state.total_steps)
    for line in guards.warnings(state.metrics.rows):
        console.print(f"[yellow]warning:[/yellow] {line}")
    if state.step == 1:
        memory_line(state)


def step_line(state: State, steps: int) -> None:
    """Print one line on a step, with the time left."""
    row = state.metrics.rows[-1]
    left = state.seconds() / state.step * (steps - state.step)
    console.print(
        f"step {state.step:>{len(str(steps))}}/{steps}  score {row['score']:+.3f}  "
        f"kl {row['kl']:.2f} (beta {row['kl_coef']:.4f})  entropy {row['entropy']:.2f}  "
        f"clip {row['clipfrac']:.1%}  length {row['response_length']:.1f}  "
        f"{row['seconds']:.1f} s, {format_duration(left)} left"
    )


def advance(view: LiveView, state: State) -> None:
    """Show the step that was taken in the live view."""
    rows = state.metrics.rows
    view.curves = {name: [row[name] for row in rows] for name in ("score", "kl")}
    view.sample = state.sample
    view.warnings += guards.warnings(rows)
    view.advance(view.task_ids[0])


def memory_line(state: State) -> None:
    """After the first step, print its peak memory and the memory planned for its lengths."""
    line = terminal.memory_line(
        state.plan,
        state.roles.device,
        cutoff_len=max(len(prompt.ids) for prompt in state.prompts),
        max_new_tokens=int(state.metrics.rows[-1]["response_length_max"]),
    )
    record.add(Path(state.config.output_dir), memory=line)


def evaluation_line(summary: dict[str, Any]) -> None:
    """Print an evaluation of reference and policy in one line."""
    judge = ""
    if "judge_before" in summary:
        judge = f", judge {summary['judge_before']:+.3f} -> {summary['judge_after']:+.3f}"
    parts = ""
    for key in summary:
        if key.startswith("reward/") and key.endswith("_before"):
            name = key.removesuffix("_before")
            before, after = summary[key], summary[f"{name}_after"]
            parts += f", {name} {format_score(before)} -> {format_score(after)}"
    console.print(
        f"evaluation: reward {summary['reward_before']:+.3f} -> {summary['reward_after']:+.3f}"
        f"{parts}{judge}, win rate {summary['win_rate']:.0%}, kl {summary['kl']:.2f}, "
        f"length {summary['length_before']:.1f} -> {summary['length_after']:.1f}"
    )


def last_lines(state: State, summary: dict[str, Any]) -> None:
    """Print the last evaluation, and where the files are."""
    evaluation_line(summary)
    folder = Path(state.config.metrics_dir)
    for name in (SUMMARY, CURVES, CSV):
        console.print(f"  {folder / name}")
    console.print(f"  policy: {state.config.output_dir}")
