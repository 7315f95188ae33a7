"""Which mode of offloading a run gets: from the keys, from what fits, and what is refused."""

from __future__ import annotations

import pytest
from torch import nn

from fastppo.offload.activations import ActivationOffload, wrap
from fastppo.ppo import lines
from tests.offload.tools import ids, llama, loss_of


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return llama()


def test_wrong_arguments_raise_errors_that_name_the_cure(model):
    with pytest.raises(ValueError, match="one of none, checkpoint"):
        ActivationOffload(model, "auto")
    with pytest.raises(ValueError, match="layers="):
        ActivationOffload(nn.Linear(2, 2), "checkpoint")
    with pytest.raises(ValueError, match="use_cache=False"), ActivationOffload(model, "checkpoint"):
        model(input_ids=ids(), use_cache=True)
    own = llama(2)
    own.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        ActivationOffload(own, "offload").__enter__()


def test_wrap_sets_the_mode_until_it_is_called_again():
    wrapped = llama(2)
    context = wrap(wrapped, "checkpoint")
    assert wrap(wrapped, "checkpoint") is context
    calls = []
    context.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    loss_of(wrapped, ids()).backward()
    assert len(calls) == 2
    assert wrap(wrapped, "none") is not context
    loss_of(wrapped, ids()).backward()
    assert len(calls) == 3


def test_a_run_says_which_mode_auto_came_to(state, capsys):
    keys = {"disable_gradient_checkpointing": False, "activation_offloading": "auto"}
    made = state(**keys)
    mode = made.roles.base.activation_offload.mode
    assert mode == made.budgets.activation_offloading == "none"  # a tiny model fits as it is
    lines.first_lines(made, 2)
    # The line is folded to the terminal's width.
    said = " ".join(capsys.readouterr().out.split())
    assert f"activations: {mode}" in said
    assert f"auto, by the memory plan: activation_offloading={mode}" in said


@pytest.mark.parametrize(
    ("keys", "mode"),
    [
        ({"disable_gradient_checkpointing": False}, "checkpoint"),
        ({"disable_gradient_checkpointing": True}, "none"),
        ({"disable_gradient_checkpointing": True, "activation_offloading": "offload"}, "offload"),
        (
            {"disable_gradient_checkpointing": False, "use_unsloth_gc": True},
            "checkpoint+offload",
        ),
    ],
)
def test_llama_factorys_keys_choose_the_mode(tiny_roles, keys, mode):
    assert tiny_roles(**keys).base.activation_offload.mode == mode


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"activation_offloading": "checkpoint"}, "disable_gradient_checkpointing: contradicts"),
        ({"activation_offloading": "auto"}, "disable_gradient_checkpointing: contradicts"),
        (
            {"disable_gradient_checkpointing": False, "use_unsloth_gc": True}
            | {"activation_offloading": "offload"},
            "use_unsloth_gc: contradicts",
        ),
        ({"offload_dir": "spill"}, "offload_dir: .*moves nothing"),
        ({"stream_frozen": True}, "stream_frozen: no role"),
        (
            {"stream_frozen": True, "ref_model": "m", "ref_model_quantization_bit": 4},
            "stream_frozen: no role has a whole model .* not in few bits",
        ),
        (  # the critic's adapter trains on it
            {"stream_frozen": True, "ref_model": "m", "finetuning_type": "full"},
            "stream_frozen: no role has a whole model .* frozen",
        ),
        (
            {"stream_frozen": True, "reward_model": "m", "reward_model_type": "full"}
            | {"reward_model_quantization_bit": 4},
            "stream_frozen: .*few bits",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused(config, keys, words):
    with pytest.raises(ValueError, match=words):
        config(**keys)
