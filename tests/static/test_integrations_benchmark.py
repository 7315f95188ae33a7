"""`python -m benchmarks integrations` notices a difference, and a comparison that says nothing."""

from __future__ import annotations

import argparse
import json

import pytest

from benchmarks import integrations
from fastppo.integrations import transformers as ours

SERIES = {"loss": [0.25, -0.5, 0.75], "grad_norm": [3.0, 2.0, 2.5]}


def run(series):
    """What a process that trained one way says."""
    return {"series": series, "part": 2.0, "cpu": 3.0, "peak_mib": 500.0}


def row(theirs, mine):
    return integrations.row("liger", {False: [run(theirs)], True: [run(mine)]}, 3)


def test_the_difference_is_a_share_of_the_median_size():
    """0.25, 0.5 and 0.75 are 0.5 by their median; one step of three is off by 1e-5."""
    mine = {**SERIES, "loss": [0.25, -0.5, 0.75001]}
    found = row(SERIES, mine)
    assert found["compared"]["loss"]["difference"] == pytest.approx(2e-5)
    assert found["compared"]["grad_norm"]["difference"] == 0
    assert (found["status"], found["wrong"]) == ("timed", [])
    assert integrations.line(found).endswith("| loss 2e-05, grad_norm 0e+00 |")


@pytest.mark.parametrize(
    ("name", "theirs", "mine", "line"),
    [
        ("loss", [0.25, -0.5, 0.75], [0.25, -0.5, 0.7501], "loss differs by 2e-04 of its size"),
        ("grad_norm", [3.0, 2.0, 2.5], [3.0, 2.0, float("nan")], "grad_norm differs by nan"),
        ("loss", [2e-7, -1e-7, 3e-7], [2e-7, -1e-7, 3e-7], "loss is 2e-07, which may be rounding"),
        ("loss", [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], "loss differs by inf of its size"),
        ("loss", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], "loss is the same in every step"),
    ],
)
def test_what_is_not_the_same_or_says_nothing_is_wrong(name, theirs, mine, line):
    found = row({**SERIES, name: theirs}, {**SERIES, name: mine})
    assert found["status"] == "wrong"
    assert found["wrong"][0].startswith(line)


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.001, 1)])
def test_the_exit_code(monkeypatch, tmp_path, capsys, factor, code):
    """A gradient that is off by 1e-3 is exit code 1, and the line that says so is printed."""

    def one_way(name, way, steps, model):
        norms = [x * factor if way else x for x in SERIES["grad_norm"]]
        return run({**SERIES, "grad_norm": norms})

    monkeypatch.setattr(integrations, "one_way", one_way)
    parser = argparse.ArgumentParser()
    integrations.add_arguments(parser)
    out = tmp_path / "found.json"
    argv = ["--quick", "--only", "transformers", "--out", str(out)]
    assert integrations.main(parser.parse_args(argv), argv) == code
    assert json.loads(out.read_text())["rows"][0]["status"] == ("wrong" if code else "timed")
    assert ("grad_norm differs by 1e-03 of its size" in capsys.readouterr().err) == bool(code)


@pytest.mark.slow  # trains a Llama with a vocabulary of 49152, thrice
def test_ours_disturbed_is_noticed(monkeypatch):
    """A temperature that is off by 1e-3 in our head: as it is, the same; disturbed, not."""
    patch = ours.patch_causal_lm

    def train(way):
        found, _ = integrations.transformers(way, 2, "")
        return run(found)

    theirs, same = train(False), train(True)
    monkeypatch.setattr(ours, "patch_causal_lm", lambda model: patch(model, temperature=1.001))
    disturbed = train(True)
    wrong = [
        integrations.row("transformers", {False: [theirs], True: [mine]}, 2)["wrong"]
        for mine in (same, disturbed)
    ]
    assert wrong[0] == []
    assert any(line.startswith("grad_norm differs by") for line in wrong[1])
