"""Which configuration a launch over logits gets, and that it changes rounding alone."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import policy_loss
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
from tests.tiers import slow_unless

H100 = DEVICES["sm_90"]
CPU = torch.device("cpu")
CAN_RUN = pytest.mark.skipif("triton" not in FUSED, reason="no Triton here")


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


def test_every_method_is_a_candidate_where_it_has_a_reason():
    """A row that is read twice has four; of one that is read once only the loads can go ahead."""
    methods = {c.method for c in candidates(2, 32000, twice=True)}
    assert methods == {"tiles", "ahead", "held", "two launches"}
    assert {c.method for c in candidates(2, 32000)} == {"tiles", "ahead"}
    assert {c.method for c in candidates(2, 32000, pair=True)} == {"tiles"}
    long = candidates(4, 151936, twice=True)
    assert {c.method for c in long} == {"tiles", "ahead", "two launches"}
    # 32000 logits of 2 bytes among 256 threads: 15.6 vectors each, and so a tile of 16.
    held = [c for c in candidates(2, 32000, twice=True) if c.method == "held"]
    assert [(c.warps, c.tiles) for c in held] == [(8, 16), (16, 8), (32, 4)]
    assert all(c.holds(2, 32000) for c in held)


def test_a_forced_configuration_is_chosen_inside_the_block_alone():
    own = RowConfig(4, 2, 3)
    usual = chosen(2, 32000, pair=False, twice=True, device=CPU)
    with forced(own):
        assert chosen(2, 32000, pair=False, twice=True, device=CPU) == own
    assert chosen(2, 32000, pair=False, twice=True, device=CPU) == usual != own


@CAN_RUN
@pytest.mark.parametrize(
    "name",
    slow_unless(
        lambda name: name == "policy_loss", ["token_logprobs", "policy_loss", "score_tokens"]
    ),
)
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


# Rows of one to four tiles, an odd and an even number of them, with a rest and ends.
METHODS = (
    RowConfig(1, 1, method="ahead"),
    RowConfig(1, 1, 1, method="ahead"),
    RowConfig(1, 2, method="ahead"),
    RowConfig(1, 8, method="ahead"),  # no whole tile
    RowConfig(1, 1, method="two launches"),
    RowConfig(1, 2, 1, method="two launches"),
    RowConfig(1, 8, method="held"),
    RowConfig(2, 4, 1, method="held"),
)


KINDS = ((torch.float32, 600), (torch.bfloat16, 641), (torch.float16, 901))


@CAN_RUN
@pytest.mark.parametrize(
    ("config", "dtype", "vocab"),
    slow_unless(
        lambda config, dtype, _: config in (METHODS[0], METHODS[6]) and dtype == torch.bfloat16,
        [(config, *kind) for config in METHODS for kind in KINDS],
    ),
    ids=str,
)
def test_the_rule_by_every_method(config, dtype, vocab):
    """The loss with its entropy, a reference and rows that take no part; and the log-probs."""
    for name in ("policy_loss", "token_logprobs"):
        inputs = place(OPS[name].make_inputs(Shape(n=3, vocab=vocab), dtype, 0), "triton")
        with forced(config):
            check(OPS[name], inputs, "triton")


@CAN_RUN
@pytest.mark.parametrize("method", [pytest.param("ahead", marks=pytest.mark.slow), "two launches"])
def test_the_order_of_a_rows_sums_is_not_the_methods(method):
    """The same bits as with a tile at a time, in chunks too: only the loads' time differs."""
    op = OPS["policy_loss"]
    inputs = place(op.make_inputs(Shape(n=5, vocab=704), torch.bfloat16, 0), "triton")
    linear = OPS["linear_policy_loss"]
    states = place(linear.make_inputs(Shape(n=5, vocab=704, hidden=8), torch.float32, 0), "triton")
    found = []
    for config in (RowConfig(1, 2), RowConfig(1, 2, method=method)):
        with forced(config):
            dense = run(op, op.function, inputs, backend="triton")
            chunked = run(
                linear, linear.function, states, backend="triton", chunk_bytes=2 * 704 * 4
            )
        found.append([*dense[0], *dense[1], *chunked[0], *chunked[1]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@CAN_RUN
@pytest.mark.parametrize(
    "config",
    slow_unless(lambda c: c.method == "held", [METHODS[0], METHODS[4], METHODS[6]]),
    ids=str,
)
def test_in_place_by_every_method(config):
    """No logit is read after its gradient was written over it."""
    inputs = place(
        OPS["policy_loss"].make_inputs(Shape(n=3, vocab=641), torch.float32, 1), "triton"
    )
    logits = inputs.pop("logits_NV")
    found = []
    with forced(config):
        for inplace in (False, True):
            leaf = logits.clone().requires_grad_()
            x_NV = leaf * 1.0 if inplace else leaf
            policy_loss(x_NV, **inputs, inplace=inplace, backend="triton").loss.backward()
            found.append(x_NV.detach() if inplace else leaf.grad)
    assert torch.equal(*found)


@CAN_RUN
def test_a_row_that_does_not_fit_is_refused():
    logits = torch.zeros(1, 2000).requires_grad_()
    zero = torch.zeros(1)
    with forced(RowConfig(1, 8, method="held")), pytest.raises(ValueError, match="cannot hold"):
        policy_loss(logits, zero.long(), zero, zero, zero + 1, backend="triton")
