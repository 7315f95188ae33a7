"""Layers below every role's own weights: run once per rollout, with the same result as run anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastppo import toy
from fastppo.memory.inputs import PlanInputs
from fastppo.memory.shapes import from_config
from fastppo.models.batch import Budget, make_batch
from fastppo.models.build import build
from fastppo.models.load import text_model
from fastppo.models.shared_layers import find_shared_layers, share_layers
from fastppo.offload.activations import find_layers
from fastppo.ppo import evaluation, trainer
from fastppo.ppo.optimizer import make_optimizer
from fastppo.ppo.score import score
from fastppo.ppo.update import update
from fastppo.rewards.adapter import AdapterReward
from fastppo.run.save import save_model
from tests import zoo
from tests.tiers import slow_unless
from tests.tiny import make_config, stir

LAYERS = 4
FREEZE = {"finetuning_type": "freeze"}
CLOCKS = ("seconds", "per_second")


@pytest.fixture(scope="session")
def deep_dir(tmp_path_factory) -> Path:
    """A model with more layers than the other tests' has."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    toy.write_model(folder, layers=LAYERS)
    return folder


@pytest.fixture(scope="session")
def upper_dir(deep_dir, tmp_path_factory) -> Path:
    """A reward model whose adapter is on the upper two layers; also an adapter to start from."""
    folder = tmp_path_factory.mktemp("upper")
    config = make_config(deep_dir, folder, lora_layers=2)
    made = build(config, torch.device("cpu"))
    stir(made.trainable_parameters("actor"), 1)
    stir(list(made.critic_head.parameters()), 2, 1.0)
    save_model(made.model, made.critic_head, toy.byte_tokenizer(), folder)
    record = {"score_at": "eos", "template": "chatml", "fastppo": "test"}
    (folder / "fastppo_reward.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def deep_roles(deep_dir, tiny_roles):
    """Roles on the deep model, every adapter far from 0, with layers shared if that is possible."""

    def make(**changes):
        made = tiny_roles(model_name_or_path=str(deep_dir), **changes)
        lora = changes.get("finetuning_type", "lora") == "lora"
        base = "actor" if lora or changes.get("ref_model") else "reference"
        share_layers(made, list(range(40, 60)), base=base)
        return made

    return make


def count_passes(made) -> list[list[int]]:
    """For each layer of the actor's model and its copies the tokens of each of its forwards."""
    seen = [[] for _ in range(LAYERS)]
    models = {id(place.base): place.base for place in made.places.values()}
    layers = {
        id(layer): (layer, index)
        for model in models.values()
        for index, layer in enumerate(find_layers(text_model(model)))
    }
    for layer, index in layers.values():
        layer.register_forward_pre_hook(
            lambda _, given, index=index: seen[index].append(given[0].shape[:2].numel())
        )
    return seen


@pytest.mark.parametrize(
    ("changes", "count", "roles"),
    slow_unless(
        # By LoRA and by layers that train whole, for all roles, and where embeddings train too.
        lambda changes, *_: len(changes) == 1 or "critic" in changes or "embed" in str(changes),
        [
            ({"lora_layers": 1}, 3, ("actor", "reference", "critic")),
            ({"lora_layers": 3, "critic": "shared"}, 1, ("actor", "reference")),
            (
                {"lora_layers": 1, "advantage": "grpo", "num_generations": 2},
                3,
                ("actor", "reference"),
            ),
            ({"lora_layers": 1, "use_dora": True}, 3, ("actor", "reference", "critic")),
            ({**FREEZE, "critic": "shared"}, 2, ("actor", "reference")),
            # The critic adapts all layers of the copy.
            (FREEZE, 2, ("actor", "reference")),
            ({**FREEZE, "lora_layers": 3}, 1, ("actor", "reference", "critic")),
            ({"finetuning_type": "full", "lora_layers": 1}, 3, ("reference", "critic")),
            ({**FREEZE, "freeze_trainable_modules": "mlp"}, 2, ("actor", "reference")),
            (
                {"lora_layers": 1, "additional_target": "lm_head"},
                3,
                ("actor", "reference", "critic"),
            ),
            # The critic's adapter does not train the embeddings.
            (
                {"lora_layers": 1, "additional_target": "embed_tokens"},
                3,
                ("reference", "critic"),
            ),
        ],
    ),
    ids=str,
)
def test_the_lowest_layer_of_its_own_says_what_a_role_shares(changes, count, roles, deep_roles):
    made = deep_roles(stirred=False, **changes)
    assert made.shared.count == count
    assert set(made.shared.layers) == set(roles)
    words = made.shared.describe()
    assert f"{count} of {LAYERS} run once per rollout, for " in words
    assert all(role in words for role in roles)


@pytest.mark.parametrize(
    "changes",
    slow_unless(
        lambda changes: len(changes) < 2,
        [
            {},
            {"critic": "shared"},
            {**FREEZE, "freeze_trainable_layers": -1},
            {**FREEZE, "freeze_extra_modules": "embed_tokens", "critic": "shared"},
            {"finetuning_type": "full"},
            {"finetuning_type": "full", "critic": "shared"},
        ],
    ),
    ids=str,
)
def test_roles_that_save_nothing_or_have_the_lowest_layer_run_whole(changes, deep_roles):
    assert deep_roles(stirred=False, **changes).shared is None


def test_a_model_of_its_own_runs_whole(deep_dir, deep_roles):
    critic = {"critic": "model", "critic_finetuning_type": "full"}
    made = deep_roles(lora_layers=1, ref_model=str(deep_dir), **critic)
    assert set(made.shared.layers) == {"actor"}


@pytest.mark.parametrize(
    ("changes", "count"),
    slow_unless(
        lambda changes, count: (
            changes in ({}, FREEZE) or {"lora_layers", "reward_model"} <= changes.keys()
        ),
        [
            ({"lora_layers": 1, "reward_model": "UPPER", "reward_model_type": "lora"}, 2),
            ({"reward_model": "UPPER", "reward_model_type": "lora", "critic": "shared"}, 2),
            # The policy's adapter is in all layers; the reward's and the critic's are not.
            ({"reward_model": "UPPER", "reward_model_type": "lora"}, 2),
            ({"adapter_name_or_path": "UPPER", "critic": "shared"}, 2),
            ({"adapter_name_or_path": "UPPER", "lora_layers": 1}, 2),
            ({"adapter_name_or_path": "UPPER", "create_new_adapter": True, "lora_layers": 1}, 3),
            ({"lora_layers": 1, "ref_model": "DEEP", "critic": "shared"}, 3),
            ({"lora_layers": 9}, 0),
            ({}, 0),
            (FREEZE, 2),
            ({**FREEZE, "lora_layers": 3}, 1),
            ({**FREEZE, "lora_layers": 3, "ref_model": "DEEP"}, 2),
            ({**FREEZE, "freeze_trainable_layers": 9}, 0),
            ({**FREEZE, "freeze_trainable_layers": -1, "critic": "shared"}, 0),
            ({"finetuning_type": "full", "lora_layers": 1}, 3),
            ({"finetuning_type": "full"}, 0),
        ],
    ),
    ids=str,
)
def test_the_plan_shares_as_many_layers_as_the_roles(
    changes, count, deep_dir, upper_dir, deep_roles, config
):
    folders = {"UPPER": str(upper_dir), "DEEP": str(deep_dir)}
    changes = {key: folders.get(str(value), value) for key, value in changes.items()}
    made = deep_roles(stirred=False, **changes)
    assert (made.shared.count if made.shared else 0) == count
    settings = config(model_name_or_path=str(deep_dir), **changes)
    shape = from_config(made.base.config.to_dict(), "here")
    assert PlanInputs.of(settings, shape, device="cpu").shared_layers(LAYERS) == count


@pytest.mark.parametrize("score_at", ["eos", "suffix"])
def test_a_reward_adapter_runs_the_lower_layers_for_all_others(
    score_at, upper_dir, deep_roles, rollout, template
):
    made = deep_roles(lora_layers=1, reward_model=str(upper_dir), reward_model_type="lora")
    reward = AdapterReward(made, upper_dir, template, Budget())
    reward.score_at = score_at
    expected = reward(rollout)
    tokens = count_passes(made)
    rollout = made.with_states(rollout)
    assert torch.equal(reward(rollout), expected)
    parts = reward(rollout), {}
    tokens_before = [len(each) for each in tokens]
    scored = score(made, rollout, parts, temperature=1.0, budget=Budget())
    assert [len(each) for each in tokens[:2]] == tokens_before[:2]
    assert [len(each) for each in tokens[2:]] == [n + 3 for n in tokens_before[2:]]
    made.shared = None
    whole = score(made, rollout, parts, temperature=1.0, budget=Budget())
    for name in ("logprob_N", "ref_logprob_N", "value_N"):
        assert torch.allclose(getattr(scored, name), getattr(whole, name), rtol=1e-5, atol=1e-6)


def test_rows_that_are_not_all_kept_run_anew_together(deep_roles, rollout):
    """A pass that ran out of memory has kept some rows, and the second try has other batches."""
    made = deep_roles(lora_layers=1)
    shared = made.with_states(rollout)
    tokens = count_passes(made)
    with torch.no_grad():
        made.hidden(**make_batch(shared, [0, 2]).inputs)
        assert shared.states.known == [True, False, True, False]
        made.hidden(**make_batch(shared, [0]).inputs)
        assert len(tokens[0]) == 1
        made.hidden(**make_batch(shared, [0, 1, 2, 3]).inputs)
        assert len(tokens[0]) == 2
        found = made.hidden(**make_batch(shared, [1, 3], packed=True).inputs)
        assert len(tokens[0]) == 2
        expected = made.hidden(**make_batch(rollout, [1, 3], packed=True).inputs)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on_host", [False, True])
def test_states_are_kept_by_token_in_the_dtype_of_the_residual_stream(
    on_host, deep_dir, tiny_roles, rollout
):
    made = tiny_roles(model_name_or_path=str(deep_dir), lora_layers=1, bf16=True)
    share_layers(made, list(range(40, 60)), on_host=on_host)
    shared = made.with_states(rollout)
    with torch.no_grad():
        made.hidden(**make_batch(shared, range(4)).inputs)
    kept_ND = shared.states.state_ND
    assert kept_ND.shape == (sum(rollout.lengths), 32)
    assert kept_ND.dtype == torch.bfloat16
    assert shared.states.on_host == on_host


def test_an_evaluation_shares_within_itself(state, deep_dir):
    made = state(model_name_or_path=str(deep_dir), lora_layers=1)
    stir(made.roles.trainable_parameters("actor"), 1)
    found = []
    for shares in (True, False):
        if not shares:
            made.roles.shared = None
        tokens = count_passes(made.roles)
        compared = evaluation.compare(made)
        prompts = max(len(prompt.ids) for prompt in made.eval_prompts)
        passes = [[n for n in each if n > 4 * prompts] for each in tokens]  # sampling's are shorter
        found.append((compared.after.kl, [len(each) for each in passes]))
        made.before = None
    assert found[0][0] == found[1][0] != 0  # of eight samples: it may be below
    assert found[0][1] == [1, 1, 1, 3]
    assert found[1][1] == [3, 3, 3, 3]


@pytest.mark.parametrize("epochs", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    ("changes", "lower"),
    [({"lora_layers": 1}, 3), ({**FREEZE, "critic": "shared"}, 2)],
    ids=["lora", "freeze"],
)
def test_each_lower_layer_runs_once_for_each_token_of_a_step(
    changes, lower, epochs, deep_roles, rollout, experience_of, config
):
    made = deep_roles(**changes)
    settings = config(**changes, ppo_epochs=epochs)
    tokens = count_passes(made)
    experience = experience_of(made, made.with_states(rollout), settings)
    update(made, experience, settings, make_optimizer(settings, made), seed=0)
    assert tokens[:lower] == [[rollout.input_ids_BT.numel()]] * lower
    roles = 2 if made.shares_trunk else 3
    passes = roles + epochs * (roles - 1)  # the reference does not train
    assert all(len(each) == passes for each in tokens[lower:])


def metrics_and_weights(state, steps=2):
    """The numbers of some steps but for times, and what has trained."""
    for _ in range(steps):
        trainer.step_update(state)
    rows = [
        {name: x for name, x in row.items() if not any(word in name for word in CLOCKS)}
        for row in state.metrics.rows
    ]
    trained = [*state.roles.trainable_parameters("actor")]
    trained += state.roles.trainable_parameters("critic")
    return rows, [parameter.detach().clone() for parameter in trained]


@pytest.mark.parametrize(
    "changes",
    slow_unless(
        lambda changes: changes == {"lora_layers": 1},
        [
            {"lora_layers": 1},
            {"lora_layers": 2, "critic": "shared", "disable_gradient_checkpointing": False},
            {"lora_layers": 1, "padding_free": True},
            {"lora_layers": 1, "kl_penalty": "full", "activation_offloading": "offload"},
            {"lora_layers": 1, "ppo_micro_batch_size_per_gpu": 1},
            {"lora_layers": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            FREEZE,
            {**FREEZE, "critic": "shared", "activation_offloading": "checkpoint+offload"},
        ],
    ),
    ids=str,
)
def test_a_run_is_the_same_bits_with_and_without_sharing(changes, state, deep_dir):
    found = []
    for shares in (True, False):
        made = state(
            model_name_or_path=str(deep_dir),
            **{"disable_gradient_checkpointing": "offload" not in str(changes), **changes},
        )
        assert made.roles.shared is not None
        if not shares:
            made.roles.shared = None
        found.append(metrics_and_weights(made))
    (rows, weights), (rows_whole, weights_whole) = found
    assert repr(rows) == repr(rows_whole)  # NaN equals itself here
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_whole, strict=True))
    assert rows[0]["ratio_first_pass"] == 0.0


