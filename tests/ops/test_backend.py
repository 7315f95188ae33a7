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
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        check=False,
    )


def test_the_ops_need_torch_and_nothing_else_that_is_installed():
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
import fastppo.ops
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
    assert done.stdout.strip() == "11 ops ran"


def test_no_module_comes_in_with_the_ops_but_their_own():
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


@pytest.mark.alone
def test_the_ops_import_in_under_300_ms_above_torch():
    clock = "time.perf_counter()"
    code = f"import torch, time; t = {clock}; import fastppo.ops; print({clock} - t)"
    assert min(float(run(code).stdout) for _ in range(3)) < 0.3


CALLED = "import torch; from fastppo.ops import whiten; whiten(torch.ones(2))"


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
def test_a_forced_backend_that_cannot_run_says_why(name, message):
    done = run(CALLED, FASTPPO_BACKEND=name)
    assert done.returncode == 1
    assert message in done.stderr


def test_torch_can_be_forced():
    assert run(CALLED, FASTPPO_BACKEND="torch").returncode == 0


def test_a_forced_backend_is_refused_by_every_op():
    code = """
import torch
from tests.ops.registry import OPS, Shape
import fastppo.ops
for op in OPS.values():
    try:
        op.function(**op.make_inputs(Shape(n=6, vocab=5, hidden=3, batch=2), torch.float32, 0))
    except ValueError as error:
        assert str(error).startswith(f"{op.name}: FASTPPO_BACKEND='triton' cannot run"), error
    else:
        raise AssertionError(f"{op.name} fell back in silence")
print(len(OPS))
"""
    done = run(code, FASTPPO_BACKEND="triton")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
