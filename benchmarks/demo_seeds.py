"""The demo's PPO over several seeds, sampled by fastppo or by a vLLM server: `make demo-seeds`.

It trains on the model and the reward model that `make demo` has left. A run whose result is there,
of the same settings, data and weights, is not repeated: what was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.peers.vllm_server import NotStarted, serving

CONFIG = Path("examples/demo_ppo.yaml")
PROMPTS_FILE = Path("examples/data/demo_eval_prompts.json")
MODEL, REWARD = Path("output/demo/model"), Path("output/demo/reward")
RUNS = Path("output/seeds")
SEEDS = (1, 2, 3, 4, 5)
SAMPLERS = {"ours": "fastppo", "server": "vLLM server"}
PROMPTS = 128  # held out
WORDINGS = 4  # of each subject, one after the other in PROMPTS_FILE
RANK, LENGTH = 16, 512  # of the server: lora_rank of CONFIG, and room for a prompt and a response
DRAWS = 10_000  # of the bootstrap
SUMMARY = (
    "judge_before",
    "judge_after",
    "reward_before",
    "reward_after",
    "kl",
    "length_before",
    "length_after",
    "eos_share_before",
    "eos_share_after",
    "eval_prompts",
    "steps",
    "seconds",
)
PACKAGES = ("torch", "transformers", "peft")


def interval(rises_SKW: Any) -> list[float]:
    """95% of the mean's distribution when seeds and subjects are drawn anew, with replacement.

    Args:
        rises_SKW: by seed, subject and wording. The wordings of a subject are drawn together, since
            what the policy says to them is alike. With one seed only the subjects are drawn.
    """
    rises_SK = np.asarray(rises_SKW, dtype=float).mean(2)
    seeds, subjects = rises_SK.shape
    numbers = np.random.default_rng(0)
    seeds_DS = numbers.integers(seeds, size=(DRAWS, seeds))
    subjects_DK = numbers.integers(subjects, size=(DRAWS, subjects))
    means_D = rises_SK[seeds_DS[:, :, None], subjects_DK[:, None, :]].mean((1, 2))
    return [round(float(x), 4) for x in np.quantile(means_D, (0.025, 0.975))]


def by_subject(rises: Sequence[float]) -> Any:
    """The rises of a run, in the order of the prompts, by subject and wording."""
    return np.asarray(rises).reshape(-1, WORDINGS)


def digest(paths: Sequence[Path]) -> str:
    """Of the contents of files."""
    found = hashlib.sha256()
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def settings(sampler: str, seed: int) -> dict[str, Any]:
    """What a run's result depends on."""
    weights = sorted(REWARD.rglob("*.safetensors"))
    made = {name: version(name) for name in PACKAGES}
    files = digest([CONFIG, PROMPTS_FILE, MODEL / "model.safetensors", *weights])
    return {"sampler": sampler, "seed": seed, "files": files, "prompts": PROMPTS, **made}


def result_of(sampler: str, seed: int) -> Path:
    return RUNS / f"{sampler}-{seed}" / "run.json"


def done(sampler: str, seed: int) -> dict[str, Any] | None:
    """The result of a run that was made with these settings; None if it is still to be made."""
    path = result_of(sampler, seed)
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if found["settings"] == settings(sampler, seed) else None


def run(sampler: str, seed: int, url: str | None) -> None:
    """One PPO run; its files go where the demo's do not, its result last."""
    folder = result_of(sampler, seed).parent
    command = [sys.executable, "-m", "fastppo", str(CONFIG), f"seed={seed}"]
    command += [f"eval_max_samples={PROMPTS}", f"metrics_dir={folder}/metrics"]
    command += [f"output_dir={folder}/policy"]
    environment = dict(os.environ)
    if url is not None:
        command += ["use_vllm=true", f"vllm_server_base_url={url}"]
        environment["no_proxy"] = environment["NO_PROXY"] = "127.0.0.1"
    print(f"$ {' '.join(command[1:])}", flush=True)
    if code := subprocess.run(command, check=False, env=environment).returncode:
        sys.exit(code)
    found = {**read(folder), "date": time.strftime("%Y-%m-%d"), "settings": settings(sampler, seed)}
    path = result_of(sampler, seed)
    path.with_suffix(".partial").write_text(json.dumps(found) + "\n", encoding="utf-8")
    path.with_suffix(".partial").rename(path)


