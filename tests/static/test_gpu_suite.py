"""The GPU suite, walked through without a GPU: it must not fail for the first one who has one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import SECTIONS, main, markdown

ROOT = Path(__file__).parents[2]


# `tests` starts pytest twice to collect what the suite of these tests has collected anyway.
MEASURED = [name for name in SECTIONS if name != "tests"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for want of a GPU")
def test_every_section_that_measures_runs_and_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rehearse", "--only", *MEASURED]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}.json" in said for name in MEASURED)


@pytest.mark.slow  # imports everything three times
def test_every_section_runs_and_writes_from_a_shell() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--rehearse"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    assert all(f"{name}.json" in done.stdout for name in SECTIONS)
    assert "README.md" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu runs the suite")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "no GPU here" in capsys.readouterr().err


def test_a_rehearsal_without_the_interpreter_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main(["--rehearse"]) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


def test_the_table_has_what_was_measured() -> None:
    row = {"rows": 4, "vocab": 96, "dtype": "bfloat16", "what": "copy", "ms": 1.5, "peak_bytes": 0}
    text = markdown(
        {
            "environment": {"device": "D", "date": "2000-01-01", "torch": "1", "triton": "2"},
            "tests": {"tests/ops": {"summary": "7 passed"}},
            "dense": [{**row, "share_of_copy": 1.0}],
            "linear": [],
            "sweep": [
                {"vocab": 96, "dtype": "bfloat16", "config": "1 x 2", "ms": 0.5, "in_table": True}
            ],
        }
    )
    assert "| 4 x 96 | bfloat16 | copy | 1.5 | 1.0 | 0 |" in text
    assert "| 96 | bfloat16 | 1 x 2 | 0.5 | yes |" in text
