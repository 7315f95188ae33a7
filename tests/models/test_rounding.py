"""What is rounding and what is a fault, in every arithmetic that a run's products may be in.

There is no GPU here: a product in TF32 is one of operands that were rounded to its 11 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastppo.errors import TrainingStopped, UserError
from fastppo.models import rounding
from fastppo.models.build import Roles
from fastppo.ppo import guards, trainer

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
APART = {"log_prob_max_token_len_per_gpu": 4000}  # the update runs a forward of its own


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    """PyTorch's flags are the process's; they are put back."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """To so many significant bits of the 24 of a float32; gradients pass as if it were not."""
    drop = 24 - bits
    whole = x.detach().contiguous().view(torch.int32)
    near = ((whole + (1 << (drop - 1))) >> drop << drop).view(torch.float32)
    return x + (near - x.detach())


def round_where(made: Roles, applies: Callable[[], bool], bits: int = 11) -> None:
    """Passes in which `applies` holds multiply as a GPU does in TF32; others in float32.

    As where one kernel of a product has tensor cores and that of another shape has none.
    """

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return rounded(output, bits) if applies() else output

    for module in made.model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.register_forward_hook(hook)


def test_a_healthy_run_in_tf32_is_neither_stopped_nor_warned(state):
    """Scoring in one kernel, the update in another; a step with learning follows it."""
    run = state(tf32=True, max_steps=3, **APART)
    round_where(run.roles, torch.is_grad_enabled)
    for _ in range(3):
        run = trainer.step_update(run)
    rows = run.metrics.rows
    assert all(row["ratio_first_pass"] > 1e-4 for row in rows), "it would stop a run in float32"
    assert [guards.warnings(rows[: i + 1]) for i in range(3)] == [[]] * 3


def test_differences_as_large_as_tf32s_stop_a_float32_run(state):
    run = state(**APART)
    round_where(run.roles, torch.is_grad_enabled)
    with pytest.raises(TrainingStopped, match="before the first update"):
        trainer.step_update(run)


def test_in_tf32_a_policy_that_is_another_still_stops_the_run(state, monkeypatch):
    def moved(*args: Any, **kwargs: Any) -> Any:
        scored = inner(*args, **kwargs)
        return replace(scored, logprob_N=scored.logprob_N + 0.05)

    inner = trainer.score
    monkeypatch.setattr(trainer, "score", moved)
    with pytest.raises(TrainingStopped, match="before the first update"):
        trainer.step_update(state(tf32=True, **APART))


@pytest.mark.parametrize(("tf32", "warned"), [(True, False), (False, True)])
def test_a_sampler_in_tf32_is_the_same_policy(state, monkeypatch, tf32, warned):
    """A step of decoding has few rows, and so kernels of its own."""
    sampling: list[bool] = []

    def sampled(*args: Any, **kwargs: Any) -> Any:
        sampling.append(True)
        try:
            return inner(*args, **kwargs)
        finally:
            sampling.clear()

    inner = trainer.sample
    monkeypatch.setattr(trainer, "sample", sampled)
    run = state(tf32=tf32)
    round_where(run.roles, lambda: bool(sampling))
    row = trainer.step_update(run).metrics.rows[-1]
    assert row["sampler_gap_abs"] > 1e-3
    assert bool(row["guard_sampler"]) == warned


@pytest.mark.parametrize(("tf32", "refused"), [(True, False), (False, True)])
def test_a_head_in_tf32_is_the_models_own(state, monkeypatch, tf32, refused):
    run = state(tf32=tf32)
    monkeypatch.setattr(Roles, "_head_error", lambda *_: 3e-3)
    if not refused:
        run.roles.check_head(run.prompts[0].ids)
        return
    with pytest.raises(UserError, match=r"its logits are not head\(hidden\)"):
        run.roles.check_head(run.prompts[0].ids)


@pytest.mark.parametrize(
    ("flag", "device", "autocast", "expected"),
    [
        ("highest", CUDA, None, "float32"),
        ("highest", CPU, None, "float32"),
        ("high", CUDA, None, "tf32"),
        ("medium", CUDA, None, "tf32"),  # on a GPU it is the same as high
        ("medium", CPU, None, "bfloat16"),
        ("highest", CUDA, torch.bfloat16, "bfloat16"),  # bf16: true on weights of any dtype
        ("high", CUDA, torch.bfloat16, "bfloat16"),
        ("high", CUDA, torch.float16, "float16"),
    ],
)
def test_what_products_are_in(flag, device, autocast, expected):
    from fastppo.models.rounding import product_precision

    torch.set_float32_matmul_precision(flag)
    assert product_precision(device, autocast=autocast) == expected


def test_tf32_that_other_code_turned_on_counts():
    """By PyTorch's older flag, as a reward function's module may do."""
    from fastppo.models.rounding import float32_precision

    torch.backends.cuda.matmul.allow_tf32 = True
    assert float32_precision(CUDA) == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False
    assert float32_precision(CUDA) == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_autocast_around_the_loop_counts(tiny_roles, dtype):
    made = tiny_roles()
    with torch.autocast("cpu", dtype=getattr(torch, dtype)):
        assert made.product_precision == dtype
    assert made.product_precision == "float32"


def test_every_limit_grows_with_the_rounding():
    from fastppo.models.rounding import LIMITS

    assert LIMITS["float16"] == LIMITS["tf32"], "both have 11 significant bits"
    steps = [LIMITS[name] for name in ("float32", "tf32", "bfloat16")]
    for name in ("log_ratio", "sampler_gap", "head"):
        values = [getattr(step, name) for step in steps]
        assert values == sorted(set(values))


@pytest.mark.parametrize(
    ("dtype", "flags", "said"),
    [
        (torch.bfloat16, "fpu avx2 avx512f", True),
        (torch.bfloat16, "fpu avx2 avx512f avx512_bf16", False),
        (torch.bfloat16, "fp asimd i8mm bf16", False),
        (torch.float16, "fpu avx2 avx512_bf16", True),
        (torch.float16, "fp asimd asimdhp", False),
        (None, "fpu", False),
    ],
)
def test_16_bits_without_instructions_for_them_get_a_line(tmp_path, dtype, flags, said):
    """They are emulated: the run would be several times slower than in float32, without a word."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n", encoding="utf-8")
    line = rounding.note_on_16_bits(CPU, dtype, cpuinfo)
    assert (line is not None) == said
    if line is not None:
        key = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        assert line.startswith(f"{key}: true: ")
        assert line.endswith("leave the key out to compute in float32")
    assert rounding.note_on_16_bits(CUDA, dtype, cpuinfo) is None
    assert rounding.note_on_16_bits(CPU, dtype, tmp_path / "none") is None


@pytest.mark.parametrize(("capability", "slow"), [((7, 5), True), ((8, 0), False)])
def test_bf16_on_a_gpu_older_than_ampere_gets_a_line(monkeypatch, capability, slow):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    line = rounding.note_on_16_bits(CUDA, torch.bfloat16)
    assert (line is not None) == slow
    assert line is None or line.endswith("use fp16: true")
    assert rounding.note_on_16_bits(CUDA, torch.float16) is None