def read(folder: Path) -> dict[str, Any]:
    """What a run has left: its summary, the rise of the judge by prompt, and its sampler's gap."""
    summary = json.loads((folder / "metrics" / "summary.json").read_text(encoding="utf-8"))
    lines = (folder / "policy" / "eval_samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    with (folder / "metrics" / "training_metrics.csv").open(encoding="utf-8", newline="") as file:
        steps = list(csv.DictReader(file))
    assert summary["eval_prompts"] == len(samples) == PROMPTS

    def column(name: str) -> list[float]:
        return [float(row[name]) for row in steps if row.get(name)]

    found = {name: summary[name] for name in SUMMARY}
    found["rises"] = [round(row["judge_policy"] - row["judge_reference"], 6) for row in samples]
    found["rollout_seconds"] = round(sum(column("seconds_rollout")), 1)
    found["gap"] = float(np.mean(column("sampler_gap_abs")))
    if largest := column("sampler_gap_max"):
        found["gap_max"] = max(largest)
        found["ess_least"] = min(column("rollout_is_ess"))
        found["capped"] = float(np.mean(column("rollout_is_capped")))
    found["guards"] = sum(
        float(row[name] or 0) != 0
        for row in steps
        for name in ("guard_sampler", "guard_rollout_is")
        if name in row
    )
    return found


def of_a_run(sampler: str, seed: int, found: dict[str, Any]) -> dict[str, Any]:
    """A run in the result: its numbers, and the rise of the judge with its interval."""
    kept = {k: v for k, v in found.items() if k not in ("rises", "settings")}
    rise = {"judge_rise": float(np.mean(found["rises"]))}
    rise["judge_rise_95"] = interval(by_subject(found["rises"])[None])
    return {"sampler": sampler, "seed": seed, **rise, **kept}


def make_result(command: str, runs: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """The JSON: machine, versions, each run, and the rise over seeds with its interval."""
    samplers = list(dict.fromkeys(sampler for sampler, _ in runs))
    seeds = {who: [seed for one, seed in runs if one == who] for who in samplers}
    rises = {
        who: np.stack([by_subject(runs[who, seed]["rises"]) for seed in seeds[who]])
        for who in samplers
    }

    def over_seeds(rises_SKW: Any) -> dict[str, Any]:
        mean_S = rises_SKW.mean((1, 2))
        return {
            "mean": float(mean_S.mean()),
            "95": interval(rises_SKW),
            "least": float(mean_S.min()),
            "most": float(mean_S.max()),
        }

    found: dict[str, Any] = {
        "command": command,
        "date": max(one["date"] for one in runs.values()),
        "machine": f"{os.cpu_count()} cores of {report.processor()}, no GPU",
        **{name: version(name) for name in PACKAGES},
        "prompts": PROMPTS,
        "judge_rise": {who: over_seeds(rises[who]) for who in samplers},
    }
    if "server" in samplers:
        found["vllm"] = vllm_version()
    if len(samplers) == 2 and seeds["ours"] == seeds["server"]:
        found["server_minus_ours"] = over_seeds(rises["server"] - rises["ours"])
    found["runs"] = [of_a_run(*key, one) for key, one in runs.items()]
    return found


def vllm_version() -> str:
    """The version that the server's environment was made with."""
    from benchmarks.peers.environments import VLLM

    return VLLM.alone[0].replace("==", " ")


def rows(found: dict[str, Any]) -> Iterator[str]:
    """The lines of the table, a run each; earlier results have no interval."""
    both = any(one.get("sampler") == "server" for one in found["runs"])
    for one in found["runs"]:
        cells = [SAMPLERS[one["sampler"]]] if both else []
        cells += [str(one["seed"]), f"{one['judge_before']:+.2f}", f"{one['judge_after']:+.2f}"]
        if "judge_rise" in one:
            low, high = one["judge_rise_95"]
            cells.append(f"{one['judge_rise']:.2f} ({low:.2f} to {high:.2f})")
        cells += [f"{one['reward_before']:+.2f}", f"{one['reward_after']:+.2f}"]
        cells += [f"{one['kl']:.1f}", f"{one['length_before']:.0f}", f"{one['length_after']:.0f}"]
        if both:
            most = f", {one['gap_max']:.1g}" if "gap_max" in one else ""
            cells += [f"{one['gap']:.1g}{most}"]
            cells += [f"{one['ess_least']:.4f}" if "ess_least" in one else ""]
            cells += [f"{one['rollout_seconds']:.0f}"]
        yield f"| {' | '.join(cells)} |"


def sentences(found: dict[str, Any]) -> Iterator[str]:
    """The rise over seeds, and how the samplers differ in it."""
    alone = ", of subjects alone: one seed says nothing of others"
    for who, rise in found.get("judge_rise", {}).items():
        (low, high), seeds = rise["95"], sum(one["sampler"] == who for one in found["runs"])
        spread = f" (95% interval {low:.2f} to {high:.2f}{alone * (seeds == 1)})"
        said = f"Sampled by {SAMPLERS[who]}, the judge's score rises by {rise['mean']:.2f}"
        prompts = f"{found['prompts']} held-out prompts"
        if seeds == 1:
            yield f"{said} with one seed on {prompts}{spread}."
        else:
            each = f", from {rise['least']:.2f} to {rise['most']:.2f} in a seed"
            yield f"{said} in the mean of {seeds} seeds and {prompts}{spread}{each}."
    if gap := found.get("server_minus_ours"):
        (low, high), seeds = gap["95"], len(found["runs"]) // 2
        yield (
            f"The server's rise minus fastppo's, paired by seed and prompt, is {gap['mean']:+.2f} "
            f"(95% interval {low:+.2f} to {high:+.2f}{alone * (seeds == 1)})."
        )


def markdown(found: dict[str, Any]) -> str:
    """What a page says of a result: its machine, sentences, and the table."""
    both = any(one["sampler"] == "server" for one in found["runs"])
    head = ["sampler"] * both
    head += ["seed", "judge before", "after", "rise, 95%", "reward before", "after", "KL"]
    head += ["length before", "after"]
    if both:
        head += ["gap of log-probs: mean, largest", "least effective share", "sampling, s"]
    made = [f"{name} {found[name]}" for name in PACKAGES]
    versions = ", ".join([*made, *([found["vllm"]] if "vllm" in found else [])])
    where = f"`{found['command']}`, {found['date']}, {found['machine']}, {versions}."
    table = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows(found)]
    return "\n".join([where, *sentences(found), "", *table]) + "\n"


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("--sampler", nargs="+", choices=list(SAMPLERS), default=["ours"])
    one.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="N")
    one.add_argument("--out", type=Path, metavar="FILE", help="the JSON; a .md goes beside it")


