"""A prompt that responses share is run once: log-probs and gradients are those of each row."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastppo.memory.budgets import Budget, PromptSharing
from fastppo.models.batch import make_batch, partition, prompts_of
from fastppo.models.build import build
from fastppo.models.prompt_sharing import longest_seen, share_prompts
from fastppo.models.shared_layers import share_layers
from fastppo.models.shared_prompts import PADDING, SharedPrompts
from fastppo.ppo import trainer
from fastppo.ppo.score import score
from tests import zoo
from tests.gradients import gradient
from tests.tiers import slow_unless
from tests.tiny import make_config, stir

ROOT = Path(__file__).resolve().parents[2]
IDS = list(range(40, 60))
TEXTS = ["Hi"] * 2 + ["What is rain, and where does it go?"] * 3 + ["A line on tea."]
# Of one to six tokens; the second and third prompt's begin alike.
RESPONSES = [[70, 71, 72], [80], [90, 91, 92, 93], [90, 91, 60], [*range(61, 67)], [67, 68]]
# They do not run with such a mask, or not with PyTorch's attention.
REFUSED = {"bloom", "gptj", "gemma2"}
# A router's softmax, or a LayerNorm: in float32 whatever the model's dtype is.
IN_FLOAT32 = {"mixtral", "qwen3_moe", "cohere2"}
CLOCKS = ("seconds", "per_second")


def always(hidden: int = 32) -> PromptSharing:
    """As `share_prompts` has it of the tests' models."""
    return PromptSharing(hidden)


def test_rows_with_one_prompt_are_one_row_of_it_and_their_responses():
    """Two responses of 2 and 1 tokens to a prompt of 2, and one of 2 to a prompt of 1."""
    made = SharedPrompts.of([7, 7, 3], [2, 2, 1], [4, 3, 3], torch.device("cpu"))
    assert made.shape == (3, 4)
    assert made.take_M.tolist() == [0, 1, 2, 3, 6, *[8, 9, 10], 8, 8]
    assert made.position_GS.tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 0, 0]]
    assert made.part_GS.tolist() == [[0, 0, 1, 1, 2], [0, 1, 1, PADDING, PADDING]]
    assert made.back_M.tolist() == [0, 1, 2, 3, *[0, 1, 4, 4], *[5, 6, 7, 7]]
    sees = made.mask()[:, 0].tolist()
    assert [[i for i, x in enumerate(row) if x] for row in sees[0]] == [
        *([0], [0, 1], [0, 1, 2], [0, 1, 2, 3]),
        [0, 1, 4],  # the second response sees the prompt and itself
    ]


def test_the_gradient_of_a_prompts_state_is_the_sum_over_its_rows():
    lengths, prompts = [9, 6, 7, 5, 8], [4, 4, 4, 3, 3]
    made = SharedPrompts.of([0, 0, 0, 1, 1], prompts, lengths, torch.device("cpu"))
    groups, size = made.part_GS.shape
    x_GSD = torch.randn(groups, size, 3, dtype=torch.float64, requires_grad=True)
    live_BT = torch.arange(9) < torch.tensor(lengths)[:, None]
    weight_BTD = torch.randn(5, 9, 3, dtype=torch.float64) * live_BT[..., None]
    found_BTD = made.each(x_GSD)
    (found,) = torch.autograd.grad((found_BTD * weight_BTD).sum(), x_GSD)
    wanted_BTD = x_GSD.flatten(0, 1)[made.back_M].view(5, 9, 3)
    (wanted,) = torch.autograd.grad((wanted_BTD * weight_BTD).sum(), x_GSD)
    assert torch.equal(found_BTD, wanted_BTD)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert not found[made.part_GS == PADDING].any()
    # What a row's prompt is in `once` comes from the first row with it.
    ids_BT = torch.arange(45).view(5, 9)
    back = made.each(made.once(ids_BT)[..., None].double())[..., 0]
    alike = [4, 4, 4, 3, 3]
    for row, first in enumerate([0, 0, 0, 3, 3]):
        assert back[row, : alike[row]].tolist() == ids_BT[first, : alike[row]].tolist()
        own = slice(alike[row], lengths[row])
        assert back[row, own].tolist() == ids_BT[row, own].tolist()


def test_it_is_done_where_it_is_less_work():
    """Eight responses of 40 tokens to a prompt of 512; long responses to a short prompt are not."""
    sharing = PromptSharing(hidden=576)
    assert sharing.pays((8, 552), (1, 512 + 8 * 40))
    assert not sharing.pays((8, 2030), (1, 30 + 8 * 2000))
    assert not sharing.pays((1, 552), (1, 552))
    assert not PromptSharing(hidden=576, longest=551).pays((8, 552), (1, 512 + 8 * 40))


