"""What a run says on the terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from fastppo import __version__
from fastppo.config_effect import without_effect
from fastppo.metrics import CSV, CURVES, SUMMARY
from fastppo.moments import GIB
from fastppo.ops.backend import choose
from fastppo.optimizer import idle_steps
from fastppo.sampling import Sampling

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.memory import Plan
    from fastppo.state import State

console = Console(highlight=False, soft_wrap=True)


class Clock:
    """Seconds by phase of one step."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.began = time.monotonic()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what was queued belongs to the phase that queued it
        self.phases[phase] = time.monotonic() - began

    def columns(self) -> dict[str, float]:
        """The phases and the whole, as metrics columns."""
        columns = {f"seconds_{phase}": seconds for phase, seconds in self.phases.items()}
        return {**columns, "seconds": time.monotonic() - self.began}

    def step_columns(self, response_tokens: float, update_tokens: float) -> dict[str, float]:
        """Those of a PPO step: tokens a second of its phases, and of the whole, beside them."""
        columns, phases = self.columns(), self.phases
        return {
            **columns,
            "rollout_tokens_per_second": response_tokens / phases["rollout"],
            "update_tokens_per_second": update_tokens / phases["update"],
            "tokens_per_second": response_tokens / columns["seconds"],
        }


def progress(config: Config, steps: int, done: int) -> Progress:
    """`disable_tqdm: false`: a bar below the lines; nothing otherwise. Enter it, then `advance`."""
    bar = Progress(
        "[progress.description]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=config.disable_tqdm is not False,
    )
    bar.add_task(f"stage {config.stage}", total=steps, completed=done)
    return bar


def clock_face(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def beta_room(config: Config, steps: int) -> float:
    """The largest share by which the KL controller can move beta over the whole run."""
    step = 0.2 * min(config.rollout_batch_size / config.horizon, 1.0)
    return math.expm1(min(steps * math.log1p(step), 700.0))  # e**710 is no float any more


def notices(config: Config, steps: int) -> list[str]:
    """What a user would want to have been told before the run, not after."""
    lines = list(config.ignored)
    truncating = Sampling.of(config).truncates
    if truncating:
        lines.append(
            f"{', '.join(truncating)}: the sampler is not the policy that trains; the column "
            "sampler_gap shows by how much, and KL can turn negative"
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
            f"critic_warmup: {config.critic_warmup} leaves none of the {steps} steps to the policy; "
            "lower it, or raise max_steps"
        )
    room = beta_room(config, steps)
    if config.adap_kl_ctrl and room < 0.05:
        lines.append(
            f"this run is too short for the KL controller: over {steps} steps beta can move by "
            f"{room:.2%} at most (horizon {config.horizon:g}); lower horizon to let it adapt"
        )
    responses = config.rollout_batch_size
    if config.adap_kl_ctrl and config.horizon < responses:
        lines.append(
            f"horizon: {config.horizon:g} is shorter than a step of {responses} responses, and "
            f"acts as {responses}: beta moves by at most 20% a step"
        )
    return lines


def first_lines(state: State, steps: int) -> None:
    """What will run, on what, with which roles, and where it writes."""
    config = state.config
    batch = config.rollout_batch_size
    length = "held out" if state.held_out else "from the training set"
    ops = choose("linear_policy_loss", None, torch.empty(0, device=state.roles.device))
    console.print(f"[bold]fastppo {__version__}[/bold], stage ppo, {config.model_name_or_path}")
    console.print(
        f"  device {state.roles.device}, {'bf16' if state.roles.autocast else 'float32'}, "
        f"attention {state.roles.base.config._attn_implementation}, ops: {ops}, "
        f"activations: {state.roles.base.activation_offload.mode}"
    )
    console.print(
        f"  {steps} steps of {batch} responses to {config.prompts_a_step} prompts "
        f"({len(state.prompts)} in the set), advantage {config.advantage}, "
        f"{config.ppo_epochs} epochs each; evaluation on {len(state.eval_prompts)} prompts {length}"
    )
    table = Table("role", "weights", "trainable", box=None, padding=(0, 2))
    for role, weights, count in state.roles.table(state.reward.table()):
        table.add_row(role, weights, f"{count:,}")
    console.print(table)
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


def step_line(state: State, steps: int) -> None:
    """One line a step, with the time left."""
    row = state.metrics.rows[-1]
    left = state.seconds() / state.step * (steps - state.step)
    console.print(
        f"step {state.step:>{len(str(steps))}}/{steps}  score {row['score']:+.3f}  "
        f"kl {row['kl']:.2f} (beta {row['kl_coef']:.4f})  entropy {row['entropy']:.2f}  "
        f"clip {row['clipfrac']:.1%}  length {row['response_length']:.1f}  "
        f"{row['seconds']:.1f} s, {clock_face(left)} left"
    )


def signed(value: float | None) -> str:
    """A score with its sign; a dash where there is none."""
    return "-" if value is None else f"{value:+.3f}"


def memory_line(plan: Plan | None, device: torch.device, **lengths: int) -> None:
    """After the first step: the most that it took, beside what was planned for it.

    On a GPU the allocator has counted tensors. On a CPU nobody has: what the process took at most
    is its code and libraries too. `lengths` are the longest that there were, by their keys.
    """
    if device.type == "cuda":
        taken = torch.cuda.max_memory_allocated(device) / GIB
        said = f"memory: {taken:.2f} GiB of tensors at the highest"
    else:
        taken = highest_rss() / GIB
        said = f"memory: {taken:.2f} GiB at the highest, the whole process (resident)"
    if plan is None:
        console.print(f"{said}; not planned")
        return
    here, longest = plan.again(**lengths).step_peak, plan.step_peak
    console.print(
        f"{said}; planned {here / GIB:.2f} of tensors for these lengths, {longest / GIB:.2f} at "
        "their longest"
    )


def highest_rss() -> int:
    """The most bytes of the process that were in memory at a time."""
    import resource  # not on Windows

    count = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return count if sys.platform == "darwin" else 1024 * count


def evaluation_line(summary: dict[str, Any]) -> None:
    """Before and after in one line."""
    judge = ""
    if "judge_before" in summary:
        judge = f", judge {summary['judge_before']:+.3f} -> {summary['judge_after']:+.3f}"
    parts = ""
    for key in summary:
        if key.startswith("reward/") and key.endswith("_before"):
            name = key.removesuffix("_before")
            before, after = summary[key], summary[f"{name}_after"]
            parts += f", {name} {signed(before)} -> {signed(after)}"
    console.print(
        f"evaluation: reward {summary['reward_before']:+.3f} -> {summary['reward_after']:+.3f}"
        f"{parts}{judge}, win rate {summary['win_rate']:.0%}, kl {summary['kl']:.2f}, "
        f"length {summary['length_before']:.1f} -> {summary['length_after']:.1f}"
    )


def last_lines(state: State, summary: dict[str, Any]) -> None:
    """The result, and where to look."""
    evaluation_line(summary)
    folder = Path(state.config.metrics_dir)
    for name in (SUMMARY, CURVES, CSV):
        console.print(f"  {folder / name}")
    console.print(f"  policy: {state.config.output_dir}")
