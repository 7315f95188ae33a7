"""Metrics of a PPO step: sums during the update, then a row in the files in `metrics_dir`."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastppo.ppo.columns import COLUMNS, REWARD_COLUMN
from fastppo.rewards.reward import mean_score
from fastppo.run import plots
from fastppo.run.durable import replace_atomically, write_text
from fastppo.types import Experience

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.ppo.state import State
    from fastppo.run.world import World

CSV, CURVES, SUMMARY, SAMPLES = (
    "training_metrics.csv",
    "training_curves.png",
    "summary.json",
    "samples.json",
)


class Clock:
    """Measures the seconds that each phase of a step takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.began = time.monotonic()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # what was queued belongs to the phase that queued it
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - began

    def of_main(self, world: World) -> Clock:
        """The phases' seconds in the first process, its waits for the others included."""
        self.seconds = world.gather(self.seconds)[0]
        return self

    def columns(self, response_tokens: float, update_tokens: float) -> dict[str, float]:
        """The seconds of each phase and of the step, and the tokens per second, by column."""
        seconds, whole = self.seconds, time.monotonic() - self.began
        return {
            **{f"seconds_{phase}": taken for phase, taken in seconds.items()},
            "seconds": whole,
            "rollout_tokens_per_second": response_tokens / seconds["rollout"],
            "update_tokens_per_second": update_tokens / seconds["update"],
            "tokens_per_second": response_tokens / whole,
        }


@dataclass
class Totals:
    """Sums over micro-batches; they stay on the device until `read` at the end of the update."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        """Add `value` to a sum; for names that end in _max, take the maximum."""
        value = value.detach()
        if name not in self.sums:
            self.sums[name] = value
        elif name.endswith("_max"):
            self.sums[name] = torch.maximum(self.sums[name], value)
        else:
            self.sums[name] = self.sums[name] + value

    def merge(self, other: Totals) -> None:
        """Add every sum of `other`."""
        for name, value in other.sums.items():
            self.add(name, value)

    def reduce(self, world: World, device: torch.device) -> Totals:
        """The sums over all processes, in float64; alone they stay as they are.

        A process without rows has no sums, and one without a loss none of that.
        """
        if world.size == 1:
            return self
        names = sorted(set().union(*world.gather(set(self.sums))))
        maxima = [name for name in names if name.endswith("_max")]
        found: dict[str, Tensor] = {}
        for kind, nothing, reduce in (
            ([name for name in names if name not in maxima], 0.0, world.sum),
            (maxima, -math.inf, world.max),
        ):
            empty = torch.full((), nothing, dtype=torch.float64, device=device)
            values = [self.sums.get(name, empty).double() for name in kind]
            if kind:
                found |= dict(zip(kind, reduce(torch.stack(values)).unbind(), strict=True))
        return Totals(found)

    def losses_finite(self) -> Tensor:
        """Whether every loss of an optimiser step is finite (0-d bool, on the device)."""
        names = {"policy_loss", "kl_loss", "value_loss", "ptx_loss"} & self.sums.keys()
        return torch.stack([self.sums[name].isfinite() for name in sorted(names)]).all()

    def __getitem__(self, name: str) -> Tensor:
        """One sum, as a tensor on the device."""
        return self.sums[name]

    def read(self) -> dict[str, float]:
        """Transfer all sums to the host in one copy."""
        names = list(self.sums)
        values = torch.stack([self.sums[name].double() for name in names]).tolist()
        return dict(zip(names, values, strict=True))


def sums_of_no_pass(config: Config, nonfinite_run: Tensor) -> Totals:
    """The sums of an update that trains on no row: the policy stays as it is, so its ratio is 1."""
    zero, one = torch.zeros_like(nonfinite_run), torch.ones_like(nonfinite_run)
    names = ["clipped", "approx_kl", "policy_kl", "policy_loss"]
    names += ["kl_loss"] if config.use_kl_loss else []
    names += ["value_loss", "value_clipped"] if config.has_critic else []
    sums = dict.fromkeys(names, zero) | dict.fromkeys(("count", "ratio", "ratio_max"), one)
    return Totals({**sums, "nonfinite_run": nonfinite_run})


def means(totals: Totals, *, passes: int, steps: int, early_stopped: bool) -> dict[str, float]:
    """Means over the tokens or passes of an update, by the names of docs/metrics.md."""
    sums = totals.read()
    tokens, passes = max(sums["count"], 1.0), max(passes, 1)
    taken = sums.get("taken", 0.0)
    row = {
        "clipfrac": sums["clipped"] / tokens,
        "approxkl": sums["approx_kl"] / tokens,
        "policykl": sums["policy_kl"] / tokens,
        "ratio_mean": sums["ratio"] / tokens,
        "ratio_max": sums["ratio_max"],
        "optimizer_steps": taken,
        "skipped_steps": steps - taken,
        "nonfinite_steps": sums.get("nonfinite", 0.0),
        "nonfinite_run": sums.get("nonfinite_run", 0.0),
        "early_stopped": float(early_stopped),
    }
    for name in ("policy_loss", "kl_loss", "value_loss", "ptx_loss"):
        if name in sums:
            row[name] = sums[name] / passes
    if "loss_scale" in sums:
        row |= {"overflow_steps": sums.get("overflow", 0.0), "loss_scale": sums["loss_scale"]}
    if "value_clipped" in sums:
        row["value_clipfrac"] = sums["value_clipped"] / tokens
    for name in ("grad_norm_actor", "grad_norm_critic"):
        if name in sums:
            row[name] = sums[name] / max(taken, 1.0)
    return row


def correlation(x_B: Tensor, y_B: Tensor) -> float:
    """Pearson's correlation; 0 if one of the two does not vary."""
    x_B, y_B = x_B.double() - x_B.double().mean(), y_B.double() - y_B.double().mean()
    scale = (x_B.square().sum() * y_B.square().sum()).sqrt().item()
    return (x_B * y_B).sum().item() / scale if scale > 0 else 0.0