def main(asked: Any, argv: list[str]) -> int:
    """Make the runs that are not there, and write the result of all that were asked for."""
    if not ((MODEL / "model.safetensors").is_file() and any(REWARD.rglob("*.safetensors"))):
        print(f"{MODEL} or {REWARD} is not there; run: make demo", file=sys.stderr)
        return 2
    samplers = [name for name in SAMPLERS if name in asked.sampler]
    seeds = list(dict.fromkeys(asked.seeds))
    missing = {who: [seed for seed in seeds if done(who, seed) is None] for who in samplers}
    for seed in missing.get("ours", ()):
        run("ours", seed, None)
    if missing.get("server"):
        RUNS.mkdir(parents=True, exist_ok=True)
        try:
            with serving(MODEL, RUNS / "server.log", rank=RANK, length=LENGTH) as url:
                for seed in missing["server"]:
                    run("server", seed, url)
        except NotStarted as error:
            print(error, file=sys.stderr)
            return 1
    runs = {(who, seed): done(who, seed) for seed in seeds for who in samplers}
    runs = {key: runs[key] for key in sorted(runs, key=lambda key: samplers.index(key[0]))}
    name = "demo_samplers" if "server" in samplers else "demo_seeds"
    usual = asked.sampler == ["ours"] and asked.seeds == list(SEEDS)
    command = "make demo-seeds" if usual else f"python -m benchmarks {' '.join(argv)}"
    found = make_result(command, {key: one for key, one in runs.items() if one is not None})
    out = asked.out or report.RESULTS / f"{name}.json"
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    print(f"\n{markdown(found)}\n{out}")
    return 0
