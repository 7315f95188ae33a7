"""The benchmarks walk through, compare right answers only, and say what is not there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import before_after, contenders, peers, report, rollout, shared_prompts
from benchmarks.harness import Case, Contender, allocations, distance, measure, peak_bytes
from tests.ops.registry import OPS, Shape
from tests.tiers import slow_unless


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_eager_gives_the_definitions_answer(op):
    """It is the oracle where the definition is too slow."""
    shape = Shape(n=24, vocab=37, hidden=8, batch=4)
    inputs = contenders.make_inputs(op, shape, torch.float32)
    found = [
        contenders.answer(op, function, contenders.leaves(op, inputs))
        for function in (contenders.EAGER[op.name], op.reference)
    ]
    assert distance(*found) < 1e-5


def test_the_masked_loop_is_the_same_advantage():
    inputs = OPS["gae"].make_inputs(Shape(n=24, batch=4), torch.float32, 0)
    want = OPS["gae"].reference(**inputs)
    assert distance(contenders.gae_masked_loop(**inputs), want) < 1e-5


def test_four_roles_in_one_pass_say_what_four_passes_say(tmp_path):
    out = tmp_path / "found.json"
    assert command.main(["mixed_adapters", "--quick", "--rounds", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["status"] for row in rows] == ["timed", "timed"]
    assert max(row["error"] for row in rows) < 1e-3


def test_a_prompt_run_once_gives_what_each_row_alone_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_prompts, "FOLDER", tmp_path / "run")
    out = tmp_path / "found.json"
    assert command.main(["shared_prompts", "--quick", "--rounds", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [row["status"] for row in found["rows"]] == ["timed"] * 4
    assert 0 < max(row["error"] for row in found["rows"]) < 1e-4
    peaks = [row["peak_bytes"] for row in found["rows"]]
    assert peaks[1] < 0.8 * peaks[0], "scoring ran the prompt once"
    assert peaks[3] < 0.8 * peaks[2], "so did the update"
    assert sum("of the time" in note for note in found["notes"]) == 2


@pytest.mark.slow
def test_what_calls_cost_the_host_is_measured_of_right_answers(tmp_path):
    out = tmp_path / "found.json"
    assert command.main(["host", "--rounds", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert {row["status"] for row in found["rows"]} == {"timed"}
    assert all(row["share"] > 0 for row in found["rows"] if row["ours"])
    assert [op for op in OPS if any(note.startswith(f"{op}, ") for note in found["notes"])] == [
        *OPS
    ]


@pytest.mark.parametrize(
    "name", slow_unless("seven_b_head".__eq__, ["linear", "ops", "seven_b_head"])
)
def test_a_quick_benchmark_writes_a_result_and_its_table(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "SITE", tmp_path / "nothing")
    out = tmp_path / "found.json"
    extra = ["--only", "policy_loss", "gae"] if name == "ops" else []
    assert command.main([name, "--quick", "--rounds", "1", "--out", str(out), *extra]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert {"name", "date", "command", "machine", "cores_busy_with_others", "rows"} <= set(found)
    assert {"cpu", "cores", "threads", "vectors", "torch"} <= set(found["machine"])
    by_status = {}
    for row in found["rows"]:
        by_status.setdefault(row["status"], []).append(row)
    assert set(by_status) == {"timed", "absent"}
    assert all(row["note"] for row in by_status["absent"])
    timed = by_status["timed"]
    answered = {row["what"].split(",")[0] for row in timed if "error" in row}
    assert {"eager", "fastppo torch"} <= answered
    assert all(row["share"] > 0 for row in timed if "error" in row)
    absent = {row["what"].split()[0] for row in by_status["absent"]}
    wanted = {"linear": {"liger-kernel", "cut-cross-entropy", "verl", "trl"}, "ops": {"torchrl"}}
    assert wanted.get(name, set()) <= absent
    table = out.with_suffix(".md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert "no measurement" in table


def test_a_wrong_answer_is_reported_and_never_timed():
    calls = []
    case = Case({"op": "none"}, [torch.ones(3)], tolerance=1e-3)
    case.add(Contender("bound", lambda: None))
    case.add(Contender("right", lambda: None, lambda: [torch.ones(3)], "bound"))
    for name, wrong in (("off", 1.1 * torch.ones(3)), ("nan", torch.full((3,), float("nan")))):
        case.add(Contender(name, lambda: calls.append(1), lambda wrong=wrong: [wrong], "bound"))
    rows = {row["what"]: row for row in measure(case, rounds=2)}
    assert [rows[name]["status"] for name in ("right", "off", "nan")] == ["timed", "wrong", "wrong"]
    assert not calls
    assert "ms" not in rows["off"]


def test_what_breaks_is_a_line_of_the_table():
    case = Case({"op": "none"}, [torch.ones(1)], tolerance=1e-3)
    case.add(Contender("broken", lambda: None, lambda: 1 / 0))
    (row,) = measure(case, rounds=1)
    assert row["status"] == "failed"
    assert row["note"] == "ZeroDivisionError: division by zero"


def test_the_peak_is_what_lived_at_once():
    def call():
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(500, dtype=torch.uint8)
        del first
        third = torch.empty(700, dtype=torch.uint8)
        return second.numel() + third.numel()

    assert peak_bytes(allocations(call)) == 1500
    assert peak_bytes([-300, 200, -200]) == 200  # what was there before is not this call's


def test_busy_cores_make_a_warning_and_quiet_ones_none():
    assert "2.0 cores busy" in report.warning(2.0)
    assert report.warning(0.01) is None


def test_load_counts_what_others_burn_and_not_what_this_process_does(monkeypatch):
    # Two seconds of a machine that was busy for 3, of which this process burnt 2.
    moments = iter([(10.0, 100.0), (12.0, 101.0)])
    load = report.Load()
    load.known = True
    monkeypatch.setattr(load, "_now", lambda: next(moments))
    with load:
        pass
    assert load.others() == 0.5


def test_the_fastest_is_marked_among_those_who_do_the_same():
    def row(what, ms, bound, ours):
        return {"what": what, "ms": ms, "bound": bound, "ours": ours, "error": 0.0}

    given = row("given", 1.0, "copy, given", True)
    rows = [row("mine", 3.0, "copy", True), row("eager", 2.0, "copy", False), given]
    assert [report.is_fastest(one, rows) for one in rows] == [False, True, False]


@pytest.mark.parametrize(
    ("spreads", "standings"),
    [
        ([(1.0, 1.1, 1.2), (1.15, 1.4, 1.5), (1.3, 2.2, 2.5)], ["tie", "tie", "2.00 x"]),
        ([(1.0, 1.1, 1.2), (1.3, 1.4, 1.5), (1.3, 2.2, 2.5)], ["leads", "1.27 x", "2.00 x"]),
        ([(1.0, 1.1, 1.2)], ["leads"]),
    ],
)
def test_a_lead_inside_the_spread_is_a_tie(spreads, standings):
    bound = {"what": "2 GEMMs", "ours": False, "min_ms": 0.1, "ms": 0.2, "max_ms": 9.0}
    rows = [
        {"error": 0.0, "ours": False, "bound": bound, "rivals": "all", "min_ms": a, "ms": b}
        | {"max_ms": c, "bound": f"{i} GEMMs"}
        for i, (a, b, c) in enumerate(spreads)
    ]
    assert [report.standing(row, [*rows, bound]) for row in rows] == standings
    assert report.standing(bound, [*rows, bound]) == ""
    ours = [{**row, "ours": True} for row in rows]
    assert [report.standing(row, ours) for row in ours] == [""] * len(ours)  # against nobody


@pytest.mark.slow
def test_what_a_loss_takes_is_said_in_units_of_its_gemms(tmp_path):
    """Two with a frozen head; with a trained one three, four where the forward keeps no logits."""
    out = tmp_path / "found.json"
    assert command.main(["linear", "--quick", "--rounds", "1", "--out", str(out)]) == 0
    notes = json.loads(out.read_text(encoding="utf-8"))["notes"]
    for loss in ("PPO", "GRPO", "GSPO"):
        (frozen,) = [note for note in notes if f"{loss}, frozen head: " in note]
        (trained,) = [note for note in notes if f"{loss}, trained head: " in note]
        assert "torch, linear_token_logprobs" in frozen
        assert set(re.findall(r"x (\d) GEMMs", frozen)) == {"2"}
        assert set(re.findall(r"torch, linear_token_logprobs [\d.]+ x (\d)", trained)) == {"4"}
        wanted = {"3"} if loss == "PPO" else set()
        assert set(re.findall(r"torch, linear_policy_loss [\d.]+ x (\d)", trained)) == wanted


@pytest.mark.slow  # two processes
def test_two_checkouts_are_compared_call_by_call(capsys):
    """With itself as the other one: both have every call, each in a process of its own."""
    assert command.main(["before_after", str(before_after.ROOT), "--quick"]) == 0
    shown = capsys.readouterr().out
    assert "| `policy_loss 4 x 64 bfloat16` | " in shown
    assert shown.count("\n| `") == 16


def test_the_rollouts_benchmark_gives_its_peers_the_same_weights_and_their_own_layers():
    plain, words = rollout.under_lora(Path("none"), quick=True)
    own = rollout.policy_of(*rollout.under_lora(Path("none"), quick=True))
    for (name, want), (_, found) in zip(
        plain.state_dict().items(), own.base.state_dict().items(), strict=True
    ):
        assert torch.equal(want, found), name
    assert words == "random weights"

    def replaced(model):
        return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}

    assert replaced(own.base) >= {"LlamaRMSNorm", "LlamaMLP"}
    with rollout.as_before(plain):
        assert replaced(plain) == {"Linear"}
    assert replaced(plain) == set()


@pytest.mark.slow  # every contender samples
def test_the_rollouts_benchmark_walks_through_all_its_contenders(capsys):
    assert command.main(["rollout", "--quick", "--case", "1"]) == 0
    out = capsys.readouterr().out
    assert "vllm is left out: its kernels for CPUs take no heads as narrow as the toy's" in out
    rows = [line.split("|") for line in out.splitlines() if "prompts" in line]
    assert {row[2].strip() for row in rows} == {
        "generate, merged",
        "fastppo",
        "generate",
        "generate_batch",
    }
    assert all(float(row[3]) > 0 for row in rows)
