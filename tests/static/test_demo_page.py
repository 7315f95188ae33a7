"""What the pages show of the demo is of one run, and its report needs nothing beside it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.static.test_site import tool

page = tool("demo_page")
RESULT = json.loads(page.RESULT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", page.READMES, ids=lambda path: path.name)
def test_a_readme_shows_the_numbers_and_the_day_that_were_measured(path):
    text = path.read_text(encoding="utf-8")
    assert page.with_result(text, RESULT) == text
    for name in ("judge", "reward", "length", "eos_share"):
        shown = [f"{RESULT['summary'][f'{name}_{when}']:.2f}" for when in ("before", "after")]
        assert re.search(rf"│ {shown[0]} +│ {shown[1]} +│", text), name


def test_other_numbers_would_change_the_readme():
    text = page.READMES[0].read_text(encoding="utf-8")
    summary = RESULT["summary"] | {"length_after": 123.456}
    other = page.with_result(text, {**RESULT, "date": "2031-01-02", "summary": summary})
    assert "│ 123.46 │" in other
    assert "(docs/demo_report.html), 2031-01-02" in other
    assert len(other.splitlines()) == len(text.splitlines())


def test_the_report_is_of_that_run_and_needs_nothing_beside_it():
    html = page.REPORT.read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    assert len(html) < 1_500_000
    asked = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"'\s)>]+)", html)
    assert [x for x in asked if not x.startswith(("#", "data:"))] == []
    assert "<script" not in html
    assert f"<td>{RESULT['date']} " in html
    assert f"torch {RESULT['torch']}" in html
    assert not re.search(r"/(?:home|root|tmp|work|Users)/", html)
    for name in ("reward_before", "reward_after", "kl"):
        assert f"<b>{RESULT['summary'][name]:.4g}</b>" in html


def test_the_picture_is_small_enough_for_a_first_page():
    assert 10_000 < page.PICTURE.stat().st_size < 300_000


def sample(before: float, after: float) -> dict[str, Any]:
    return {"prompt": f"{before}", "judge_before": before, "judge_after": after}


def test_the_samples_that_are_shown_are_those_of_the_median_change():
    # by change: -0.5, 0.1, 0.2, 0.3, 0.9
    found = [sample(*pair) for pair in [(0, 0.9), (0, 0.1), (0.5, 0), (0.2, 0.4), (0.6, 0.9)]]
    shown = page.demo.of_median_change(found)
    assert [round(page.demo.change(one), 6) for one in shown] == [0.1, 0.2, 0.3]
    assert page.demo.of_median_change(found, 1) == [found[3]]
    assert page.demo.of_median_change(found[:2]) == [found[1], found[0]], "fewer than it shows"
    said = page.demo.what_to_see(found, len(shown))
    assert "median +0.20" in said
    assert "Of all 5 answers 4 became more positive" in said


def test_the_terminal_shows_them_under_a_sentence(tmp_path, monkeypatch, capsys):
    changes = [index / 100 for index in range(-5, 6)]
    samples = [
        {**sample(0.0, change), "before": f"was {change}", "after": f"is {change}"}
        for change in changes
    ]
    summary = {**RESULT["summary"], "steps": 10}
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (tmp_path / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    monkeypatch.setattr(page.demo, "METRICS", tmp_path)
    page.demo.show(60.0)
    said = capsys.readouterr().out
    assert re.findall(r"after +\(([+-]\d\.\d\d)\)  is", said) == ["-0.01", "+0.00", "+0.01"]
    assert said.index("The 3 samples in the middle") < said.index("  before (")
