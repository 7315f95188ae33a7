"""The demo's task by fastppo and by TRL 0.24's PPOTrainer: equal samples, updates and settings.

    python -m benchmarks.peers.environments trl     # TRL's environment

Both train the same adapters from the same prompts against the same reward model, the critic of each
begins as that model, and the policy of each answers the held-out prompts here, by one sampler and
with the same random numbers. Each trainer has the best of the same learning rates, on a seed that
is not reported.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks import report
from benchmarks.learn import sentiment
from benchmarks.learn.run import TrainingRun, file_name
from benchmarks.learn.sentiment import Files, demo_files, held_out, make_config, toy_files
from benchmarks.peers.environments import TRL
from benchmarks.peers.models import for_transformers_4, linked
from benchmarks.step import spawn
from fastppo import init_state
from fastppo.export.cli import main as export
from fastppo.ppo.evaluate_only import load_policy
from fastppo.rewards.function import load_function

if TYPE_CHECKING:
    from fastppo.ppo.state import State

RESULTS = report.RESULTS / "learn"
TRAINERS = ("fastppo", "TRL")
RATES = (1e-4, 3e-4, 1e-3)
STEPS, TRIED = 40, 15  # of a reported run, and of one that tries a learning rate
TUNING_SEED = 0
LIMIT = 4 * 3600  # seconds for a run of TRL's
SETTINGS: dict[str, Any] = {
    "critic": "adapter",
    "adap_kl_ctrl": False,
    "init_kl_coef": 0.02,
    "lr_scheduler_type": "linear",
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "gamma": 1.0,
    "lam": 0.95,
    "max_grad_norm": 0.0,  # TRL's PPOTrainer clips no gradient
}


@dataclass(frozen=True)
class BesideRun(TrainingRun):
    """One run of one of the trainers, with its settings and the name of its JSON."""

    section: str
    trainer: str
    seed: int
    changes: dict[str, Any] = field(default_factory=dict)
    task: str = "sentiment"
    quick: ClassVar[dict[str, Any]] = sentiment.QUICK

    @property
    def name(self) -> str:
        """The trainer, and where rates are tried its rate."""
        tries = self.section == "trl_rates"
        return f"{self.trainer} {self.settings['learning_rate']:g}" if tries else self.trainer

    @property
    def file(self) -> str:
        """The name of its JSON."""
        return file_name(self.section, self.name, self.seed)

    @property
    def base(self) -> dict[str, Any]:
        """The settings of both trainers' runs."""
        return {**sentiment.BASE, **SETTINGS}

    def result(self, settings: dict[str, Any], place: Path, quick: bool) -> dict[str, Any]:
        """Train by the trainer, and answer the held-out prompts here."""
        files = toy_files(place) if quick else demo_files()
        ours = self.trainer == "fastppo"
        # Without training here a critic is only in the way, and this is the smallest.
        own = settings if ours else {**settings, "critic": "shared"}
        state = init_state(make_config(own, files, place))
        trained = sentiment.train(state) if ours else train_by_trl(state, files, place)
        found = held_out(state)
        samples = trained["curve"][-1]["samples"]
        return {"trainer": self.trainer, "samples": samples, **found, **trained}


def peer_settings(state: State, files: Files, place: Path) -> dict[str, Any]:
    """What run_trl_learn.py is given; writes the models as its versions of libraries read them."""
    config = state.config
    model = linked(files.model, place / "peer")
    classifier = place / "peer" / "classifier"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        if export([str(files.reward), str(classifier)]):
            sys.exit(f"the reward model {files.reward} was not exported: {said.getvalue()}")
    for_transformers_4(model)
    for_transformers_4(classifier)
    depth = json.loads((model / "config.json").read_text("utf-8"))["num_hidden_layers"]
    return {
        "model": str(model),
        "classifier": str(classifier),
        "folder": str(place / "peer"),
        "adapter": str(place / "peer" / "policy"),
        "prompts": [prompt.ids for prompt in state.prompts],
        "rank": config.lora_rank,
        "layers": list(range(depth - (config.lora_layers or depth), depth)),
        "batch": config.per_device_train_batch_size,
        "steps": config.max_steps,
        "epochs": config.ppo_epochs,
        "new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "learning_rate": config.learning_rate,
        "scheduler": config.lr_scheduler_type,
        "adam_epsilon": config.adam_epsilon,
        "kl_coef": config.init_kl_coef,
        "cliprange": config.cliprange,
        "cliprange_value": config.cliprange_value,
        "vf_coef": config.vf_coef,
        "gamma": config.gamma,
        "lam": config.lam,
        "seed": config.seed,
    }


def train_by_trl(state: State, files: Files, place: Path) -> dict[str, Any]:
    """Train in TRL's environment; its policy is the state's actor then."""
    asked = peer_settings(state, files, place)
    found = spawn("trl_learn", TRL, asked, folder=Path(asked["folder"]), limit=LIMIT)
    if found["status"] != "timed":
        sys.exit(f"TRL: {found['note']}")
    load_policy(state.roles, Path(asked["adapter"]))
    judge = load_function(sentiment.GOLD, "gold")
    return {
        "updates": found["updates"],
        "versions": {name: found[name] for name in ("trl", "transformers", "peft", "torch")},
        "curve": [
            {
                "step": step,
                "samples": step * asked["batch"],
                "kl": round(kl, 4),
                "proxy": round(proxy, 4),
                "gold": round(statistics.mean(judge(prompts=[], completions=texts)), 4),
            }
            for step, (kl, proxy, texts) in enumerate(
                zip(found["kl"], found["proxy"], found["texts"], strict=True), 1
            )
        ],
    }


def best_rate(trainer: str, folder: Path = RESULTS) -> float:
    """The learning rate with the best gold score among the committed runs of `trl_rates`.

    Without such runs it is the middle one.
    """
    found = [json.loads(p.read_text("utf-8")) for p in sorted(folder.glob("trl_rates-*.json"))]
    own = [row for row in found if row["trainer"] == trainer]
    if not own:
        return RATES[len(RATES) // 2]
    rate: float = max(own, key=lambda row: row["gold_after"])["settings"]["learning_rate"]
    return rate


def trl_rates(seeds: tuple[int, ...]) -> Iterator[BesideRun]:
    """Both trainers at every learning rate, on the seed that is for this alone."""
    del seeds
    for trainer in TRAINERS:
        for rate in RATES:
            changes = {"learning_rate": rate, "max_steps": TRIED}
            yield BesideRun("trl_rates", trainer, TUNING_SEED, changes)


def trl(seeds: tuple[int, ...]) -> Iterator[BesideRun]:
    """Both trainers at their best learning rate."""
    for seed in seeds:
        for trainer in TRAINERS:
            changes = {"learning_rate": best_rate(trainer), "max_steps": STEPS}
            yield BesideRun("trl", trainer, seed, changes)
