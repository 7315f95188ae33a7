"""Stage ppo in several processes: to rounding, the run of one.

Nothing random knows its process, an optimiser step holds the same rows in any world, and what is
decided or averaged is so over all rows. So two and three processes give what one gives.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastppo import toy
from tests import world as processes
from tests.ppo.parallel_cases import CASES, all_cases, one_step
from tests.tiers import slow_unless

SIZES = (2, 3)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each process of worlds of 1, 2 and 3 has, by size and rank; run once for all tests."""
    folder = tmp_path_factory.mktemp("worlds")
    for name in CASES:
        toy.write_model(folder / name / "model")
    return {
        size: processes.results(all_cases, size, folder / "results", folder) for size in (1, *SIZES)
    }


def close(got: Any, wanted: Any, tolerance: float, where: str = "") -> None:
    """Compare numbers, tensors, lists and dicts of them; anything else has to be equal."""
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys(), where
        for key in wanted:
            close(got[key], wanted[key], tolerance, f"{where} {key}")
    elif isinstance(wanted, list | tuple):
        assert len(got) == len(wanted), where
        for i, pair in enumerate(zip(got, wanted, strict=True)):
            close(*pair, tolerance, f"{where} {i}")
    elif isinstance(wanted, torch.Tensor):
        assert got.dtype == wanted.dtype, where
        torch.testing.assert_close(
            got,
            wanted,
            atol=tolerance,
            rtol=tolerance,
            equal_nan=True,
            msg=lambda m: f"{where} {m}",
        )
    elif isinstance(wanted, float):
        assert got == pytest.approx(wanted, abs=tolerance, rel=tolerance, nan_ok=True), where
    else:
        assert got == wanted, where


def close_row(got: dict[str, float], wanted: dict[str, float]) -> None:
    """Compare the metrics of a step; the sampler's log-probs are float32 in any world."""
    for key, value in wanted.items():
        tolerance = 1e-7 if key.startswith(("sampler", "rollout_is")) else 1e-10
        close(float(got[key]), float(value), tolerance, key)


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "grpo", CASES))
def test_a_step_of_threads_is_that_of_one_process(tmp_path, name):
    """Threads exchange what processes would, so this part needs none of them."""
    toy.write_model(tmp_path / "model")
    (wanted,) = processes.in_threads(one_step, 1, tmp_path, name)
    for got in processes.in_threads(one_step, 2, tmp_path, name):
        close_row(got.pop("row"), wanted["row"])
        close(got, {key: x for key, x in wanted.items() if key != "row"}, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_losses_advantages_and_metrics_are_those_of_one_process(found, size, name):
    (alone,) = found[1]
    wanted = alone[name]
    assert len({n for lengths in wanted["lengths"] for n in lengths}) > 3, "lengths are ragged"
    for process in found[size]:
        got = process[name]
        assert got["texts"] == wanted["texts"]
        assert all(map(torch.equal, got["ids"], wanted["ids"]))
        for key in ("advantages", "returns", "logprobs", "gradients", "parameters", "kl_coef"):
            close(got[key], wanted[key], 1e-10, f"{size} {key}")
        for row, one in zip(got["rows"], wanted["rows"], strict=True):
            close_row(row, one)
        for key in ("running", "before", "after"):
            close(got[key], wanted[key], 1e-10, f"{size} {key}")


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_float32_agrees_to_rounding_over_ten_steps(found, size):
    (alone,) = found[1]
    for process in found[size]:
        got, wanted = process["float32"], alone["float32"]
        assert got["texts"] == wanted["texts"]
        close(got["parameters"], wanted["parameters"], 2e-5)
        for row, one in zip(got["rows"], wanted["rows"], strict=True):
            for key in ("score", "kl", "entropy", "policy_loss", "grad_norm_actor", "ratio_mean"):
                assert row[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_processes_hold_the_same_bits_and_their_own_rows(found, size):
    first, *others = found[size]
    for name in first:
        for other in others:
            assert all(map(torch.equal, first[name]["parameters"], other[name]["parameters"]))
        rows = [row for process in found[size] for row in process[name]["own"][0]]
        assert rows == list(range(len(first[name]["lengths"][0])))
    for process in found[size]:  # the answers to a prompt stay in one process
        assert all(own.start % 2 == own.stop % 2 == 0 for own in process["grpo"]["own"])


@pytest.mark.slow
def test_the_cases_reach_what_they_are_there_for(found):
    (alone,) = found[1]
    assert any(row["early_stopped"] for row in alone["early"]["rows"])
    assert any(row["skipped_steps"] for row in alone["threshold"]["rows"])
    assert any(row["optimizer_steps"] for row in alone["threshold"]["rows"])
    warmed = alone["gae"]["gradients"]
    assert any(gradient is None for gradient in warmed[0])
    assert all(gradient is not None for gradient in warmed[-1])


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_first_process_alone_writes(found, size):
    """Here each has a folder of its own to write into."""
    first, *others = found[size]
    for name in CASES:
        assert "metrics/training_metrics.csv" in first[name]["files"]
        assert all(process[name]["files"] == ["prompts.json"] for process in others)
