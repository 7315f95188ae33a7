"""Every test that asks for a `backend` runs on each that can run here, on memory full of NaN.

One that asks for `traced` does too, but for one backend in the slow tier alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import pytest
import torch

from fastppo.ops import native_library, workspace
from fastppo.ops.backend import available
from tests.tiers import slow_unless

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Float64 is the definition's alone.
FUSED = tuple(name for name in available(DEVICE) if name != "torch")
if "triton" in FUSED and DEVICE == "cpu":
    from tests.ops import interpreter

    interpreter.install()


# What torch.library and torch.compile see of an operator is one code for all backends: the fast
# tier has it with this one.
ONE = "native" if "native" in FUSED and DEVICE == "cpu" else FUSED[0] if FUSED else "torch"
LIBRARY, ISAS = native_library.LIBRARY, native_library.ISAS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    traced = slow_unless(lambda name: name == ONE, ("torch", *FUSED))
    for name, backends in (("backend", ("torch", *FUSED)), ("fused", FUSED), ("traced", traced)):
        if name not in metafunc.fixturenames:
            continue
        if "width" not in metafunc.fixturenames:
            metafunc.parametrize(name, backends)
            continue
        # The widest is what runs here; the others are the same code with shorter vectors.
        fast = widths() if metafunc.definition.get_closest_marker("every_width") else widths()[-1:]
        pairs = [
            pytest.param(
                backend,
                width,
                id=f"{backend}-{width}" if width else backend,
                marks=() if width in (None, *fast) else pytest.mark.slow,
            )
            for backend in backends
            for width in (widths() if backend == "native" else [None])
        ]
        metafunc.parametrize((name, "width"), pairs, indirect=["width"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases that the interpreter runs in the slow tier alone: see `tests.tiers.interpreted`."""
    for item in items:
        mark = item.get_closest_marker("interpreted")
        given = getattr(item, "callspec", None) and item.callspec.params
        if mark is None or DEVICE != "cpu" or "triton" not in map(given.get, ("backend", "fused")):
            continue
        fast = mark.kwargs["fast"]
        if not fast(*(given[name] for name in inspect.signature(fast).parameters)):
            item.add_marker(pytest.mark.slow)


def widths() -> Sequence[str]:
    """Vector widths of this processor, or those up to FASTPPO_CPU's."""
    return ISAS[: LIBRARY.fastppo_isa() + 1]


@pytest.fixture
def width(request: pytest.FixtureRequest) -> Iterator[None]:
    """The native kernels run at the width in `.param`; None leaves them alone."""
    if request.param is None:
        yield
        return
    before = LIBRARY.fastppo_isa()
    assert LIBRARY.fastppo_use_isa(ISAS.index(request.param)) >= 0
    yield
    LIBRARY.fastppo_use_isa(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each vector width that this processor has; afterwards the one that ran before."""
    before = LIBRARY.fastppo_isa()
    if LIBRARY.fastppo_use_isa(ISAS.index(request.param)) < 0:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    LIBRARY.fastppo_use_isa(before)


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
