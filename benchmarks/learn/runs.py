"""All runs by section; those on the token tasks, and what each leaves."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import report
from benchmarks.learn.beside_trl import trl, trl_rates
from benchmarks.learn.exact import Tree, Value, best_policy, logprobs, make_tree, value
from benchmarks.learn.problems import problems
from benchmarks.learn.run import TrainingRun, file_name
from benchmarks.learn.sentiment import sentiment, sentiment_choices
from benchmarks.learn.tokens import LETTERS, TASKS, write_files
from fastppo import init_state, step_update
from fastppo.config import Config

SEEDS = (1, 2, 3)
TUNING_SEED = 0  # learning rates are chosen by it, and it is reported nowhere else
RATES = (1e-2, 3e-2)
BETA = 0.05
BATCH = 256
STEPS = 60
GROUP = 8
EVERY = 5  # steps between two computations of the objective
BASE: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": 1,
    "max_steps": STEPS,
    "lr_scheduler_type": "linear",
    "init_kl_coef": BETA,
    "adap_kl_ctrl": False,
}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "PPO": {},
    "GRPO": {"advantage": "grpo", "num_generations": GROUP},
    "RLOO": {"advantage": "rloo", "num_generations": GROUP},
}
# One change each from PPO as it is in `compare`.
CHOICES: dict[str, dict[str, Any]] = {
    "critic: shared": {"critic": "shared"},
    "critic: shared, vf_coef: 1": {"critic": "shared", "vf_coef": 1.0},
    "no critic (reinforce++)": {"advantage": "reinforce++"},
    "ppo_epochs: 1": {"ppo_epochs": 1},
    "ppo_epochs: 2": {"ppo_epochs": 2},
    "kl_penalty: low_var_kl (k3)": {"kl_penalty": "low_var_kl"},
    "kl_penalty: full (exact)": {"kl_penalty": "full"},
    "use_kl_loss: true (k3 in the loss)": {"use_kl_loss": True},
    "whiten_advantages: false": {"whiten_advantages": False},
    "cliprange_value: null": {"cliprange_value": None},
    "lam: 1": {"lam": 1.0},
    "lora_rank: 1": {"lora_rank": 1},
    "lora_rank: 32": {"lora_rank": 32},
    "finetuning_type: full": {"finetuning_type": "full"},
}
# The controller's runs: TRL's horizon, and one that fits 200 steps of 64 responses.
CONTROLLERS: dict[str, dict[str, Any]] = {
    f"horizon: {horizon}": {"horizon": horizon} for horizon in (1000, 10000)
}
CONTROLLED = {
    "per_device_train_batch_size": 64,
    "max_steps": 200,
    "ppo_epochs": 2,
    "ppo_target": 2.0,
    "lr_scheduler_type": "constant",
    "init_kl_coef": 0.2,
    "adap_kl_ctrl": True,
}
WITHIN = 50  # the controller is judged by the last steps
RESULTS = report.RESULTS / "learn"
QUICK = {"max_steps": 2, "per_device_train_batch_size": 32, "ppo_epochs": 1}


@dataclass(frozen=True)
class Run(TrainingRun):
    """One training run: its settings, and the name of its JSON."""

    section: str
    task: str
    name: str
    seed: int
    changes: dict[str, Any] = field(default_factory=dict)
    quick: ClassVar[dict[str, Any]] = QUICK

    @property
    def file(self) -> str:
        """The name of its JSON."""
        return file_name(self.section, f"{self.task} {self.name}", self.seed)

    @property
    def base(self) -> dict[str, Any]:
        """The settings of all runs on a token task."""
        return {**BASE, "max_new_tokens": TASKS[self.task].length}

    def result(self, settings: dict[str, Any], place: Path, quick: bool) -> dict[str, Any]:
        """Run it with fastppo's own loop; the objective on the way, computed."""
        responses = settings["per_device_train_batch_size"]
        config = Config(
            **write_files(place, responses // settings.get("num_generations", 1)),
            **settings,
            stage="ppo",
            template="empty",
            default_system="",
            reward_model=TASKS[self.task].target,
            reward_model_type="function",
            output_dir=str(place / "out"),
            metrics_dir=str(place / "metrics"),
            disable_gradient_checkpointing=True,
            use_cpu=True,
        )
        state = init_state(config)
        exact = Exact(self.task, state, config.init_kl_coef)
        curve = [{"samples": 0, **exact.value()._asdict()}]
        for step in range(1, config.max_steps + 1):
            state = step_update(state)
            if step % EVERY == 0 or step == config.max_steps:
                samples = step * config.rollout_batch_size
                curve.append({"samples": samples, **exact.value()._asdict()})
        rows = state.metrics.rows
        start, optimum, end = curve[0], exact.optimum, curve[-1]
        found: dict[str, Any] = {
            "beta": config.init_kl_coef,
            "start": {key: start[key] for key in Value._fields},
            "optimum": optimum._asdict(),
            "end": {key: end[key] for key in Value._fields},
            "share": (end["objective"] - start["objective"])
            / (optimum.objective - start["objective"]),
            "curve": curve,
        }
        if config.adap_kl_ctrl:
            last = [row["kl_controlled"] for row in rows[-WITHIN:]]
            found |= {
                "target": config.ppo_target,
                "kl_last": sum(last) / len(last),
                "kl_by_step": [round(row["kl_controlled"], 4) for row in rows],
                "kl_coef_by_step": [round(row["kl_coef"], 5) for row in rows],
            }
            # beta moved: the objective at one beta is not what this run was after.
            for name in ("start", "optimum", "end", "share"):
                del found[name]
        return found


def best_rate(name: str, folder: Path = RESULTS) -> float:
    """The learning rate at which the estimator comes furthest in the committed runs of `rates`.

    Without such runs it is PPO's, and without those the first of RATES.
    """
    found = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("rates-*.json"))]
    of_name = [row for row in found if row["name"].split()[0] == name]
    of_name = of_name or [row for row in found if row["name"].split()[0] == "PPO"]
    if not of_name:
        return RATES[0]
    rate: float = max(of_name, key=lambda row: row["share"])["settings"]["learning_rate"]
    return rate


