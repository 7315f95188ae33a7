"""Every test that asks for a `backend` runs on each that can run here, on memory full of NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastppo.ops import workspace
from fastppo.ops.backend import available

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Float64 is the definition's alone.
FUSED = tuple(name for name in available(DEVICE) if name != "torch")
if "triton" in FUSED and DEVICE == "cpu":
    from tests.ops import interpreter

    interpreter.install()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["torch", *FUSED])
    if "fused" in metafunc.fixturenames:
        metafunc.parametrize("fused", FUSED)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that whatever a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    workspace.release()
    yield
    torch.use_deterministic_algorithms(before)


def pytest_report_header() -> str:
    how = "on " + torch.cuda.get_device_name() if DEVICE == "cuda" else "interpreted"
    return f"backends: torch, {', '.join(f'{name} ({how})' for name in FUSED) or 'no other'}"
