"""Stage rm in several processes: to rounding, the run of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastppo.config import config_from_dict
from fastppo.memory.budgets import Budgets
from fastppo.rm.arguments import fit_micro_batches
from fastppo.rm.pairs import collate, part_of
from fastppo.types import Pair
from tests import world
from tests.reliability import runs

# Adam makes a whole step of a gradient that is nothing but rounding; SGD does not.
PLAIN = {
    "lora_dropout": 0.0,
    "calibrate_reward": True,
    "num_train_epochs": 2,
    "optim": "sgd",
    "learning_rate": 0.1,
}
CASES: dict[str, dict[str, Any]] = {
    # 14 pairs: the last step of an epoch has 2, so that of three processes one has none.
    "lora": {"do_train": True, "do_predict": True},
    "full": {"finetuning_type": "full"},
}


def test_a_part_of_a_micro_batch_has_its_pairs_and_no_more_padding_than_they_need():
    pairs = [Pair([1], [2] * n, [3] * (n + 1)) for n in (1, 5, 2)]
    whole = collate(pairs, pad_id=0)
    part = part_of(whole, range(2, 3))
    wanted = collate(pairs[2:], pad_id=0)
    assert all(torch.equal(part[name], wanted[name]) for name in wanted)
    assert part_of(whole, range(3)) is whole


@pytest.mark.parametrize(("processes", "batch", "accumulated"), [(1, 2, 6), (2, 4, 3), (5, 6, 2)])
def test_the_budget_is_that_of_a_process(tmp_path, processes, batch, accumulated):
    config = config_from_dict(
        {
            **runs.rm(tmp_path),
            "cutoff_len": 10,
            "ppo_max_token_len_per_gpu": 40,
            "per_device_train_batch_size": 12,
            "gradient_accumulation_steps": 1,
        }
    )
    fitted = fit_micro_batches(config, Budgets.of(config), processes)
    assert fitted.per_device_train_batch_size == batch
    assert fitted.gradient_accumulation_steps == accumulated


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    """What the command writes, by case and number of processes."""
    folder, results = tmp_path_factory.mktemp("pairs"), {}
    for name, changes in CASES.items():
        for size in (1, 2, 3):
            settings = runs.rm(folder / f"{name}-{size}", **PLAIN, **changes)
            codes, said = world.run(settings, size)
            assert codes == [0] * size, said
            results[name, size] = left(Path(settings["output_dir"]))
    return results


def left(folder: Path) -> dict[str, Any]:
    """Weights, metrics, log, and the names of all files of a run."""
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= {f"{path.name} {name}": x for name, x in load_file(path).items()}
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return {
        "weights": weights,
        "log": [runs.without_clocks(entry) for entry in state["log_history"]],
        "files": sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()),
    }


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_weights_losses_and_evaluations_are_those_of_one_process(found, name, size):
    got, wanted = found[name, size], found[name, 1]
    assert got["files"] == wanted["files"]
    for key, x in wanted["weights"].items():
        torch.testing.assert_close(got["weights"][key], x, atol=1e-5, rtol=1e-4, msg=key)
    assert len(got["log"]) == len(wanted["log"]) > 3
    for entry, one in zip(got["log"], wanted["log"], strict=True):
        assert entry.keys() == one.keys()
        for key, value in one.items():
            # A fraction of an epoch is counted in micro-batches, which are of several processes.
            if isinstance(value, float) and key != "epoch":
                assert entry[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
