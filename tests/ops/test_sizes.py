"""Which configuration a launch over logits gets, and that it changes rounding alone."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops.backends.sizes import (
    DEVICES,
    MEASURED,
    Measured,
    RowConfig,
    candidates,
    chosen,
    forced,
    row_config,
    rows_in_l2,
)
from tests.ops.conftest import FUSED
from tests.ops.oracle import check, place, run
from tests.ops.registry import OPS, Shape

H100 = DEVICES["sm_90"]
CPU = torch.device("cpu")


def test_a_row_that_is_read_twice_still_lies_in_the_l2_cache():
    """132 rows of 304 kB are 40 MB of an H100's 50; two programs each would be 80."""
    assert rows_in_l2(2 * 151936, H100) == 1
    assert row_config(2, 151936, twice=True, device=H100).programs == 1
    assert rows_in_l2(4 * 151936, H100) == 0  # 80 MB: read from memory again, whatever is chosen
    assert row_config(4, 151936, twice=True, device=H100).programs == 0
    assert row_config(2, 64000, twice=True, device=H100).programs == 2
    assert row_config(2, 32000, twice=True, device=H100).programs == 0  # as many as there are


def test_a_row_that_is_read_once_has_a_program():
    assert row_config(2, 151936, device=H100).programs == 0
    assert row_config(2, 151936, pair=True, device=H100).programs == 0
    assert row_config(2, 151936, twice=True).programs == 0  # of no known device


def test_a_measured_table_comes_before_the_model(monkeypatch):
    fast = RowConfig(32, 2, 1)
    table = Measured("2026-01-01", ((2, 40000, True, RowConfig(8, 2)), (2, 1 << 62, True, fast)))
    monkeypatch.setitem(MEASURED, H100.name, table)
    row_config.cache_clear()
    try:
        assert row_config(2, 151936, twice=True, device=H100) == fast
        assert row_config(2, 32000, twice=True, device=H100) == RowConfig(8, 2)
        assert row_config(4, 151936, twice=True, device=H100).warps == 8  # not measured
    finally:
        row_config.cache_clear()


def test_candidates_have_one_program_of_16_and_of_32_warps_and_no_tile_longer_than_a_row():
    found = candidates(2, 151936)
    assert {(c.warps, c.programs) for c in found} >= {(16, 1), (32, 1), (8, 0), (8, 4)}
    for config in candidates(2, 8192):
        assert config.threads * config.tiles * 8 <= 8192
    assert candidates(2, 7)


def test_a_forced_configuration_is_chosen_inside_the_block_alone():
    own = RowConfig(4, 2, 3)
    usual = chosen(2, 32000, pair=False, twice=True, device=CPU)
    with forced(own):
        assert chosen(2, 32000, pair=False, twice=True, device=CPU) == own
    assert chosen(2, 32000, pair=False, twice=True, device=CPU) == usual != own


@pytest.mark.skipif("triton" not in FUSED, reason="no Triton here")
@pytest.mark.parametrize("name", ["token_logprobs", "policy_loss", "score_tokens"])
def test_programs_that_share_the_rows_give_the_same_bits(name):
    """Eleven rows among the interpreter's four multiprocessors."""
    op = OPS[name]
    inputs = place(op.make_inputs(Shape(n=11, vocab=600), torch.bfloat16, 0), "triton")
    found = []
    for programs in (0, 1):
        with forced(RowConfig(1, 2, programs)):
            found.append(run(op, op.function, inputs, backend="triton"))
            check(op, inputs, "triton")
    pairs = zip([*found[0][0], *found[0][1]], [*found[1][0], *found[1][1]], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