def deeper(family: str) -> dict[str, object]:
    """Settings that give a family's tiny model four layers."""
    config = zoo.config_of(family)
    text = config.get_text_config()
    depth = "n_layer" if hasattr(text, "n_layer") else "num_hidden_layers"
    changes: dict[str, object] = {depth: LAYERS}
    if "layer_types" in zoo.FAMILIES[family][2]:
        changes["layer_types"] = zoo.WINDOW["layer_types"] * 2
    if text is not config:
        inner = {**zoo.FAMILIES[family][2]["text_config"], depth: LAYERS}
        inner["layer_types"] = zoo.WINDOW["layer_types"] * 2
        return {"text_config": inner}
    return changes


@pytest.mark.parametrize("family", slow_unless(zoo.KINDS.__contains__, zoo.FAMILIES))
def test_every_family_gives_the_same_from_kept_states(family, tmp_path, lay_out):
    zoo.write(family, tmp_path / "model", **deeper(family))
    settings = make_config(tmp_path / "model", tmp_path, lora_layers=2, cutoff_len=64)
    made = build(settings, torch.device("cpu"))
    for seed, role in enumerate(("actor", "critic")):
        stir(made.trainable_parameters(role), seed)
    share_layers(made, list(range(40, 60)))
    assert made.shared is not None, made.notes
    assert made.shared.count == 2
    # Longer than the sliding windows of 8 tokens, and of three lengths.
    rollout = lay_out(["Hi", "A line on tea, please.", "What is rain?"], [[70] * 5] * 3)
    whole, kept = make_batch(rollout, range(3)), make_batch(made.with_states(rollout), range(3))
    live = whole.mask_BT.bool()
    for role in ("reference", "critic", "actor", "reference"):
        with made.use(role), torch.no_grad():
            expected, found = made.hidden(**whole.inputs), made.hidden(**kept.inputs)
        assert torch.allclose(found[live], expected[live], rtol=1e-5, atol=1e-6)


