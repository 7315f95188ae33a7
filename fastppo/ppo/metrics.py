"""What a run leaves in `metrics_dir`: training_metrics.csv, training_curves.png, summary.json."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.run import plots
from fastppo.run.durable import whole, write_text

if TYPE_CHECKING:
    from fastppo.config import Config

CSV, CURVES, SUMMARY, SAMPLES = (
    "training_metrics.csv",
    "training_curves.png",
    "summary.json",
    "samples.json",
)

# Column -> what it is. docs/metrics.md has the same table, and a test holds the two together.
COLUMNS = {
    "step": "PPO step, from 1",
    "epoch": "passes over the prompts so far",
    "score": "mean score of the rollout as the reward gave it; of several, their weighted sum",
    "score_std": "standard deviation of those scores",
    "score_shaped": "mean score after normalisation, clipping and penalties: what entered the "
    "reward",
    "kl": "KL to the reference, summed over a response, mean over responses (nats)",
    "kl_controlled": "the same by kl_penalty's estimate: what the KL controller follows",
    "kl_target": "target of the KL controller (ppo_target)",
    "kl_coef": "beta that this step's rewards (with use_kl_loss: its loss) were made with",
    "entropy": "mean entropy of the policy at a response token, full vocabulary (nats)",
    "policy_loss": "clipped surrogate alone, mean over the step's optimiser steps",
    "kl_loss": "the KL's part of the loss, beta included (with use_kl_loss)",
    "ptx_loss": "mean -log-prob of an answer's token in ptx_dataset, before ptx_coef",
    "value_loss": "clipped value loss with its factor 1/2, before vf_coef",
    "explained_variance": "1 - var(return - value) / var(return), at rollout",
    "value_mean": "mean value of the rollout's states",
    "value_std": "standard deviation of those values",
    "return_mean": "mean return (reward units)",
    "return_std": "standard deviation of the returns",
    "clipfrac": "share of tokens whose policy gradient the clip cut off",
    "value_clipfrac": "share of tokens whose value the clip held",
    "approxkl": "mean k3 estimate of KL(behaviour, policy) over all passes (nats)",
    "policykl": "mean of log-prob before minus after, over all passes (TRL's policykl, nats)",
    "ratio_mean": "mean of policy over behaviour probability",
    "ratio_max": "largest such ratio",
    "ratio_first_pass": "mean |log ratio| before the first update of the step: 0 but for rounding",
    "sampler_gap": "mean of sampler's minus recomputed log-prob: 0 unless sampling is truncated",
    "sampler_gap_abs": "mean of that difference's absolute value: rounding, and what truncates",
    "rollout_is_mean": "mean truncated importance weight of a token (with rollout_is_threshold)",
    "rollout_is_capped": "share of tokens whose weight met rollout_is_threshold",
    "response_length": "mean tokens of a response, EOS included",
    "response_length_max": "longest response",
    "eos_share": "share of responses that ended by themselves",
    "score_length_corr": "correlation of score and response length: near 1 smells of length "
    "hacking",
    "learning_rate": "the actor's",
    "critic_learning_rate": "the critic's",
    "grad_norm_actor": "mean gradient norm before clipping",
    "grad_norm_critic": "mean gradient norm before clipping",
    "optimizer_steps": "optimiser steps taken in this PPO step",
    "skipped_steps": "optimiser steps skipped: a gradient that was not finite, or ratio_threshold",
    "nonfinite_steps": "those of them whose loss or gradient was not finite",
    "nonfinite_run": "such steps in a row, up to this step's last; max_bad_steps of them stop the "
    "run",
    "early_stopped": "1 where the step's epochs were cut short by target_kl",
    "response_tokens": "response tokens in the rollout",
    "update_tokens": "tokens that the update ran over in all its passes, prompts included",
    "guard_nonfinite": "1 where a loss or gradient was not finite",
    "guard_ratio": "1 where ratio_first_pass is above rounding: 1e-5, with tf32 2.5e-3, "
    "with bf16 2e-2",
    "guard_kl": "1 where kl is above 5 times ppo_target",
    "guard_entropy": "1 where entropy is below a tenth of the first step's",
    "guard_eos": "1 where eos_share was above a tenth, and has fallen to a tenth of that",
    "guard_length": "1 where score_length_corr was past 0.6 over the last 10 steps (80 responses)",
    "guard_value_clip": "1 where value_clipfrac was above a quarter over the last 3 steps",
    "guard_sampler": "1 where sampler_gap_abs is above 1e-3, with tf32 1.25e-2, with bf16 0.1, "
    "and nothing truncates",
    "seconds_rollout": "sampling (a clock)",
    "seconds_score": "log-probs, reference, values, reward (a clock)",
    "seconds_advantage": "KL reward, GAE, whitening (a clock)",
    "seconds_update": "PPO epochs (a clock)",
    "seconds": "the whole step (a clock)",
    "rollout_tokens_per_second": "response tokens sampled in a second (a clock)",
    "update_tokens_per_second": "update_tokens by seconds_update (a clock)",
    "tokens_per_second": "response tokens by the seconds of the whole step (a clock)",
}
# Of several rewards each has a column more; its cell is empty where it applied to no response.
REWARD_COLUMN = "reward/{name}"
REWARD_MEANING = "of several rewards: mean score by that one, before its weight"
CRITIC_COLUMNS = {
    "value_loss",
    "explained_variance",
    "value_mean",
    "value_std",
    "value_clipfrac",
    "critic_learning_rate",
    "grad_norm_critic",
}


def absent_columns(config: Config) -> set[str]:
    """Columns that mean nothing in this run: its file does not have them."""
    absent = set() if config.has_critic else set(CRITIC_COLUMNS)
    if not config.use_kl_loss:
        absent.add("kl_loss")
    if config.ptx_dataset is None:
        absent.add("ptx_loss")
    if config.rollout_is_threshold is None:
        absent |= {"rollout_is_mean", "rollout_is_capped"}
    return absent


class MetricsWriter:
    """Writes rows as they come. An earlier run's files are moved aside, never mixed with."""

    def __init__(
        self, folder: Path, rewards: Sequence[str] = (), absent: Collection[str] = ()
    ) -> None:
        self.folder = folder
        self.columns = [name for name in COLUMNS if name not in absent]
        self.reward_columns = [REWARD_COLUMN.format(name=name) for name in rewards]
        self.rows: list[dict[str, float]] = []
        self.is_open = False
        self.drawn, self.drawn_at, self.drawing = 0, -math.inf, 0.0  # rows, when, seconds it took

    def ensure_open(self) -> None:
        """Open on the first write: a run that fails before it leaves earlier files alone."""
        if not self.is_open:
            self.is_open = True
            self._open()

    def _open(self) -> None:
        """Make the folder, move an earlier run's files to previous-<time>, write the header."""
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
        """The header and `rows`, as the file has them."""
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        writer.writerow([*self.columns, *self.reward_columns])
        writer.writerows(self.cells(row) for row in rows)
        return file.getvalue()

    def cells(self, row: Mapping[str, float]) -> list[str]:
        """A row's line."""
        extra = [_number(row[name]) if name in row else "" for name in self.reward_columns]
        return [*(_number(row[name]) for name in self.columns), *extra]

    def go_on(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Resume: a file that begins with `rows` is cut behind them, another is moved aside."""
        text = self.text(rows)
        path = self.folder / CSV
        same = path.is_file() and path.read_bytes().startswith(text.encode())
        self.is_open = True
        if not same:
            self._open()
        write_text(path, text)
        self.rows = [dict(row) for row in rows]

    def add(self, row: Mapping[str, float]) -> None:
        """Append one step."""
        self.ensure_open()
        missing = set(self.columns) - row.keys()
        unknown = row.keys() - set(self.columns) - set(self.reward_columns)
        assert not missing, missing
        assert not unknown, unknown
        self.rows.append(dict(row))
        with (self.folder / CSV).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(self.cells(row))

    def write_json(self, name: str, value: Any) -> None:
        """Write a file of the run's, whole or not at all."""
        write_text(
            self.folder / name,
            json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        )

    def draw(self, title: str, *, share: float = math.inf) -> None:
        """The curves of all rows so far, there whole or as they were.

        Below `share` 1 only where that share of the time since the last drawing pays for it: a run
        of short steps is not slowed.
        """
        path, began = self.folder / CURVES, time.monotonic()
        current = self.drawn == len(self.rows) and path.is_file()
        if not self.rows or current or began - self.drawn_at < self.drawing / share:
            return
        with whole(path) as place:
            plots.draw_curves(self.rows, place, title)
        self.drawn, self.drawn_at = len(self.rows), time.monotonic()
        self.drawing = self.drawn_at - began


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:.9g}"