def test_the_page_has_what_is_counted():
    page = (ROOT / "docs" / "step.md").read_text(encoding="utf-8")
    sharing = PromptSharing(hidden=576)
    for prompt in (30, 256, 512):
        whole, once = (8, prompt + 40), (1, prompt + 8 * 40)
        before, after = sharing.products(*whole, masked=False), sharing.products(*once, masked=True)
        assert (
            f"| {prompt} tokens | {math.prod(whole)} tokens, {before / 1e9:.2f} G "
            f"| {math.prod(once)} tokens, {after / 1e9:.2f} G | {after / before:.2f} |"
        ) in page


def test_responses_to_a_prompt_are_in_one_micro_batch():
    """By length alone the two prompts' responses would alternate."""
    lengths, prompts = [300, 320, 301, 321], [(0, 290), (1, 290), (0, 290), (1, 290)]
    budget = Budget(rows=2, prompts=PromptSharing(hidden=64))
    assert partition(lengths, range(4), budget, prompts) == [[0, 2], [1, 3]]
    budget = Budget(tokens=4 * 330, prompts=PromptSharing(hidden=64))
    parts = partition(lengths, range(4), budget, prompts)
    assert sorted(row for part in parts for row in part) == [0, 1, 2, 3]
    assert all({prompts[row][0] for row in part} != {0, 1} or len(part) == 4 for part in parts)
    # A group that is over the budget is cut.
    parts = partition(
        [300] * 3, range(3), Budget(tokens=600, prompts=PromptSharing(64)), [(0, 9)] * 3
    )
    assert sorted(map(len, parts)) == [1, 2]


@pytest.fixture
def shared(lay_out):
    """A rollout with two, three and one responses to its prompts."""
    return lay_out(TEXTS, RESPONSES)


def seen(made) -> list[int]:
    """The tokens of each pass of the actor's trunk."""
    tokens: list[int] = []
    made.places["actor"].trunk.register_forward_pre_hook(
        lambda _, given, named: tokens.append(named["input_ids"].numel()), with_kwargs=True
    )
    return tokens


def norms_in_float64(model) -> None:
    """RMS norms in the dtype of their input: the models' own round to float32, also a gradient."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps = getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6))

            def forward(x, weight=module.weight, eps=eps):
                return weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()

            module.forward = forward


def check_equal(made, settings, rollout, experience_of, sharing, error: float = 1e-10) -> None:
    """Log-probs, values and gradients in float64 with prompts once and with each row alone.

    `error` is of gradients, as a share of the largest.
    """
    for model in made.models:
        if hasattr(model.config, "num_experts"):  # the grouped products of experts have no float64
            model.set_experts_implementation("eager")
        norms_in_float64(model.double())
    if made.critic_head is not None:
        made.critic_head.double()
    tokens = seen(made)
    budgets = {"each": Budget(rows=6), "once": Budget(rows=6, prompts=sharing)}
    scored, ran = {}, {}
    for name, budget in budgets.items():
        tokens.clear()
        parts = (torch.zeros(6), {})
        with_states = made.with_states(rollout)
        scored[name] = score(made, with_states, parts, temperature=1.0, budget=budget)
        ran[name] = sum(tokens)
    assert ran["once"] < 0.9 * ran["each"], "each prompt was run once"
    for name in ("logprob_N", "ref_logprob_N", "entropy_N", "value_N", "final_value_B"):
        found, wanted = (getattr(scored[way], name) for way in ("once", "each"))
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, msg=name)
    experience = experience_of(made, rollout, settings, batch_size=6)
    grads = {name: gradient(made, experience, settings, each) for name, each in budgets.items()}
    size = grads["each"].abs().max().item()
    assert size > 1e-4
    torch.testing.assert_close(grads["once"], grads["each"], rtol=1e-8, atol=error * size)


@pytest.mark.parametrize(
    "changes",
    slow_unless(
        lambda changes: len(changes) < 2,
        [
            {},
            {"critic": "shared"},
            {"disable_gradient_checkpointing": False, "critic": "shared"},
            {"activation_offloading": "offload", "disable_gradient_checkpointing": True},
            {"finetuning_type": "full"},
            {"use_dora": True},
            {"policy_loss": "gspo", "critic": "shared"},
        ],
    ),
    ids=str,
)
def test_log_probs_and_gradients_are_those_of_a_pass_for_each(
    changes, tiny_roles, shared, experience_of, config
):
    made = tiny_roles(**changes)
    sharing = share_prompts(made, IDS)
    assert sharing is not None, made.notes
    assert sharing.longest is None
    settings = config(per_device_train_batch_size=6, **changes)
    check_equal(made, settings, shared, experience_of, sharing)


@pytest.mark.parametrize("changes", [{"lora_layers": 1}, {"finetuning_type": "freeze"}], ids=str)
def test_it_goes_with_layers_that_roles_share(changes, tiny_roles, shared, experience_of, config):
    changes = {**changes, "critic": "shared"}
    if "finetuning_type" in changes:
        changes["freeze_trainable_layers"] = 1
    made = tiny_roles(**changes)
    share_layers(made, IDS, base="actor" if "lora_layers" in changes else "reference")
    assert made.shared is not None
    sharing = share_prompts(made, IDS)
    settings = config(per_device_train_batch_size=6, **changes)
    check_equal(made, settings, shared, experience_of, sharing)


def widened(family: str) -> dict[str, Any]:
    """Settings in which a family's sliding windows hold the rows of these tests."""
    own = zoo.FAMILIES[family][2]
    if "text_config" in own:
        return {"text_config": {**own["text_config"], "sliding_window": 64}}
    return {"sliding_window": 64} if "sliding_window" in own else {}


