"""What tests share: a copy is what building anew gives, and nothing that a test changes stays."""

from __future__ import annotations

import os

import pytest
import torch

from fastppo.models import build as roles
from fastppo.run import plots
from tests.conftest import differences, module_attributes, process_state, replaced
from tests.shared import BuiltOnce, unchanged
from tests.tiers import slow_unless

KINDS = [
    {},
    {"critic": "shared"},
    {"use_dora": True},
    {"finetuning_type": "full", "critic": "model"},
    {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    {"advantage": "grpo", "num_generations": 2},
]


def weights(made: roles.Roles) -> dict[str, torch.Tensor]:
    models = {
        f"{role}.{n}": p for role, s in made.places.items() for n, p in s.model.named_parameters()
    }
    head = [] if made.critic_head is None else made.critic_head.named_parameters()
    return models | {f"critic_head.{name}": parameter for name, parameter in head}


@pytest.mark.parametrize(
    "changes", slow_unless(lambda changes: changes in (KINDS[2], KINDS[3]), KINDS), ids=str
)
def test_a_copy_is_what_building_anew_gives(config, tmp_path, changes):
    settings, device, built = config(**changes), torch.device("cpu"), BuiltOnce()
    before = torch.get_rng_state()
    anew = roles.build(settings, device)
    after = torch.get_rng_state()
    copies = []
    for _ in range(2):
        torch.set_rng_state(before)
        copies.append(built(settings, device, tmp_path))
        assert torch.equal(torch.get_rng_state(), after)
    assert len(built.known) == 1
    for copied in copies:
        assert weights(copied).keys() == weights(anew).keys()
        for name, parameter in weights(anew).items():
            other = weights(copied)[name]
            assert torch.equal(other, parameter), name
            assert other.requires_grad == parameter.requires_grad, name
        for role in ("actor", "critic"):
            ours, theirs = copied.trainable_parameters(role), anew.trainable_parameters(role)
            assert [p.shape for p in ours] == [p.shape for p in theirs]
        assert copied.table("r") == anew.table("r")
    memory = [{p.data_ptr() for p in weights(copied).values()} for copied in copies]
    assert not memory[0] & memory[1]


def test_a_changed_state_of_the_process_is_named(monkeypatch, tmp_path):
    before, attributes = process_state(), module_attributes()
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "draw_curves", print)
    try:
        torch.set_num_threads(threads + 1)
        torch.set_float32_matmul_precision("medium")
        torch.set_default_dtype(torch.float64)
        found = differences(before, process_state()) + replaced(attributes, module_attributes())
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(torch.float32)
    for words in ("working directory", "threads", "default dtype", "matmul", "plots.draw_curves"):
        assert any(words in line for line in found), words
    assert len(found) == 5


def test_a_changed_file_of_a_shared_folder_is_named(tmp_path):
    (tmp_path / "weights").write_bytes(b"1")
    with pytest.raises(AssertionError, match="weights"), unchanged(tmp_path) as folder:
        (folder / "weights").write_bytes(b"2")


def test_what_a_command_sets_for_its_process_is_gone_in_the_next_test_1():
    os.environ["FASTPPO_TEST_LEFT"] = "1"


def test_what_a_command_sets_for_its_process_is_gone_in_the_next_test_2():
    assert "FASTPPO_TEST_LEFT" not in os.environ
