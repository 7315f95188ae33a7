"""What the pages show of the demo is of one run, and its report needs nothing beside it."""

from __future__ import annotations

import json
import re

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
