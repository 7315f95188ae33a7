"""What importing the ops costs, and that a forced backend is never replaced in silence."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from fastppo.ops import arguments, backend, whiten
from tests.ops.registry import OPS, Shape


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        check=False,
    )


@pytest.mark.slow  # in an environment with torch alone they compute: tests/packaging
def test_the_ops_need_torch_and_nothing_else_that_is_installed():
    """And import, to begin with, no module but their own."""
    # Whatever fastppo asks for is looked at, loaded by torch already or not (numpy is), at import
    # and while every op runs.
    code = """
import builtins, sys, torch
plain = builtins.__import__
allowed = {'fastppo', 'torch', *sys.stdlib_module_names}
def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    asking = (globals or {}).get('__name__', '')
    if level == 0 and asking.startswith('fastppo') and name.split('.')[0] not in allowed:
        raise ImportError(f'{asking} imports {name}')
    return plain(name, globals, locals, fromlist, level)
builtins.__import__ = guarded
before = set(sys.modules)
import fastppo.ops
tops = {name.split('.')[0] for name in set(sys.modules) - before} - {'fastppo', 'torch'}
print(sorted(tops - set(sys.stdlib_module_names)))
from tests.ops.registry import OPS, Shape
for op in OPS.values():
    inputs = op.make_inputs(Shape(n=6, vocab=5, hidden=3, batch=2), torch.float32, 0)
    for name in op.differentiable:
        inputs[name].requires_grad_()
    result = op.function(**inputs)
    if op.loss:
        getattr(result, op.loss).backward()
print(len(OPS), 'ops ran')
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["[]", "11 ops ran", ""]


@pytest.mark.alone
def test_the_ops_import_in_under_300_ms_above_torch():
    clock = "time.perf_counter()"
    code = f"import torch, time; t = {clock}; import fastppo.ops; print({clock} - t)"
    assert any(float(run(code).stdout) < 0.3 for _ in range(3))  # a busy machine has three tries


def forced(monkeypatch, name):
    """As a process has it that was started with this FASTPPO_BACKEND, and no interpreter."""
    monkeypatch.setattr(backend, "FORCED", name)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(arguments, "_chosen", {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "triton",
            "FASTPPO_BACKEND='triton' cannot run: the inputs are on cpu; move them to a GPU",
        ),
        ("gpu", "FASTPPO_BACKEND='gpu' is no backend; wanted one of triton, native, torch"),
    ],
)
def test_a_forced_backend_that_cannot_run_says_why(name, message, monkeypatch):
    forced(monkeypatch, name)
    with pytest.raises(ValueError, match=re.escape(message)):
        whiten(torch.ones(2))


def test_torch_can_be_forced(monkeypatch):
    forced(monkeypatch, "torch")
    assert whiten(torch.ones(2)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_a_forced_backend_is_refused_by_every_op(op, monkeypatch):
    forced(monkeypatch, "triton")
    inputs = op.make_inputs(Shape(n=6, vocab=5, hidden=3, batch=2), torch.float32, 0)
    with pytest.raises(ValueError, match=f"^{op.name}: FASTPPO_BACKEND='triton' cannot run"):
        op.function(**inputs)


@pytest.mark.slow  # a process of its own: the environment is read once
def test_the_environment_forces_a_backend():
    code = "import torch; from fastppo.ops import whiten; whiten(torch.ones(2))"
    done = run(code, FASTPPO_BACKEND="triton")
    assert "ValueError: whiten: FASTPPO_BACKEND='triton' cannot run" in done.stderr
