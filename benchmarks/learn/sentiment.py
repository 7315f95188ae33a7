"""The demo's task: what the reward model pays for, beside what was meant.

Stage ppo on SmolLM2-135M with the reward model that `make demo` leaves (the proxy). The demo's
judge is the gold score. It is a reward of weight 0: computed of the texts of every rollout, which
costs no further sampling, and no part of the score.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from benchmarks.learn.run import TrainingRun, file_name
from fastppo import init_state, step_update, toy
from fastppo.config import Config
from fastppo.config.rewards import RECORD
from fastppo.models.build import build
from fastppo.ppo.evaluation import compare
from fastppo.run.save import save_model

if TYPE_CHECKING:
    from fastppo.ppo.state import State

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
GOLD = "examples.demo_judge:judge"
HELD_OUT = 96
BASE: dict[str, Any] = {
    "template": "smollm2",
    "default_system": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "temperature": 0.7,
    "max_new_tokens": 16,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 48,
    "eval_max_samples": HELD_OUT,
    "max_steps": 100,
    "learning_rate": 7e-4,
    "lr_scheduler_type": "constant",
    "adam_epsilon": 1e-5,
    "lora_rank": 16,
    "lora_layers": 10,
    "ppo_epochs": 2,
}
# One change between the two. beta begins so low that it holds nobody back.
CONTROLLERS: dict[str, dict[str, Any]] = {
    "controller on": {"adap_kl_ctrl": True},
    "controller off": {"adap_kl_ctrl": False},
}
CONTROLLED: dict[str, Any] = {
    "critic": "shared",
    "critic_learning_rate": 1e-3,
    "cliprange_value": None,
    "init_kl_coef": 0.01,
    "ppo_target": 6.0,
    "horizon": 32,
}
# One change each from "controller on": of the choices on the token task the two that matter most,
# how the KL is estimated and what the critic is.
CHOICES: dict[str, dict[str, Any]] = {
    "kl_penalty: low_var_kl (k3)": {"kl_penalty": "low_var_kl"},
    "critic: adapter": {"critic": "adapter"},
}
QUICK: dict[str, Any] = {
    "template": "chatml",
    "default_system": "",
    "max_new_tokens": 6,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "eval_max_samples": 8,
    "max_steps": 2,
    "lora_rank": 4,
    "lora_layers": 1,
}


@dataclass(frozen=True)
class Files:
    """The models and prompts of a run."""

    model: Path
    reward: Path
    prompts: Path
    held_out: Path


def demo_files() -> Files:
    """Those that `make demo` leaves, and the demo's prompts."""
    files = Files(
        Path("output/demo/model"),
        Path("output/demo/reward"),
        DATA / "demo_prompts.json",
        DATA / "demo_eval_prompts.json",
    )
    for folder, name in ((files.model, "model.safetensors"), (files.reward, RECORD)):
        if not (folder / name).is_file():
            sys.exit(f"{folder} is not there; run: make demo")
    return files


def toy_files(folder: Path) -> Files:
    """A random model with a random reward model on it: for a walk."""
    made = Files(*(folder / x for x in ("model", "reward", "prompts.json", "held_out.json")))
    toy.write_model(made.model)
    for path, first in ((made.prompts, 0), (made.held_out, 100)):
        records = [{"instruction": f"Write line {first + i}."} for i in range(8)]
        path.write_text(json.dumps(records), encoding="utf-8")
    config = Config(
        stage="ppo",
        model_name_or_path=str(made.model),
        reward_model="fastppo.toy:vowels",
        reward_model_type="function",
        critic="adapter",
        dataset=str(made.prompts),
        template="chatml",
        output_dir=str(folder / "unused"),
        use_cpu=True,
    )
    roles = build(config, torch.device("cpu"))
    assert roles.critic_head is not None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*roles.trainable_parameters("actor"), roles.critic_head.weight]:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_model(roles.model, roles.critic_head, toy.byte_tokenizer(), made.reward)
    record = {"score_at": "eos", "template": "chatml"}
    (made.reward / RECORD).write_text(json.dumps(record), encoding="utf-8")
    return made


