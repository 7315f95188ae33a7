"""Problems of reasoning-gym with a language model: exact match on problems that it never saw.

    pip install reasoning-gym==0.1.25     # with --no-deps that is enough: see `load`

reasoning-gym's own `score_answer` pays for an answer that is nearly right, or that contains the
right one: a hole that a policy finds. Here the whole response must be the answer. A prompt begins
with a solved problem, as an earlier turn of the chat, and asks for nothing else.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from benchmarks.learn.run import TrainingRun
from fastppo import init_state, step_update, toy
from fastppo.config import Config
from fastppo.ppo.evaluation import compare

VERSION = "0.1.25"
MODEL = Path("output/demo/model")
FORMAT_SHARE = 0.1  # of the reward: for a response that is one number and nothing else
QUALIFIES = (0.05, 0.6)  # the untrained model's accuracy: there is something to learn, and a start
HELD_OUT = 512
SEEDS = {"training": 1000, "held out": 1_000_000, "example": 777}  # reasoning-gym's
TRAINING = 4096  # drawn; those that are held out or repeated are left out
PROBLEMS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> module, settings
    "number_sequence": (
        "cognition.number_sequences",
        {"min_terms": 4, "max_terms": 4, "max_complexity": 1},
    ),
}
TASK = "number_sequence"
BASE: dict[str, Any] = {
    "template": "smollm2",
    "default_system": "",
    "temperature": 0.7,
    "max_new_tokens": 8,
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 64,
    "eval_max_samples": HELD_OUT,
    "max_steps": 16,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "lora_rank": 16,
    "lora_layers": 10,
    "ppo_epochs": 2,
    "init_kl_coef": 0.02,
    "adap_kl_ctrl": False,
}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "PPO": {"critic": "shared", "cliprange_value": None},
    "GRPO": {"advantage": "grpo", "num_generations": 8},
}
QUICK = {
    "max_steps": 2,
    "per_device_train_batch_size": 16,
    "ppo_epochs": 1,
    "eval_max_samples": 16,
    "template": "chatml",
    "lora_layers": 1,
}


def load(name: str) -> Any:
    """The class of a data set and of its settings.

    Its module is loaded alone: the package's `__init__` imports every data set, with a dozen
    packages that these do not need.
    """
    if "reasoning_gym" not in sys.modules:
        spec = importlib.util.find_spec("reasoning_gym")
        if spec is None or not spec.submodule_search_locations:
            sys.exit(f"reasoning-gym is not installed; run: pip install reasoning-gym=={VERSION}")
        bare("reasoning_gym", spec.submodule_search_locations[0])
    folder, _, module = PROBLEMS[name][0].partition(".")
    for package in ("coaching", folder):
        if f"reasoning_gym.{package}" not in sys.modules:
            root = sys.modules["reasoning_gym"].__path__[0]
            bare(f"reasoning_gym.{package}", f"{root}/{package}")
    coaching = sys.modules["reasoning_gym.coaching"]
    for part in ("attributes", "base_curriculum"):  # what the data sets take from it
        found = importlib.import_module(f"reasoning_gym.coaching.{part}")
        vars(coaching).update({k: v for k, v in vars(found).items() if not k.startswith("_")})
    importlib.import_module(f"reasoning_gym.{folder}.{module}")
    return importlib.import_module("reasoning_gym.factory").DATASETS[name]


def bare(name: str, folder: str) -> None:
    """A package in sys.modules, its `__init__` not run."""
    package = ModuleType(name)
    package.__path__ = [folder]
    sys.modules[name] = package


def draw(name: str, part: str, size: int) -> list[tuple[str, str]]:
    """Questions and answers of a part's seed."""
    dataset, settings = load(name)
    made = dataset(settings(**PROBLEMS[name][1], seed=SEEDS[part], size=size))
    return [(x["question"], x["answer"]) for x in made]


def make_records(name: str, held_out: int = HELD_OUT) -> dict[str, list[dict[str, Any]]]:
    """Training and held-out problems as records, none in both; `answer` is the reward's column."""
    ((question, answer),) = draw(name, "example", 1)
    example = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    held = draw(name, "held out", held_out)
    training = dict(draw(name, "training", TRAINING))
    for known, _ in [(question, answer), *held]:
        training.pop(known, None)
    return {
        part: [
            {"messages": [*example, {"role": "user", "content": q}], "answer": a} for q, a in pairs
        ]
        for part, pairs in (("training", training.items()), ("held_out", held))
    }


