"""What runs on a GPU, walked through without one: it must not fail for the first who has one."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import report, runner, timing
from benchmarks.gpu.__main__ import find_device, main
from benchmarks.gpu.child import Hidden, Rows
from benchmarks.gpu.plan import TOY
from benchmarks.gpu.runner import CUT_OFF, DONE, FAILED, NOT_RUN, Options
from benchmarks.gpu.sections import BY_NAME, RESULTS, ROOT, SECTIONS, TOTAL
from benchmarks.gpu.timing import Contender


def results(out: Path) -> dict[str, dict]:
    return runner.read_results(out, list(BY_NAME))


def files_of_results() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")}


@pytest.mark.slow  # six processes that import torch, two of them transformers
def test_every_section_runs_to_its_end_without_a_gpu(tmp_path):
    """Without `datasets` too, and without pydantic where the trainer is not needed."""
    before = files_of_results()
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path)]
    command += ["--limit", "300"]  # the machine of a test may be busy with others
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = results(tmp_path)
    assert {name: result["state"] for name, result in found.items()} == dict.fromkeys(BY_NAME, DONE)
    assert all(result["rehearsal"] and result["rows"] for result in found.values())
    rows = {name: result["rows"] for name, result in found.items()}
    assert not [row for section in rows.values() for row in section if "note" in row]
    assert all(row["outcome"] != "failed" for row in rows["oracle"])
    for stem in ("test_real_sizes", "test_layouts"):
        assert any(row["what"].startswith(stem) for row in rows["oracle"])
    timed = [row for row in rows["logits"] if "what" in row]
    assert {row["dtype"] for row in timed} == {"bfloat16", "float32"}
    assert all(row["ms"] > 0 and row["graph_ms"] > 0 for row in timed)
    assert {row["kernel"] for row in rows["logits"] if "size" in row} == {
        "policy_loss",
        "token_logprobs",
        "score_tokens",
    }
    assert {row["head"] for row in rows["linear"]} == {"no gradient", "frozen", "trained"}
    steps = {row["way"]: row for row in rows["trainer"]}
    for way in ("ppo, checkpoint", "ppo, checkpoint+offload"):
        assert list(steps[way]["phases"]) == ["score", "advantage", "update"]
        assert steps[way]["planned_gib"] >= 0
    assert "rollout" in steps["ppo, first step"]["phases"]
    assert {row["way"] for row in rows["sampler"]} >= {"plain", "compiled"}

    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert page.startswith("# Rehearsal")
    assert "no number on this page is a measurement" in page
    assert all(section.title in page for section in SECTIONS)
    assert files_of_results() == before


def fake(tmp_path: Path, **faults: str) -> Options:
    return Options(out=tmp_path, faults=faults, module="tests.static.gpu_child")


def with_limit(name: str, limit: float) -> runner.Section:
    return dataclasses.replace(BY_NAME[name], limit=limit)


@pytest.mark.slow  # it waits until one is cut off
def test_one_that_fails_and_one_that_is_cut_off_leave_the_others_results(tmp_path):
    sections = [BY_NAME["trainer"], with_limit("sampler", 3), BY_NAME["launch"]]
    ran = runner.run_sections(sections, fake(tmp_path, trainer="fail", sampler="hang"))
    found = results(tmp_path)
    assert found == {name: ran[name] for name in found}
    states = {name: result["state"] for name, result in found.items()}
    assert states == {"trainer": FAILED, "sampler": CUT_OFF, "launch": DONE}
    assert "a failure that was asked for" in found["trainer"]["note"]
    assert "limit of 3 s" in found["sampler"]["note"]
    # What was measured until then is kept, but for the line that was being written.
    assert all(result["rows"] == [{"what": "1/1"}] for result in found.values())
    assert found["sampler"]["seconds"] < 10


def test_what_a_section_had_when_the_run_was_interrupted_is_kept(tmp_path, monkeypatch):
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.time, "sleep", interrupted)
    started = []
    child = runner.Child
    monkeypatch.setattr(runner, "Child", lambda *a: started.append(child(*a)) or started[-1])
    with pytest.raises(KeyboardInterrupt):
        runner.run_sections([BY_NAME["launch"], BY_NAME["logits"]], fake(tmp_path, launch="hang"))
    assert {name: r["note"] for name, r in results(tmp_path).items()} == {"launch": "interrupted"}
    assert [one.process.poll() is None for one in started] == [False]


def test_processes_that_share_a_section_write_one_result(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 3)
    ran = runner.run_sections([BY_NAME["oracle"]], fake(tmp_path))
    assert [row["what"] for row in ran["oracle"]["rows"]] == ["1/3", "2/3", "3/3"]


def test_what_compiles_in_the_background_is_gone_before_anything_is_timed(tmp_path, monkeypatch):
    running = []
    real = runner.run_section

    def run(section, options, scratch, deadline):
        children = [child for child in started if child.process.poll() is None]
        running.append((section.name, len(children)))
        return real(section, options, scratch, deadline)

    started = []
    child = runner.Child
    monkeypatch.setattr(runner, "Child", lambda *a: started.append(child(*a)) or started[-1])
    monkeypatch.setattr(runner, "run_section", run)
    options = dataclasses.replace(fake(tmp_path), warm_up=["logits", "linear"])
    sections = [BY_NAME[name] for name in ("launch", "logits", "linear")]
    runner.run_sections(sections, options)
    assert running == [("launch", 2), ("logits", 0), ("linear", 0)]
    running.clear()
    runner.run_sections(sections[1:], options)  # it would run beside what is timed
    assert running == [("logits", 0), ("linear", 0)]


def test_a_warm_up_calls_everything_and_measures_nothing():
    called, rows = [], []
    contenders = [
        Contender("ours", lambda: called.append(1), lambda: 1 / 0, lambda: 1 / 0, ours=True),
        Contender("broken", lambda: 1 / 0),
    ]
    plan = dataclasses.replace(TOY, warm=True)
    assert not timing.measure(contenders, plan, rows.append, {}, torch.float32)
    assert (called, rows) == ([1], [])


def test_a_wrong_answer_is_a_row_and_never_timed():
    called, rows = [], []
    wrong = Contender(
        "ours",
        lambda: called.append(1),
        lambda: [torch.tensor([1.1])],
        lambda: [torch.tensor([1.0])],
        ours=True,
    )
    found = timing.measure([wrong], TOY, lambda **row: rows.append(row), {"v": 1}, torch.float32)
    assert found
    assert not called
    assert "off by 1.0e-01" in rows[0]["note"]
    assert "ms" not in rows[0]


def test_shares_are_of_the_copys_speed(monkeypatch):
    monkeypatch.setattr(timing, "milliseconds", lambda call, plan: call())
    rows = []
    contenders = [
        Contender("copy", lambda: 10.0, moved=200, graph=False),
        Contender("half the bytes in twice the time", lambda: 20.0, moved=100, graph=False),
    ]
    timing.measure(contenders, TOY, lambda **row: rows.append(row), {}, torch.float32, bound="copy")
    assert [row["share"] for row in rows] == [1.0, 0.25]


def test_a_section_for_which_no_time_is_left_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "TOTAL", runner.LEAST - 1)
    ran = runner.run_sections([BY_NAME["launch"]], fake(tmp_path))
    assert ran["launch"]["state"] == NOT_RUN
    assert not ran["launch"]["rows"]


def test_all_limits_and_the_report_are_within_six_minutes():
    assert sum(section.limit for section in SECTIONS) + runner.LEAST < TOTAL < 360


def test_what_is_done_is_not_run_again(tmp_path, monkeypatch, capsys):
    ran = []

    def run(sections, options):
        ran.extend(section.name for section in sections)
        return {}

    monkeypatch.setattr("benchmarks.gpu.__main__.run_sections", run)
    for name, state in (("launch", DONE), ("oracle", CUT_OFF), ("logits", FAILED)):
        result = {"section": name, "state": state, "note": "n", "rehearsal": True}
        result |= {"machine": {}, "date": "2000-01-01", "rows": []}
        runner.write_json(tmp_path / f"{name}.json", result)
    flags = ["--rehearse", "--skip-done", "--out", str(tmp_path)]
    assert main([*flags, "--only", "launch", "oracle", "linear"]) == 0
    assert ran == ["oracle", "linear"]


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.gpu.__main__.find_device", lambda: None)
    assert main(["--out", str(tmp_path)]) == 2
    assert "no GPU here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # another process imports torch
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_found_where_there_is_none():
    assert find_device() is None


def test_a_rehearsal_is_never_written_into_the_results(capsys):
    assert main(["--rehearse", "--out", str(RESULTS / "gpu-toy")]) == 2
    assert "measures nothing" in capsys.readouterr().err
    assert not (RESULTS / "gpu-toy").exists()


def wheel(folder: Path, tag: str) -> None:
    with zipfile.ZipFile(folder / f"packed_away-1.0-{tag}.whl", "w") as archive:
        archive.writestr("packed_away/__init__.py", "NUMBER = 7\n")


def test_a_hidden_package_is_found_in_the_wheels_alone(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels", "py3-none-any")
    runner.unpack(tmp_path / "wheels", tmp_path / "site")
    assert Hidden(["json"], None).find_spec("json") is None
    assert Hidden(["json"], tmp_path / "site").find_spec("json") is None
    assert Hidden(["json"], None).find_spec("csv") is not None
    monkeypatch.setattr(sys, "meta_path", [Hidden(["packed_away"], tmp_path / "site")])
    assert importlib.import_module("packed_away").NUMBER == 7


def test_wheels_of_another_python_are_refused(tmp_path, capsys):
    flags = ["--rehearse", "--wheels", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(flags) == 2
    assert "there is no wheel in it" in capsys.readouterr().err
    wheel(tmp_path, "cp27-cp27m-manylinux2014_x86_64")
    assert main(flags) == 2
    assert "is for cp27" in capsys.readouterr().err


def test_a_child_writes_each_row_as_it_comes_and_fails_where_it_is_asked_to(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(RuntimeError, match="asked for"):
        Rows(path, fault="fail")(what="first")
    assert runner.read_lines(path) == [{"what": "first"}]


def test_importing_the_sections_and_the_runner_takes_no_torch():
    """The clock of six minutes runs from the start of the command."""
    script = "import sys, benchmarks.gpu.__main__; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=os.environ, check=False)
    assert done.returncode == 0


def a_result(section: str, *rows: dict, state: str = DONE, note: str = "") -> dict[str, dict]:
    machine = {"device": "D 1", "torch": "1", "triton": "2"}
    found = {"section": section, "state": state, "note": note, "rehearsal": False}
    return {section: {**found, "date": "2000-01-01", "machine": machine, "rows": list(rows)}}


def test_the_report_has_device_date_and_what_was_cut_off():
    row = {"rows": 4, "vocab": 96, "dtype": "bfloat16", "what": "copy", "ms": 1.5, "graph_ms": 1.25}
    page = report.markdown(a_result("logits", row, state=CUT_OFF, note="cut off at its limit"))
    assert page.startswith("# D 1, 2000-01-01")
    assert "**cut off**: cut off at its limit" in page
    assert "| 4 x 96 | bfloat16 | copy | 1.25 |  | 1.5 |" in page
    assert "Rehearsal" not in page


def test_the_table_proposed_is_the_fastest_size_of_each_kernel():
    common = {"kernel": "policy_loss", "dtype": "float32", "vocab": 96}
    page = report.markdown(
        a_result(
            "logits",
            {**common, "size": "1 x 4", "ms": 2.0, "in_table": True},
            {**common, "size": "2 x 8", "ms": 1.0, "in_table": False},
            {**common, "size": "4 x 8", "note": "too many registers", "in_table": False},
        )
    )
    assert "| policy_loss | float32 | 96 | 2 x 8 | 1 | 1 x 4 | 2 | 50% |" in page
    assert "too many registers" in page


def test_the_report_says_what_offloading_costs():
    def step(way: str, seconds: float, gib: float) -> dict:
        phases = {"update": {"seconds": seconds, "peak_gib": gib}}
        sizes = {"rows": 4, "length": 8, "new_tokens": 2}
        return {"way": way, **sizes, "phases": phases, "planned_gib": 1.5}

    page = report.markdown(
        a_result("trainer", step("ppo, checkpoint", 1, 9), step("ppo, checkpoint+offload", 1.5, 7))
    )
    assert "Offloading costs 0.50 s of an update and frees 2.00 GiB." in page
    assert "| ppo, checkpoint | update | 1 | 9 | 1.5 |" in page


def test_a_result_is_whole_or_not_there(tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(runner.os, "replace", broken)
    with pytest.raises(OSError, match="full"):
        runner.write_json(tmp_path / "launch.json", {"rows": []})
    assert not (tmp_path / "launch.json").exists()
    assert json.loads((tmp_path / "launch.partial").read_text()) == {"rows": []}