def compare(seeds: tuple[int, ...]) -> Iterator[Run]:
    """PPO, GRPO and RLOO at equal samples."""
    for seed in seeds:
        for task in TASKS:
            for name, changes in ESTIMATORS.items():
                rate = {"learning_rate": best_rate(name)}
                yield Run("compare", task, name, seed, {**changes, **rate})


def controller(seeds: tuple[int, ...]) -> Iterator[Run]:
    """PPO with a beta that follows a target."""
    rate = {"learning_rate": 3e-3}  # constant: a beta that moves has no end to decay to
    for seed in seeds:
        for name, changes in CONTROLLERS.items():
            yield Run("controller", "alphabet", name, seed, {**CONTROLLED, **rate, **changes})


def rates(seeds: tuple[int, ...]) -> Iterator[Run]:
    """Every estimator at every learning rate, on the seed that is for this alone."""
    del seeds
    for name, changes in ESTIMATORS.items():
        for rate in RATES:
            keys = {**changes, "learning_rate": rate}
            yield Run("rates", "alphabet", f"{name} {rate:g}", TUNING_SEED, keys)


def choices(seeds: tuple[int, ...]) -> Iterator[Run]:
    """PPO with one setting changed."""
    for seed in seeds:
        for name, changes in CHOICES.items():
            rate = {"learning_rate": best_rate("PPO")}
            yield Run("choices", "alphabet", name, seed, {**rate, **changes})


SECTIONS: dict[str, Callable[[tuple[int, ...]], Iterator[TrainingRun]]] = {
    one.__name__: one
    for one in (
        rates,
        compare,
        controller,
        problems,
        choices,
        sentiment,
        sentiment_choices,
        trl_rates,
        trl,
    )
}


class Exact:
    """The objective of a run's policy, computed; and its start and optimum."""

    def __init__(self, task: str, state: Any, beta: float) -> None:
        one = TASKS[task]
        self.tree: Tree = make_tree(LETTERS, LETTERS, one.length, one.reward)
        self.state, self.beta = state, beta
        self.reference = logprobs(state.roles, "reference", self.tree)

    def value(self) -> Value:
        """Of the policy as it is now."""
        policy = logprobs(self.state.roles, "actor", self.tree)
        return value(self.tree, policy, self.reference, self.beta)

    @cached_property
    def optimum(self) -> Value:
        """Of the best policy."""
        _, best = best_policy(self.tree, self.reference, self.beta)
        return value(self.tree, best, self.reference, self.beta)


def save(run: TrainingRun, found: dict[str, Any], folder: Path, command: str) -> Path:
    """Write a run's JSON with machine and day."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / run.file
    made = {
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
        "machine": {**report.machine(), "backend": os.environ.get("FASTPPO_BACKEND")},
        **found,
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    part.replace(path)  # a run that is cut off leaves no half of a JSON
    return path


def is_done(run: TrainingRun, folder: Path, quick: bool = False) -> bool:
    """Whether the run's JSON is there, of the same settings; a quick one's are others."""
    path = folder / run.file
    if not path.is_file():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    changes = run.quick if quick else {}
    same: bool = found["settings"] == {**run.settings, **changes}
    return same


def message(found: dict[str, Any]) -> str:
    """What a run reached, in a few words."""
    if "share" in found:
        reached = f"{found['share']:.1%} of the way to the optimum"
    elif "kl_last" in found:
        reached = f"KL {found['kl_last']:.2f} for a target of {found['target']:g}"
    elif "gold_after" in found:
        reached = (
            f"gold {found['gold_before']:+.2f} -> {found['gold_after']:+.2f}, proxy "
            f"{found['proxy_before']:+.2f} -> {found['proxy_after']:+.2f}, KL {found['kl']:.1f}"
        )
    else:
        reached = f"accuracy {found['accuracy_before']:.1%} -> {found['accuracy_after']:.1%}"
    return f"{reached}, {found['seconds']:.0f} s"