def is_number(completion: str) -> bool:
    """Whether the whole response is one whole number."""
    text = completion.strip()
    return text.isascii() and text.removeprefix("-").isdecimal()


def is_right(completion: str, answer: str) -> bool:
    """Exact match of the whole response."""
    return completion.strip() == answer


def reward(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """1 for the answer; FORMAT_SHARE for any one whole number; else 0."""
    return [
        1.0 if is_right(text, right) else FORMAT_SHARE if is_number(text) else 0.0
        for text, right in zip(completions, answer, strict=True)
    ]


def interval(right: int, of: int) -> tuple[float, float]:
    """Wilson's interval of a share, 95%.

    Source: Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference.
    """
    z = 1.959964
    share, spread = right / of, z * z / of
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / of + spread / (4 * of))
    return middle - half, middle + half


def by_chance(answers: Sequence[str]) -> float:
    """Exact match of an answer drawn from those of all problems, whatever is asked."""
    return sum(count**2 for count in Counter(answers).values()) / len(answers) ** 2


def by_constant(answers: Sequence[str]) -> float:
    """Exact match of the commonest answer: no answer that is always the same has more."""
    return max(Counter(answers).values()) / len(answers)


@dataclass(frozen=True)
class ProblemRun(TrainingRun):
    """One training run on a task of reasoning-gym, with its settings and the name of its JSON."""

    task: str
    name: str
    seed: int
    changes: dict[str, Any] = field(default_factory=dict)
    section: str = "problems"
    quick: ClassVar[dict[str, Any]] = QUICK

    @property
    def file(self) -> str:
        """The name of its JSON."""
        return f"{self.section}-{self.task}-{self.name.lower()}-{self.seed}.json"

    @property
    def base(self) -> dict[str, Any]:
        """The settings of all runs on these tasks."""
        return BASE

    def result(self, settings: dict[str, Any], place: Path, quick: bool) -> dict[str, Any]:
        """Run it with fastppo's own loop; accuracy before and after."""
        model = place / "model" if quick else MODEL
        if quick:
            toy.write_model(model)
        elif not (model / "model.safetensors").is_file():
            sys.exit(f"{model} is not there; run: python examples/demo_model.py")
        records = make_records(self.task)
        for name, rows in records.items():
            (place / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        config = Config(
            **settings,
            stage="ppo",
            model_name_or_path=str(model),
            dataset=str(place / "training.json"),
            eval_dataset=str(place / "held_out.json"),
            reward_model=f"{__name__}:reward",
            reward_model_type="function",
            output_dir=str(place / "out"),
            metrics_dir=str(place / "metrics"),
            disable_gradient_checkpointing=True,
            use_cpu=True,
        )
        state = init_state(config)
        for _ in range(config.max_steps):
            state = step_update(state)
        compared = compare(state)
        answers = [prompt.columns["answer"] for prompt in compared.prompts]
        accuracy = {}
        for when, found in (("before", compared.before), ("after", compared.after)):
            right = sum(map(is_right, found.texts, answers))
            numbers = sum(map(is_number, found.texts))
            low, high = interval(right, len(answers))
            accuracy |= {
                f"right_{when}": right,
                f"accuracy_{when}": right / len(answers),
                f"interval_{when}": [low, high],
                f"numbers_{when}": numbers / len(answers),
            }
        scores = [row["score"] for row in state.metrics.rows]
        return {
            "problem": PROBLEMS[self.task][1],
            "samples": config.max_steps * config.rollout_batch_size,
            "training": len(records["training"]),
            "held_out": len(answers),
            "accuracy_by_chance": by_chance(answers),
            "accuracy_by_constant": by_constant(answers),
            **accuracy,
            "kl": compared.after.kl,
            "scores": [round(score, 4) for score in scores],
        }


def problems(seeds: tuple[int, ...]) -> Iterator[ProblemRun]:
    """PPO and GRPO at equal samples."""
    for name, changes in ESTIMATORS.items():
        for seed in seeds:
            yield ProblemRun(TASK, name, seed, changes)
