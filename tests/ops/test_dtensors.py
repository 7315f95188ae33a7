"""Heads that are DTensors: FSDP2's shards are gathered, tensor parallel ones are a group's."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import gather_weight
from tests.ops import ranks

CLOSE = {"atol": 1e-11, "rtol": 1e-11}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_a_gathered_head_has_the_gradient_that_fsdp2_gives_it(tmp_path, size):
    """Each rank has tokens of its own. Of 97 words no number of ranks has as many each."""
    for found in ranks.on_ranks(ranks.data_parallel, size, tmp_path):
        assert found["own"]
        assert found["theirs"].abs().max() > 0.1
        torch.testing.assert_close(found["mean"], found["theirs"], **CLOSE)
        torch.testing.assert_close(found["sum"], size * found["theirs"], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_a_head_that_is_sharded_by_vocabulary_is_its_groups(tmp_path, size):
    want = ranks.logprobs(ranks.inputs_of("plain"), "everything")
    begins = "linear_token_logprobs: weight_VD "
    for found in ranks.on_ranks(ranks.tensor_parallel, size, tmp_path):
        for name, x in found["results"].items():
            torch.testing.assert_close(x, want[name], **CLOSE)
        errors = found["errors"]
        assert errors["no group"] == begins + (
            "is a DTensor: gather_weight(weight_VD) makes the whole of FSDP2's shards; for a "
            "vocabulary that is sharded (tensor parallel) linear_token_logprobs and "
            "linear_policy_loss take group=mesh.get_group()"
        )
        for name, placement in (("replicated", "Replicate"), ("by columns", "Shard(dim=1)")):
            assert errors[name].startswith(begins + "must be a DTensor whose mesh has group= as a")
            assert placement in errors[name].split("came")[1]
        assert errors["a mesh"].endswith("of a DeviceMesh give get_group(), came DeviceMesh")
        assert "hidden_ND must be a plain tensor, came a DTensor" in errors["hidden states"]


def test_what_is_whole_is_not_gathered():
    with pytest.raises(TypeError, match=r"^gather_weight: weight must be a DTensor .*pass it as"):
        gather_weight(torch.ones(3, 2))
