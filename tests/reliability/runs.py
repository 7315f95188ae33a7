"""Runs of the command in processes of their own, forked from one that has imported everything.

A child is a real process and dies a real death; what it saves is the seconds that torch and
transformers take to import.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastppo import cli, toy
from fastppo.ppo import checkpoint, evaluation, sampling, score, trainer, update
from fastppo.ppo.columns import COLUMNS
from fastppo.rewards import function as reward_function
from fastppo.rm import train as reward_model
from fastppo.rm import trainer as pair_trainer
from fastppo.run import plots
from tests.limits import HANGS

CLOCKS = {name for name, meaning in COLUMNS.items() if "(a clock)" in meaning}
CLOCK_WORDS = ("seconds", "runtime", "per_second")  # in keys of summary.json and transformers'
PROMPTS = ["Hi", "What is rain?", "A line on tea, please.", "Tell me of the sea.", "Who?", "Go on."]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([__name__, "matplotlib.figure", "matplotlib.backends.backend_agg"])


def noisy(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward that draws from every generator that a user's function may draw from."""
    luck = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
    return [score + 0.01 * sum(luck) for score in toy.vowels(prompts, completions)]


def ppo(folder: Path, **changes: Any) -> dict[str, Any]:
    """Five steps with everything in them that a resume could forget; files below `folder`."""
    answers = [{"instruction": f"Say {i}.", "output": "aeiou " * i} for i in range(1, 4)]
    write_once(folder / "prompts.json", [{"instruction": text} for text in PROMPTS])
    write_once(folder / "answers.json", answers)
    return {
        "stage": "ppo",
        "model_name_or_path": str(model(folder)),
        "reward_model": "tests.reliability.runs:noisy",
        "reward_model_type": "function",
        "dataset": str(folder / "prompts.json"),
        "ptx_dataset": str(folder / "answers.json"),
        "ptx_coef": 0.1,
        "template": "chatml",
        "default_system": "",
        "output_dir": str(folder / "out"),
        "metrics_dir": str(folder / "metrics"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_new_tokens": 8,
        "max_steps": 5,
        "ppo_epochs": 2,
        "ppo_score_norm": True,
        "horizon": 50,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "activation_offloading": "auto",
        "save_steps": 2,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "eval_max_samples": 2,
        "eval_judge": "tests.reliability.runs:noisy",
        **changes,
    }


def rm(folder: Path, **changes: Any) -> dict[str, Any]:
    """A reward model whose adapters drop out, so that every step draws random numbers."""
    pairs = [
        {"instruction": f"Word {i}", "chosen": "aeiou " * (1 + i % 3), "rejected": "xyz " * 3}
        for i in range(18)
    ]
    write_once(folder / "pairs.json", pairs)
    info = {"pairs": {"file_name": "pairs.json", "ranking": True}}
    info["pairs"]["columns"] = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    write_once(folder / "dataset_info.json", info)
    return {
        "stage": "rm",
        "model_name_or_path": str(model(folder)),
        "dataset": "pairs",
        "dataset_dir": str(folder),
        "val_size": 4,
        "template": "chatml",
        "default_system": "",
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lora_dropout": 0.1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 3,
        "logging_steps": 3,
        "save_steps": 2,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "calibrate_reward": True,
        **changes,
    }


def write_once(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps(value), encoding="utf-8")


def model(folder: Path) -> Path:
    """The tiny model that all runs share, beside their folders."""
    place = folder.parent / "model"
    if not place.exists():
        toy.write_model(place)
    return place


# What happens to a run; called in the child, before the command.


class Countdown:
    """Kills its process at the n-th call of a function, Python's or C's; counts to `count`."""

    def __init__(self, n: int, count: Path) -> None:
        self.left, self.calls, self.count = n, 0, count

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        self.calls += 1
        if self.calls == self.left:
            os.kill(os.getpid(), signal.SIGKILL)

    def start(self) -> None:
        sys.setprofile(self)

    def stop(self) -> None:
        sys.setprofile(None)
        self.count.write_text(str(self.calls))


def kill_anywhere(n: int, count: str) -> None:
    """From the first call of the run on; n 0 counts and kills nobody."""
    countdown = Countdown(n, Path(count))
    for module in (trainer, reward_model):
        around(module, "run", countdown)


def kill_while_saving(n: int, count: str) -> None:
    """Counted only while a checkpoint is being written."""
    countdown = Countdown(n, Path(count))
    around(checkpoint, "save_to_resume", countdown)
    around(pair_trainer.ResumableTrainer, "_save_checkpoint", countdown)


def around(owner: Any, name: str, countdown: Countdown) -> None:
    """Count during every call of `owner.name`."""
    inner = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        countdown.start()
        try:
            return inner(*args, **kwargs)
        finally:
            countdown.stop()

    setattr(owner, name, counted)


def limit_files(after: int, nbytes: int) -> None:
    """From the save number `after` on no file of this process grows past `nbytes`."""
    for owner, name in (
        (checkpoint, "save_to_resume"),
        (pair_trainer.ResumableTrainer, "_save_checkpoint"),
    ):
        limited(owner, name, after, nbytes)


def limit_final(nbytes: int) -> None:
    """The same from the evaluation after the last step on."""
    inner = evaluation.evaluate

    def evaluate(state: Any) -> Any:
        if state.step == state.config.max_steps:
            set_limit(nbytes)
        return inner(state)

    evaluation.evaluate = evaluate


def limited(owner: Any, name: str, after: int, nbytes: int) -> None:
    inner, calls = getattr(owner, name), []

    def save(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) >= after:
            set_limit(nbytes)
        return inner(*args, **kwargs)

    setattr(owner, name, save)


def set_limit(nbytes: int) -> None:
    """Past it the kernel refuses to write (EFBIG): the nearest to a full disk without root."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))


def full_device(step: int, path: str) -> None:
    """After step `step` the metrics file is /dev/full, whose every write fails (ENOSPC)."""
    inner = trainer.step_update

    def step_update(state: Any) -> Any:
        if state.step == step:
            Path(path).unlink()
            Path(path).symlink_to("/dev/full")
        return inner(state)

    trainer.step_update = step_update


def slow_steps(seconds: float) -> None:
    """Time for somebody to send a signal."""
    inner = trainer.score

    def scored(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return inner(*args, **kwargs)

    trainer.score = scored


def slow_pairs(seconds: float) -> None:
    """The same in stage rm."""
    inner = pair_trainer.ResumableTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return inner(self, *args, **kwargs)

    pair_trainer.ResumableTrainer.training_step = training_step


PLACES = {
    "a token": (sampling.Draws, "draw"),
    "scoring": (score, "token_scores"),
    "a reward function": (reward_function, "call_scores"),
    "the update": (update, "clip_and_step"),
    "an evaluation": (evaluation, "answer"),
    "a pair": (pair_trainer, "pair_loss"),
}


def stuck(place: str, step: int, calls: int, seen: str) -> None:
    """In PPO step `step` (0: anywhere) the call number `calls` of a place has done its work, and
    then takes a minute more; the file `seen` is there from then on."""
    owner, name = PLACES[place]
    inner, inner_step = getattr(owner, name), trainer.step_update
    at, made = [0], [0]

    def step_update(state: Any) -> Any:
        at[0], made[0] = state.step + 1, 0
        return inner_step(state)

    def slow(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        made[0] += 1
        if made[0] == calls and step in (0, at[0]):
            Path(seen).touch()
            time.sleep(60)
        return result

    trainer.step_update = step_update
    setattr(owner, name, slow)


def slow_save(seconds: float) -> None:
    """Time for a second signal while a checkpoint is written."""
    inner = checkpoint.save_to_resume

    def save_to_resume(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return inner(*args, **kwargs)

    checkpoint.save_to_resume = save_to_resume


SETTLED = 10


def watch_memory(path: str) -> None:
    """After every SETTLED-th step: step, resident bytes, open files.

    Cyclic garbage waits for Python's collector, and freed blocks for the allocator to give them
    back; how much of both there is at a step is chance, so neither is counted.
    """
    inner = trainer.step_update
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)  # glibc alone has it

    def step_update(state: Any) -> Any:
        state = inner(state)
        if state.step % SETTLED:
            return state
        gc.collect()
        trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        size, files = pages * resource.getpagesize(), len(os.listdir("/proc/self/fd"))
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{state.step} {size} {files}\n")
        return state

    trainer.step_update = step_update


def child(
    arguments: list[str], words: Connection, prepare: Callable[..., None] | None, with_: Any
) -> None:
    """The command, as a process would run it; a pipe takes its words, as no limit bounds those."""
    torch.set_num_threads(1)
    os.environ["no_proxy"] = "127.0.0.1"
    os.dup2(words.fileno(), 1)
    os.dup2(words.fileno(), 2)
    if prepare is not watch_memory:  # the picture is most of such a short run's time
        plots.draw_curves = lambda rows, path, title: path.write_bytes(bytes(30_000))
    if prepare is not None:
        prepare(*with_)
    code = cli.main(arguments)
    sys.stdout.flush()
    os._exit(code)


def start(
    settings: dict[str, Any], prepare: Callable[..., None] | None = None, *with_: Any
) -> BaseProcess:
    """A run of `settings`, after `prepare(*with_)` in its process; its words are in said.txt."""
    folder = Path(settings["output_dir"]).parent
    (folder / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    heard, words = context.Pipe(duplex=False)
    arguments = ([str(folder / "run.json")], words, prepare, with_)
    process = context.Process(target=child, args=arguments)
    process.start()
    words.close()
    LISTENERS[process.name] = threading.Thread(target=listen, args=(heard, folder / "said.txt"))
    LISTENERS[process.name].start()
    return process


LISTENERS: dict[str, threading.Thread] = {}


def listen(heard: Connection, said: Path) -> None:
    """Write what comes out of the pipe to a file until the process has ended."""
    with said.open("ab", buffering=0) as file:
        while data := os.read(heard.fileno(), 1 << 16):
            file.write(data)
    heard.close()


def finish(process: BaseProcess, seconds: float = HANGS) -> int:
    """Its exit code; -9 where it was killed."""
    process.join(seconds)
    code = process.exitcode
    if code is None:
        process.kill()
        raise AssertionError(f"still running after {seconds:g} s")
    LISTENERS.pop(process.name).join()
    return code


def run(
    settings: dict[str, Any], prepare: Callable[..., None] | None = None, *with_: Any
) -> tuple[int, str]:
    """Exit code and all that it said, standard error included."""
    said = Path(settings["output_dir"]).parent / "said.txt"
    said.unlink(missing_ok=True)
    code = finish(start(settings, prepare, *with_))
    return code, said.read_text(encoding="utf-8")


def result(settings: dict[str, Any]) -> dict[str, Any]:
    """All that a run leaves, without its clocks: to be the same to the bit."""
    out = Path(settings["output_dir"])
    assert (out / "adapter_model.safetensors").is_file()
    found: dict[str, Any] = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*.safetensors"))
        if not path.relative_to(out).as_posix().startswith("checkpoint-")
    }
    for path in sorted(out.glob("*.json")):
        # fastppo_info.json is of the process: when it began, its number, the memory it took.
        if path.name not in ("fastppo_run.json", "fastppo_info.json", "tokenizer.json"):
            found[path.name] = without_clocks(json.loads(path.read_text(encoding="utf-8")))
    if settings["stage"] == "ppo":
        folder = Path(settings["metrics_dir"])
        with (folder / "training_metrics.csv").open(newline="", encoding="utf-8") as file:
            found["rows"] = without_clocks(list(csv.DictReader(file)))
        for name in ("summary.json", "samples.json"):
            found[name] = without_clocks(json.loads((folder / name).read_text(encoding="utf-8")))
    return found


def without_clocks(value: Any) -> Any:
    """Lists and dicts with all but the keys that name a clock; paths differ, too."""
    if isinstance(value, list):
        return [without_clocks(item) for item in value]
    if isinstance(value, dict):
        return {
            key: without_clocks(item)
            for key, item in value.items()
            if key not in CLOCKS and not any(word in key for word in CLOCK_WORDS)
        }
    return value


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same in two results."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def resume(settings: dict[str, Any], prepare: Any = None, *with_: Any) -> tuple[int, str]:
    """As a user would go on: resume; where not even the output folder was begun, start again."""
    begun = (Path(settings["output_dir"]) / "fastppo_run.json").is_file()
    changes = {"resume_from_checkpoint": True} if begun else {"overwrite_output_dir": True}
    return run({**settings, **changes}, prepare, *with_)