def test_layers_that_pass_on_more_than_hidden_states_run_anew(deep_dir, tiny_roles):
    """A model whose upper layers need what the lowest one has left behind says so in a note."""
    made = tiny_roles(model_name_or_path=str(deep_dir), lora_layers=1)
    layers = find_layers(text_model(made.base))
    left = []
    layers[0].register_forward_hook(lambda _, given, out: left.append(out))
    layers[3].register_forward_pre_hook(lambda _, given: (given[0] + left.pop(),))
    share_layers(made, list(range(40, 60)))
    assert made.shared is None
    (note,) = [note for note in made.notes if "run anew in each pass" in note]
    assert "(llama)" in note


def test_a_layer_left_out_of_the_comparison_is_found(deep_dir, tiny_roles, monkeypatch):
    """The comparison at the start sees states that are not those of the shared layers."""
    made = tiny_roles(model_name_or_path=str(deep_dir), lora_layers=1)
    shared = find_shared_layers(made)
    shared.count -= 1  # the third layer would run twice
    monkeypatch.setattr("fastppo.models.shared_layers.find_shared_layers", lambda *_, **__: shared)
    keep = shared._keep
    third = shared.layers["actor"][2]
    monkeypatch.setattr(shared, "_keep", lambda _, *others: keep(third, *others))
    share_layers(made, list(range(40, 60)))
    assert made.shared is None
    assert "off by" in made.notes[-1]