def spread(x: Tensor) -> float:
    """Standard deviation, unbiased; 0 for fewer than two values."""
    return x.std().item() if x.numel() > 1 else 0.0


def explained_variance(value_N: Tensor, return_N: Tensor) -> float:
    """1 - var(return - value) / var(return); 0 if the returns do not vary."""
    variance = return_N.var(correction=0).item()
    return 1.0 - (return_N - value_N).var(correction=0).item() / variance if variance > 0 else 0.0


def critic_columns(experience: Experience, rates: dict[str, float]) -> dict[str, float]:
    """Columns about the critic at the time of the rollout; empty without a critic."""
    value_N = experience.scored.value_N
    if value_N is None:
        return {}
    return {
        "explained_variance": explained_variance(value_N, experience.return_N),
        "value_mean": value_N.mean().item(),
        "value_std": spread(value_N),
        "critic_learning_rate": rates["critic"],
        "grad_norm_critic": 0.0,
    }


def sampler_columns(experience: Experience, config: Config) -> dict[str, float]:
    """Columns about the importance weights of `rollout_is`; empty without it.

    The effective sample size is Kish's, (sum w)^2 / sum w^2, as a share of the tokens.
    """
    weight_N, scored = experience.importance_weight_N, experience.scored
    if weight_N is None:
        return {}
    gap_N = (scored.rollout.sampler_logprob_N - scored.logprob_N).abs()
    # exp(log(threshold)) is not exactly threshold.
    capped_N = weight_N >= config.importance_bounds[1] * (1 - 1e-6)
    squares = weight_N.square().sum() * weight_N.numel()
    effective = weight_N.sum().square() / squares if squares > 0 else squares
    return {
        "sampler_gap_max": gap_N.max().item(),
        "rollout_is_mean": weight_N.mean().item(),
        "rollout_is_capped": capped_N.float().mean().item(),
        "rollout_is_masked": (weight_N == 0).float().mean().item(),
        "rollout_is_ess": effective.item(),
    }


def passes_over_prompts(state: State, sampled: Mapping[str, float]) -> float:
    """Passes over the prompts so far, those of refills included."""
    refills = sum(row.get("refills", 0) for row in [*state.metrics.rows, sampled])
    return (state.step + refills) * state.config.prompts_a_step / len(state.prompts)


def step_row(
    state: State, experience: Experience, learned: dict[str, float], clock: Clock
) -> dict[str, float]:
    """The step's row of training_metrics.csv, by the names of `fastppo.ppo.columns.COLUMNS`."""
    scored, config = experience.scored, state.config
    rollout = scored.rollout
    sequences, whole = len(rollout.prompts), rollout.filtered_from
    sampled = {} if whole is None else whole.columns()
    length_B = torch.tensor(rollout.response_lengths, device=scored.score_B.device).float()
    gap_N = rollout.sampler_logprob_N - scored.logprob_N
    # The rate of a role's first group; with LoRA+ its second group has a multiple of it.
    rates = {group["role"]: group["lr"] for group in reversed(state.optimizer.param_groups)}
    parts = {name: mean_score(scored.reward_parts[name]) for name in state.reward.extra_names}
    return {
        "step": state.step,
        "epoch": passes_over_prompts(state, sampled),
        "score": scored.score_B.mean().item(),
        "score_std": spread(scored.score_B),
        **{f"reward/{name}": mean for name, mean in parts.items() if mean is not None},
        "score_shaped": experience.score_B.mean().item(),
        "kl": (scored.logprob_N - scored.ref_logprob_N).sum().item() / sequences,
        "kl_controlled": experience.kl_N.sum().item() / sequences,
        "kl_target": config.ppo_target,
        "kl_coef": experience.kl_coef,
        "entropy": scored.entropy_N.mean().item(),
        "return_mean": experience.return_N.mean().item(),
        "return_std": spread(experience.return_N),
        "sampler_gap": gap_N.mean().item(),
        "sampler_gap_abs": gap_N.abs().mean().item(),
        "response_length": length_B.mean().item(),
        "response_length_max": length_B.max().item(),
        "eos_share": sum(rollout.terminated) / sequences,
        "score_length_corr": correlation(scored.score_B, length_B),
        "learning_rate": rates["actor"],
        "response_tokens": sum(rollout.response_lengths),
        "grad_norm_actor": 0.0,  # if only the critic trained
        **critic_columns(experience, rates),
        **sampler_columns(experience, config),
        **sampled,
        **({"ptx_loss": 0.0} if state.ptx is not None else {}),
        **learned,
        **clock.of_main(state.world).columns(
            sampled.get("sampled_tokens", sum(rollout.response_lengths)), learned["update_tokens"]
        ),
    }


