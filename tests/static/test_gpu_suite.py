"""The GPU suite, walked through without a GPU: it must not fail for the first one who has one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import SECTIONS, markdown

ROOT = Path(__file__).parents[2]


def suite(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_every_section_runs_and_writes() -> None:
    done = suite("--rehearse", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    for section in SECTIONS:
        assert f"{section}.json" in done.stdout
    assert "README.md" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu runs the suite")
def test_without_a_gpu_it_says_so() -> None:
    done = suite()
    assert done.returncode == 2
    assert "no GPU here" in done.stderr


def test_a_rehearsal_without_the_interpreter_is_refused() -> None:
    done = suite("--rehearse", TRITON_INTERPRET="0")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1" in done.stderr


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
