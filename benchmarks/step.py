"""One PPO step of SmolLM2-135M on a CPU, side by side with LLaMA-Factory and with TRL.

Each contender is a process of its own, one at a time, in its own environment; each gives seconds by
phase of several steps, and the most memory that its process ever had.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import report
from benchmarks.peers.environments import LLAMAFACTORY, TRL, Environment
from benchmarks.peers.models import for_transformers_4, linked
from benchmarks.report import Load
from benchmarks.step_page import AS_IT_COMES, PHASES, markdown, optimised

PEERS = Path(__file__).parent / "peers"
MODEL = Path("output/demo/model")
FOLDER = Path("output/benchmarks/step")
# 14 to 40 tokens with the template's header and footer.
QUESTIONS = (
    "What is rain?",
    "Name a river in Africa, and say in one sentence where it ends.",
    "Give me three short tips for a first day at a new job, please.",
    "Why is the sky blue? Explain it to a child of six who likes the sea and asks a lot.",
)
LIMIT = 1500  # seconds for one contender
UPPER = 10  # of 30 layers


@dataclass(frozen=True)
class Setting:
    """How a step is cut, the same for all contenders beside each other."""

    checkpointing: bool | None  # None: as fastppo's plan decides
    batch: int
    accumulation: int
    finetuning: str = "lora"

    @property
    def words(self) -> str:
        """As YAML says it."""
        words = [f"batch {self.batch} x accumulation {self.accumulation}"]
        words += [self.finetuning] if self.finetuning != "lora" else []
        words += [AS_IT_COMES] if self.checkpointing is None else []
        return ", ".join(words)


@dataclass(frozen=True)
class Contender:
    """A script, the environment that it runs in (None: this one), and what it is compared with."""

    label: str
    script: str
    environment: Environment | None
    settings: tuple[Setting, ...]
    critic: str
    extra: dict[str, Any] = field(default_factory=dict)  # further keys of fastppo's YAML


@dataclass(frozen=True)
class Case:
    """Contenders beside each other."""

    title: str
    contenders: tuple[Contender, ...]


def cases(
    prompts: Sequence[int] = (4, 8), checkpointing: Sequence[bool] = (True, False)
) -> list[Case]:
    """LLaMA-Factory against a shared critic, TRL against a critic of its own.

    Where they recompute activations, fastppo runs in that way, and as it comes.
    """
    made = []
    for count in prompts:
        for again in checkpointing:
            one, all_ = Setting(again, 1, count), Setting(again, count, 1)
            cut = (one, all_) if count == 4 else (one,)
            head = f"{count} prompts, gradient checkpointing {'on' if again else 'off'}"
            mine = as_it_comes(one)
            shared = Contender("fastppo, critic: shared", "fastppo", None, mine, "shared")
            own = Contender("fastppo, critic: adapter", "fastppo", None, mine, "adapter")
            theirs = Contender(
                "LLaMA-Factory 0.9.5, TRL 0.9.6", "llamafactory", LLAMAFACTORY, cut, "shared"
            )
            trl = Contender("TRL 0.24 PPOTrainer", "trl", TRL, (cut[-1],), "adapter")
            made.append(Case(f"{head}: a critic on the actor's trunk", (theirs, shared)))
            made.append(Case(f"{head}: a critic of its own", (trl, own)))
            if count == 4:
                made.append(frozen(head, again))
    return made


def as_it_comes(setting: Setting) -> tuple[Setting, ...]:
    """The setting, and beside one that recomputes activations the one that fastppo chooses."""
    return (setting, replace(setting, checkpointing=None)) if setting.checkpointing else (setting,)


def frozen(head: str, checkpointing: bool) -> Case:
    """Two upper layers train, which is LLaMA-Factory's default for `freeze`.

    There it takes no adapter as reward model with `freeze`, so for both that is a model of its own.
    """
    one, lora = Setting(checkpointing, 1, 4, "freeze"), Setting(checkpointing, 1, 4)
    theirs = Contender(
        "LLaMA-Factory 0.9.5, TRL 0.9.6", "llamafactory", LLAMAFACTORY, (one,), "shared"
    )
    ours = Contender("fastppo, critic: shared", "fastppo", None, as_it_comes(one), "shared")
    upper = Contender(
        f"fastppo, critic: shared, lora_layers: {UPPER}",
        "fastppo",
        None,
        as_it_comes(lora),
        "shared",
        {"lora_layers": UPPER},
    )
    return Case(f"{head}: the upper layers", (theirs, ours, upper))


class OthersLoad(Load):
    """What neither this process nor those that it has waited for kept busy."""

    @staticmethod
    def _now() -> tuple[float, float]:
        now, busy = Load._now()
        spent = os.times()
        return now, busy - spent.children_user - spent.children_system


def prepare(model: Path) -> dict[str, Any]:
    """Model, prompts and reward model, as every contender's version of its libraries reads them."""
    place = linked(model, FOLDER)
    for_transformers_4(place)
    prompts = {"step_prompts": {"file_name": "prompts.json"}}
    (FOLDER / "dataset_info.json").write_text(json.dumps(prompts), encoding="utf-8")
    full = FOLDER / "reward-full"
    shutil.rmtree(full, ignore_errors=True)
    shutil.copytree(place, full, symlinks=True)
    width = json.loads((place / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    head = {
        "v_head.summary.weight": torch.full((1, width), 0.02),
        "v_head.summary.bias": torch.zeros(1),
    }
    save_file(head, full / "value_head.safetensors")
    return {
        "model": str(place.resolve()),
        "reward": str((FOLDER / "reward").resolve()),
        "full_reward": str(full.resolve()),
        "dataset": "step_prompts",
        "dataset_dir": str(FOLDER.resolve()),
        "template": "smollm",
        "folder": str(FOLDER.resolve()),
        "rank": 8,
        "epochs": 4,
        "new_tokens": 64,
        "learning_rate": 1e-5,
        "seed": 1,
        "steps": 3,
        "extra": {},
    }


def write_prompts(model: str, count: int) -> list[list[int]]:
    """The data set of a case, whose every step takes all of it; and the ids of its prompts."""
    from tokenizers import Tokenizer

    texts = [QUESTIONS[i % len(QUESTIONS)] for i in range(count)]
    records = [{"instruction": text, "input": "", "output": ""} for text in texts]
    (FOLDER / "prompts.json").write_text(json.dumps(records), encoding="utf-8")
    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    return [tokenizer.encode(chat.format(x), add_special_tokens=False).ids for x in texts]


def spawn(
    script: str,
    environment: Environment | None,
    settings: dict[str, Any],
    *,
    folder: Path | None = None,
    limit: float = LIMIT,
) -> dict[str, Any]:
    """Run a contender's script to its end; what it wrote, or why it did not.

    Its settings, result and log lie in `folder`, which is FOLDER if none is given.
    """
    folder = folder or FOLDER
    python = Path(sys.executable) if environment is None else environment.python
    if environment is not None and not environment.ready:
        cure = f"python -m benchmarks.peers.environments {environment.name}"
        return {"status": "absent", "note": f"not installed; run: {cure}"}
    result, log = folder / "result.json", folder / f"{script}.log"
    result.unlink(missing_ok=True)
    path = folder / "settings.json"
    path.write_text(json.dumps({**settings, "result": str(result.resolve())}), encoding="utf-8")
    environ = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "DISABLE_VERSION_CHECK": "1",  # LLaMA-Factory's, which no set of packages satisfies
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "" if environment else str(Path(__file__).parents[1]),
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "WANDB_DISABLED": "true",
    }
    command = [str(python.absolute()), str(PEERS / f"run_{script}.py"), str(path)]
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(
                command, env=environ, stdout=file, stderr=subprocess.STDOUT, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return {"status": "failed", "note": f"did not end within {limit:.0f} s"}
    if done.returncode or (not settings.get("make_reward") and not result.is_file()):
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["nothing said"]
        return {"status": "failed", "note": f"exit code {done.returncode}: {last[0][:300]}"}
    if settings.get("make_reward"):
        return {"status": "timed"}
    return {"status": "timed", **json.loads(result.read_text(encoding="utf-8"))}


def rows(
    wanted: Sequence[Case], model: Path, load: Load, changes: dict[str, Any], ours: bool = False
) -> Iterator[dict[str, Any]]:
    """Every contender of every case, or `ours` alone, one at a time."""
    common = {**prepare(model), **changes}
    first = {**common, **asdict(Setting(False, 1, 1)), "critic": "shared"}
    write_prompts(common["model"], len(QUESTIONS))
    made = spawn("fastppo", None, {**first, "make_reward": True})
    if made["status"] != "timed":
        raise SystemExit(f"benchmarks: the reward model: {made['note']}; see {FOLDER}/fastppo.log")
    for case in wanted:
        for who in case.contenders:
            if ours and who.environment is not None:
                continue
            for setting in who.settings:
                prompts = write_prompts(common["model"], setting.batch * setting.accumulation)
                cut = {**asdict(setting), "critic": who.critic, "prompts": prompts}
                cut["extra"] = {**common["extra"], **who.extra}
                settings = {**common, **cut}
                began = time.perf_counter()
                with load:
                    found = spawn(who.script, who.environment, settings)
                taken = time.perf_counter() - began
                print(f"{case.title}: {who.label}, {setting.words}: {taken:.0f} s", file=sys.stderr)
                yield {
                    "case": case.title,
                    "what": who.label,
                    "ours": who.environment is None,
                    "setting": setting.words,
                    **summary(found, common["new_tokens"] * setting.batch * setting.accumulation),
                }


def summary(found: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Median, least and most of a step's seconds, and the phases of the median step."""
    if found["status"] != "timed":
        return found
    if found["response_tokens"] != tokens:
        came = found["response_tokens"]
        return {"status": "wrong", "note": f"{came} response tokens in place of {tokens}"}
    totals = [step["total"] for step in found["steps"]]
    middle = sorted(found["steps"], key=lambda step: step["total"])[(len(totals) - 1) // 2]
    return {
        **found,
        "seconds": statistics.median(totals),
        "least": min(totals),
        "most": max(totals),
        "phases": {name: middle[name] for name in PHASES},
    }


def main(asked: argparse.Namespace, argv: Sequence[str]) -> int:
    """0, or 1 where a contender of ours failed."""
    before, load = OthersLoad(), OthersLoad()
    with before:
        time.sleep(0.1 if asked.quick else 1.0)
    if not asked.quick and (said := report.warning(before.others())):
        print(f"benchmarks: {said}", file=sys.stderr)
    wanted = [
        case
        for case in cases(asked.prompts, [word == "on" for word in asked.checkpointing])
        if asked.peer is None or case.contenders[0].script in asked.peer
    ]
    changes: dict[str, Any] = {"steps": asked.steps, "products": True}
    if asked.quick:
        changes |= {"steps": 1, "new_tokens": 4, "epochs": 1}
    notes = ["4 tokens and 1 epoch: a walk, no measurement"] if asked.quick else []
    found_rows = list(rows(wanted, asked.model, load, changes, asked.ours))
    out = asked.out or (None if asked.quick else report.RESULTS / "step.json")
    if asked.add and out is not None and out.is_file():
        done = {(row["case"], row["what"], row["setting"]) for row in found_rows}
        earlier = json.loads(out.read_text(encoding="utf-8"))
        found_rows = [
            row for row in earlier["rows"] if (row["case"], row["what"], row["setting"]) not in done
        ] + found_rows
        notes += [note for note in earlier["notes"] if note not in notes]
    notes += [n for n in optimised(found_rows) if n not in notes]
    found = report.result("step", found_rows, before, load, notes, argv)
    print(markdown(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
        print(out)
    return 0 if all(r["status"] == "timed" for r in found_rows if r.get("ours")) else 1