def make_config(settings: dict[str, Any], files: Files, folder: Path) -> Config:
    """The configuration of a run whose output lies in `folder`."""
    return Config(
        **settings,
        stage="ppo",
        model_name_or_path=str(files.model),
        reward_model=f"{files.reward},{GOLD}",
        reward_model_type="lora,function",
        reward_weights=(1.0, 0.0),
        dataset=str(files.prompts),
        eval_dataset=str(files.held_out),
        output_dir=str(folder / "out"),
        metrics_dir=str(folder / "metrics"),
        disable_gradient_checkpointing=True,
        use_cpu=True,
    )


def train(state: State) -> dict[str, Any]:
    """Train to the end; KL, proxy and gold score of every rollout, and the updates."""
    proxy, gold = state.reward.extra_names
    size = state.config.rollout_batch_size
    for _ in range(state.config.max_steps):
        state = step_update(state)
    return {
        "updates": int(sum(row["optimizer_steps"] for row in state.metrics.rows)),
        "curve": [
            {
                "step": row["step"],
                "samples": row["step"] * size,
                "kl": round(row["kl"], 4),
                "proxy": round(row[f"reward/{proxy}"], 4),
                "gold": round(row[f"reward/{gold}"], 4),
                "kl_coef": round(row["kl_coef"], 5),
                "length": row["response_length"],
            }
            for row in state.metrics.rows
        ],
    }


def held_out(state: State) -> dict[str, Any]:
    """Both scores of reference and policy on prompts that the training has not."""
    compared = compare(state)
    found: dict[str, Any] = {"held_out": len(compared.prompts), "kl": compared.after.kl}
    for what, name in zip(("proxy", "gold"), state.reward.extra_names, strict=True):
        before, after = (x.reward_parts[name].tolist() for x in (compared.before, compared.after))
        changes = [a - b for a, b in zip(after, before, strict=True)]
        found |= {
            f"{what}_before": statistics.mean(before),
            f"{what}_after": statistics.mean(after),
            f"{what}_error": standard_error(changes),  # of the change, prompt by prompt
        }
    for when, answers in (("before", compared.before), ("after", compared.after)):
        found[f"length_{when}"] = statistics.mean(answers.lengths)
        found[f"eos_share_{when}"] = statistics.mean(map(float, answers.terminated))
    return found


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values."""
    return statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class SentimentRun(TrainingRun):
    """One training run on the demo's task, with its settings and the name of its JSON."""

    name: str
    seed: int
    changes: dict[str, Any] = field(default_factory=dict)
    section: str = "sentiment"
    task: str = "sentiment"
    quick: ClassVar[dict[str, Any]] = QUICK

    @property
    def file(self) -> str:
        """The name of its JSON."""
        return file_name(self.section, self.name, self.seed)

    @property
    def base(self) -> dict[str, Any]:
        """The settings of all runs on this task."""
        return BASE

    def result(self, settings: dict[str, Any], place: Path, quick: bool) -> dict[str, Any]:
        """Run it with fastppo's own loop; the scores of rollouts and held-out prompts."""
        files = toy_files(place) if quick else demo_files()
        state = init_state(make_config(settings, files, place))
        trained = train(state)
        found = held_out(state)
        return {"samples": trained["curve"][-1]["samples"], **found, **trained}


def sentiment(seeds: tuple[int, ...]) -> Iterator[SentimentRun]:
    """PPO against the reward model, with a beta that follows a target and one that stays."""
    for seed in seeds:
        for name, changes in CONTROLLERS.items():
            yield SentimentRun(name, seed, {**CONTROLLED, **changes})


def sentiment_choices(seeds: tuple[int, ...]) -> Iterator[SentimentRun]:
    """PPO with the controller on, and one setting changed."""
    base = {**CONTROLLED, **CONTROLLERS["controller on"]}
    for seed in seeds:
        for name, changes in CHOICES.items():
            yield SentimentRun(name, seed, {**base, **changes}, section="sentiment_choices")
