"""What importing the ops costs, and that a forced backend is never replaced in silence."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_the_ops_need_torch_and_nothing_else_that_is_installed():
    code = """
import sys, torch
before = set(sys.modules)
import fastppo.ops
tops = {name.split('.')[0] for name in set(sys.modules) - before} - {'fastppo', 'torch'}
print(sorted(tops - set(sys.stdlib_module_names)))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_ops_import_in_under_300_ms_above_torch():
    clock = "time.perf_counter()"
    code = f"import torch, time; t = {clock}; import fastppo.ops; print({clock} - t)"
    assert min(float(run(code).stdout) for _ in range(3)) < 0.3


CALLED = "import torch; from fastppo.ops import whiten; whiten(torch.ones(2))"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("triton", "FASTPPO_BACKEND='triton' cannot run: this version has no triton kernel"),
        ("native", "FASTPPO_BACKEND='native' cannot run: this version has no native kernel"),
        ("gpu", "FASTPPO_BACKEND='gpu' is no backend; wanted one of triton, native, torch"),
    ],
)
def test_a_forced_backend_that_cannot_run_says_why(name, message):
    done = run(CALLED, FASTPPO_BACKEND=name)
    assert done.returncode == 1
    assert message in done.stderr


def test_torch_can_be_forced():
    assert run(CALLED, FASTPPO_BACKEND="torch").returncode == 0
