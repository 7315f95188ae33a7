"""`fastppo-report`: what the page of a run shows, whatever state the run is in."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastppo.ppo import trainer
from fastppo.ppo.columns import COLUMNS, WHAT_TO_LOOK_FOR
from fastppo.report.charts import LEFT, RIGHT, WIDTH, Line, chart, nice_ticks
from fastppo.report.cli import main
from fastppo.run import record
from fastppo.run.durable import INFO
from fastppo.run.preflight import check

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "<script>alert('x')</script>"


class Page(HTMLParser):
    """The tags of a page, what they refer to, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags, self.references, self.parts = set[str](), list[str](), list[str]()
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def write_run(folder: Path, steps: int = 5, **info: Any) -> Path:
    """What a run of stage ppo leaves in `folder`, with a sample that is a script."""
    metrics = folder / "metrics"
    metrics.mkdir(parents=True)
    rows = [dict.fromkeys(COLUMNS, 0.0) for _ in range(steps)]
    for i, row in enumerate(rows, 1):
        row |= {"step": i, "score": i / 10, "score_std": 0.1, "kl": i / 2, "kl_target": 6.0}
    with (metrics / "training_metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        writer.writeheader()
        writer.writerows(rows)
    entries = [
        {"current_steps": i, "total_steps": 10, "reward": row["score"], "lr": 1e-3}
        for i, row in enumerate(rows, 1)
    ]
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    evaluation = {"eval_reward": 0.75, "eval_reward_reference": -0.25, "eval_win_rate": 0.875}
    (folder / "eval_results.json").write_text(json.dumps(evaluation))
    sample = {
        "prompt": SCRIPT,
        "policy": f"{SCRIPT} & more",
        "reference": "plain",
        "reward_policy": 0.625,
        "reward_reference": -0.5,
        "outcome": "win",
    }
    (folder / "eval_samples.jsonl").write_text(json.dumps(sample) + "\n")
    known = {"stage": "ppo", "model": SCRIPT, "metrics_dir": str(metrics), "notes": [SCRIPT]}
    (folder / INFO).write_text(json.dumps({**known, **info}))
    return folder


def test_a_real_run_is_shown_with_its_model_settings_curves_memory_and_samples(config, tmp_path):
    settings = config(max_steps=2, ppo_epochs=1, val_size=2)
    with record.outcome(tmp_path / "out"):
        trainer.run(settings, check(settings))
    assert main([str(tmp_path / "out")]) == 0
    page = Page(tmp_path / "out" / "report.html")
    assert "finished 2 of 2 steps" in page.text
    assert settings.model_name_or_path in page.text
    for shown in ("learning_rate", "memory: ", "win rate", "before, score", "torch", "CPU ("):
        assert shown in page.text, shown
    assert page.html.count("<svg") >= 10
    assert page.references == []  # no network, no other file
    assert "script" not in page.tags
    left = [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    assert left == []


def test_a_runs_texts_are_text_and_never_tags(tmp_path):
    page_of(write_run(tmp_path / "run", settings={"dataset": SCRIPT}, plan=[SCRIPT], memory=SCRIPT))
    page = Page(tmp_path / "run" / "report.html")
    assert "script" not in page.tags
    # title, heading, model, note, plan, memory, setting, prompt, response
    assert page.text.count(SCRIPT) == 9


def page_of(folder: Path) -> Page:
    assert main([str(folder)]) == 0
    return Page(folder / "report.html")


def test_before_and_after_are_reference_and_policy(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    assert "-0.25 reward before 0.75 reward after 0.875 win rate" in page.text
    assert "before after reward -0.25 0.75" in page.text
    assert "before, score -0.5 plain after, score 0.625 (better)" in page.text


def test_it_says_whether_a_run_goes_on_was_cut_off_or_interrupted(tmp_path):
    here = {"pid": os.getpid(), "host": platform.node()}
    gone = {"pid": 2**22 + 1, "host": platform.node()}  # above Linux's largest
    texts = [
        page_of(write_run(tmp_path / str(i), **info)).text
        for i, info in enumerate(
            [
                {"process": here},
                {"process": gone},
                {"process": gone, "ended": "interrupted by SIGTERM: checkpoint-5"},
                {"process": {"pid": 1, "host": "another"}},
            ]
        )
    ]
    assert "running 5 of 10 steps" in texts[0]
    assert "cut off: its process is gone 5 of 10 steps" in texts[1]
    assert "interrupted by SIGTERM: checkpoint-5 5 of 10 steps" in texts[2]
    assert "it runs on another machine, or was cut off" in texts[3]


def test_a_killed_runs_half_line_costs_that_line_alone(tmp_path):
    folder = write_run(tmp_path / "run")
    for path in (folder / "metrics" / "training_metrics.csv", folder / "trainer_log.jsonl"):
        with path.open("a") as file:
            file.write('{"6,0.3')
    assert "score 0.5" in page_of(folder).text


def test_metrics_of_a_later_run_in_the_same_folder_are_not_shown_as_this_runs(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "metrics" / "training_metrics.csv"
    path.write_text(path.read_text().replace(",0.5,", ",7777.0,"))
    text = page_of(folder).text
    assert "7777" not in text
    assert "is of another run" in text
    assert "score 0.5" in text  # from the log


def test_a_guard_that_fired_is_named_with_its_step_and_cure(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "metrics" / "training_metrics.csv"
    rows = list(csv.DictReader(path.open()))
    rows[2]["guard_kl"] = rows[4]["guard_kl"] = "1"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        writer.writeheader()
        writer.writerows(rows)
    text = page_of(folder).text
    assert "step 3 (2 steps in all): guard_kl: KL is 1.5 nats a response" in text
    assert "raise init_kl_coef" in text


def test_a_reward_model_has_its_loss_accuracy_and_margin(tmp_path):
    folder = tmp_path / "rm"
    folder.mkdir()
    history = [
        {"step": 2, "loss": 0.7, "learning_rate": 1e-3},
        {"step": 4, "loss": 0.5, "learning_rate": 5e-4},
        {"step": 4, "eval_loss": 0.6, "eval_accuracy": 0.75, "eval_margin": 1.25},
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (folder / "eval_results.json").write_text(json.dumps(history[2]))
    (folder / INFO).write_text(json.dumps({"stage": "rm", "model": "base", "ended": "finished"}))
    text = page_of(folder).text
    assert "stage rm base finished" in text
    assert "0.75 accuracy" in text
    assert "training 0.5 held-out pairs 0.6" in text
    assert "margin 1.25" in text
    assert "the actor's" not in text  # what learning_rate means in stage ppo


def test_a_run_of_one_step_has_numbers_in_place_of_curves(tmp_path):
    html = page_of(write_run(tmp_path, steps=1)).html
    assert "KL to the reference" in html
    assert "<svg" not in html


def test_out_names_the_file_and_leaves_the_run_alone(tmp_path):
    folder = write_run(tmp_path / "run")
    assert main([str(folder), "--out", str(tmp_path / "other.html")]) == 0
    assert not (folder / "report.html").exists()
    assert "0.875" in (tmp_path / "other.html").read_text(encoding="utf-8")


def test_a_chart_spans_its_width_and_leaves_a_gap_where_a_value_is_not_finite():
    svg = ET.fromstring(chart("a < b", [Line("y", [1, 2, 3, 4, 5], [0, 1, math.nan, 1, 0])]))
    lines = svg.findall("polyline")
    points = [[p.split(",") for p in line.attrib["points"].split()] for line in lines]
    assert [len(piece) for piece in points] == [2, 2]
    assert float(points[0][0][0]) == LEFT
    assert float(points[1][-1][0]) == WIDTH - RIGHT
    assert float(points[0][1][1]) < float(points[0][0][1])  # 1 is drawn above 0
    assert chart("none", [Line("y", [1], [math.nan])]) == ""


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3.2, 4), (5, 5), (0, 0), (1e-7, 3e-7), (-1e6, 2)]
)
def test_ticks_cover_the_values_and_are_few(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 6
    assert ticks == sorted(set(ticks))


def test_what_to_look_for_is_the_same_on_the_page_of_metrics():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    listed = re.split(r"\n- ", page[page.index("## What to look for") :])[1:]
    assert [" ".join(line.split()) for line in listed] == list(WHAT_TO_LOOK_FOR.values())
    assert set(WHAT_TO_LOOK_FOR) <= set(COLUMNS)


def test_a_record_hides_tokens_and_what_urls_carry(config):
    shown = record.changed_settings(config(hf_hub_token="hf_secret"))
    assert shown["hf_hub_token"] == "***"
    assert "secret" not in record.without_secrets("at https://me:secret@host/x?key=secret or so")


def test_a_record_of_another_process_is_left_alone(tmp_path):
    (tmp_path / INFO).write_text(json.dumps({"process": {"pid": 1, "host": "another"}}))
    with pytest.raises(ValueError, match="bad"), record.outcome(tmp_path):
        raise ValueError("bad")
    assert "ended" not in json.loads((tmp_path / INFO).read_text())