@pytest.mark.parametrize("family", slow_unless(zoo.KINDS.__contains__, zoo.FAMILIES))
def test_every_family_runs_a_prompt_once_or_says_that_it_does_not(
    family, tmp_path, shared, experience_of
):
    zoo.write(family, tmp_path / "model", **widened(family))
    own = {"cutoff_len": 64, "per_device_train_batch_size": 6}
    settings = make_config(tmp_path / "model", tmp_path, **own)
    made = build(settings, torch.device("cpu"))
    for seed, role in enumerate(("actor", "critic")):
        stir(made.trainable_parameters(role), seed)
    sharing = share_prompts(made, IDS)
    if family in REFUSED:
        assert sharing is None
        assert (
            f"this model ({made.base.config.model_type}) does not run them once (" in made.notes[-1]
        )
        return
    assert sharing is not None, made.notes
    assert sharing.longest == (64 if widened(family) else None)
    # Float32's rounding, where part of the layers computes in it whatever the model's dtype is.
    error = 1e-7 if family in IN_FLOAT32 else 1e-10
    check_equal(made, settings, shared, experience_of, sharing, error)


def test_every_how_many_layers_have_a_window_is_no_window():
    layers = SimpleNamespace(sliding_window_pattern=6, max_window_layers=28)
    assert longest_seen(layers) is None
    assert longest_seen(SimpleNamespace(sliding_window=4096, **vars(layers))) == 4096
    assert longest_seen(SimpleNamespace(sliding_window=None, attention_chunk_size=8192)) == 8192


def test_a_window_within_the_rows_keeps_them_apart(tmp_path, shared):
    """In the joined row a window would be counted over other responses."""
    zoo.write("mistral", tmp_path / "model")
    made = build(make_config(tmp_path / "model", tmp_path), torch.device("cpu"))
    assert share_prompts(made, IDS) is None
    assert "off by" in made.notes[-1]
    sharing = PromptSharing(32, longest=8)
    assert make_batch(shared, range(6), sharing=sharing).prompts is None
    assert make_batch(shared, range(6), sharing=always()).prompts is not None
    assert make_batch(shared, range(6), packed=True, sharing=always()).prompts is None


def test_responses_that_see_each_other_are_found(tiny_roles, monkeypatch):
    made = tiny_roles()
    own = SharedPrompts.mask
    monkeypatch.setattr(SharedPrompts, "mask", lambda self: torch.ones_like(own(self)).tril())
    assert share_prompts(made, IDS) is None
    assert "off by" in made.notes[-1]


def test_eager_attention_is_left_as_it_is(tiny_roles):
    made = tiny_roles(flash_attn="disabled")
    assert share_prompts(made, IDS) is None
    assert "it needs PyTorch's attention, and this is eager" in made.notes[-1]


def test_prompts_are_the_same_where_their_tokens_are(shared):
    assert shared.prompt_numbers == [0, 0, 2, 2, 2, 5]
    assert prompts_of(shared, Budget()) is None
    assert prompts_of(shared, Budget(packed=True, prompts=always())) is None
    numbers = [number for number, _ in prompts_of(shared, Budget(prompts=always()))]
    assert numbers == shared.prompt_numbers


def test_a_run_is_the_same_to_rounding_with_and_without(state):
    grpo = {"advantage": "grpo", "num_generations": 4, "per_device_train_batch_size": 8}
    found, ran = [], []
    for once in (True, False):
        made = state(**grpo)
        (line,) = [note for note in made.notes if "run once for its 4 responses" in note]
        assert made.budgets.update.prompts is made.budgets.scoring.prompts is not None
        if not once:
            made.budgets.update.prompts = made.budgets.scoring.prompts = None
        tokens = seen(made.roles)
        trainer.step_update(made)
        found.append(made.metrics.rows[0])
        ran.append(sum(tokens))
    assert ran[0] < ran[1], line
    assert found[0]["ratio_first_pass"] == 0.0
    for name, value in found[1].items():
        if not (math.isnan(value) or any(word in name for word in CLOCKS)):
            assert found[0][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("changes", [{}, {"num_generations": 4, "padding_free": True}], ids=str)
def test_runs_without_such_prompts_say_nothing_of_it(changes, state):
    made = state(**{"advantage": "gae", "per_device_train_batch_size": 8, **changes})
    assert made.budgets.update.prompts is None
    assert not [note for note in [*made.notes, *made.roles.notes] if "responses" in note]