class MetricsWriter:
    """Writes one row per step; files of an earlier run are renamed, never appended to.

    With `writes=False` (a process other than the first) it keeps the rows and writes no file.
    """

    def __init__(
        self,
        folder: Path,
        rewards: Sequence[str] = (),
        absent: Collection[str] = (),
        *,
        writes: bool = True,
    ) -> None:
        self.folder, self.writes = folder, writes
        self.columns = [name for name in COLUMNS if name not in absent]
        self.reward_columns = [REWARD_COLUMN.format(name=name) for name in rewards]
        self.rows: list[dict[str, float]] = []
        self.is_open = False
        self.drawn, self.drawn_at, self.drawing = 0, -math.inf, 0.0  # rows, when, seconds it took

    def ensure_open(self) -> None:
        """Open the file at the first write, so that a run that fails earlier changes no file."""
        if not self.is_open and self.writes:
            self.is_open = True
            self._open()

    def _open(self) -> None:
        """Make the folder, move files of an earlier run to previous-<time>, write the header."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [CSV, CURVES, SUMMARY, SAMPLES]
        earlier = [self.folder / name for name in names if (self.folder / name).exists()]
        if earlier:
            aside = self.folder / time.strftime("previous-%Y%m%d-%H%M%S")
            number = 1
            while aside.exists():
                number += 1
                aside = self.folder / f"{time.strftime('previous-%Y%m%d-%H%M%S')}-{number}"
            aside.mkdir()
            for path in earlier:
                path.rename(aside / path.name)
        (self.folder / CSV).write_bytes(self.text([]).encode())

    def text(self, rows: Sequence[Mapping[str, float]]) -> str:
        """The header and `rows` as CSV."""
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        writer.writerow([*self.columns, *self.reward_columns])
        writer.writerows(self.cells(row) for row in rows)
        return file.getvalue()

    def cells(self, row: Mapping[str, float]) -> list[str]:
        """The cells of a row, in the order of the columns.

        A cell is empty for a reward that did not apply, and in a row from before a resume for what
        the run did not have then.
        """
        names = [*self.columns, *self.reward_columns]
        return [_number(row[name]) if name in row else "" for name in names]

    def resume(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Resume after `rows`: a file that begins with them is cut there, another is renamed."""
        self.rows = [dict(row) for row in rows]
        if not self.writes:
            return
        text = self.text(rows)
        path = self.folder / CSV
        same = path.is_file() and path.read_bytes().startswith(text.encode())
        self.is_open = True
        if not same:
            self._open()
        write_text(path, text)

    def add(self, row: Mapping[str, float]) -> None:
        """Append the row of one step."""
        self.ensure_open()
        missing = set(self.columns) - row.keys()
        unknown = row.keys() - set(self.columns) - set(self.reward_columns)
        assert not missing, missing
        assert not unknown, unknown
        self.rows.append(dict(row))
        if not self.writes:
            return
        with (self.folder / CSV).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(self.cells(row))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file into `metrics_dir`, atomically."""
        if not self.writes:
            return
        write_text(
            self.folder / name,
            json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        )

    def draw(self, title: str, *, share: float = math.inf) -> None:
        """Draw the curves of all rows so far; the file is replaced atomically.

        Nothing is drawn if drawing would take more than `share` of the time since the last drawing,
        so that it does not slow a run of short steps.
        """
        path, began = self.folder / CURVES, time.monotonic()
        current = self.drawn == len(self.rows) and path.is_file()
        if (
            not self.writes
            or not self.rows
            or current
            or began - self.drawn_at < self.drawing / share
        ):
            return
        with replace_atomically(path) as place:
            plots.draw_curves(self.rows, place, title)
        self.drawn, self.drawn_at = len(self.rows), time.monotonic()
        self.drawing = self.drawn_at - began


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:.9g}"
