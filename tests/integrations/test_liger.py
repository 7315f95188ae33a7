"""Liger-Kernel 0.8.5's fused GRPO loss and scaled cross-entropy, and ours with its arguments."""

from __future__ import annotations

import pytest
import torch

from fastppo.integrations.grpo import AGGREGATION
from fastppo.integrations.liger import FusedLinearGRPOLoss, scaled_cross_entropy
from tests.peers import theirs

LUSPO = {"loss_type": "luspo", "importance_sampling_level": "sequence"}
VARIANTS = [
    *({"loss_type": kind} for kind in AGGREGATION if kind != "luspo"),
    LUSPO,
    {**LUSPO, "beta": 0.0},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "use_bias_correction_kl": True},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "dapo", "beta": 0.0, "delta": 1.5, "epsilon_high": 0.28},
    {"loss_type": "bnpo", "use_bias_correction_kl": True, "temperature": 0.7},
]


def inputs(seed: int) -> dict[str, torch.Tensor]:
    """A batch with holes in its mask, and ratios of which half are beyond a clip."""
    torch.manual_seed(seed)
    mask = (torch.rand(3, 5) < 0.7).float()
    mask[:, 0] = 1
    old = -torch.rand(3, 5) - 2
    return {
        "_input": torch.randn(3, 5, 8),
        "lin_weight": torch.randn(13, 8) / 4,
        "selected_token_ids": torch.randint(13, (3, 5)),
        "attention_mask": mask,
        "advantages": torch.randn(3),
        "bias": torch.randn(13) / 4,
        "ref_per_token_logps": old + 0.3 * torch.randn(3, 5),
        "old_per_token_logps": old,
    }


def results(loss, given):
    """Value, metrics, and gradients of hidden states, weight and bias."""
    leaves = [given[name].clone().requires_grad_() for name in ("_input", "lin_weight", "bias")]
    given = {**given, **dict(zip(("_input", "lin_weight", "bias"), leaves, strict=True))}
    value, metrics = loss(**given)
    return [value.detach(), *metrics, *torch.autograd.grad(value, leaves)]


@pytest.mark.peers
@pytest.mark.parametrize("settings", VARIANTS, ids=lambda x: "-".join(map(str, x.values())))
def test_loss_metrics_and_gradients_are_ligers(settings):
    module = theirs.liger("chunked_loss.grpo_loss")
    settings = {"max_completion_length": 7, **settings}
    if settings["loss_type"] == "cispo":
        settings["epsilon_high"] = 2.0
    ours = FusedLinearGRPOLoss(**settings)
    ligers = module.LigerFusedLinearGRPOLoss(**settings, compiled=False)
    for seed in range(theirs.ROUNDS):
        given = inputs(seed)
        by_sequence = settings["loss_type"] == "luspo"
        if by_sequence and ours.beta != 0:  # Liger's lets padding carry the KL
            given["attention_mask"] = torch.ones(3, 5)
        if seed % 4 == 1:
            given["old_per_token_logps"] = None
        if seed % 4 == 2:  # 1 on padding: Liger's vespo counts it there too
            ratio = torch.rand(3, 1) if by_sequence else torch.rand(3, 5)
            given["vllm_is_ratio"] = torch.where(given["attention_mask"] != 0, ratio + 0.5, 1)
            if by_sequence:
                given["vllm_is_ratio"] = ratio + 0.5
        if seed % 4 == 3:
            given["num_items_in_batch"] = 40
        for mine, other in zip(results(ours, given), results(ligers, given), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("selected", [None, torch.tensor([3, 0, 3])])
@pytest.mark.parametrize("entropy", [False, True])
def test_scaled_cross_entropy_is_ligers(entropy, selected):
    apply = theirs.liger(
        "ops.fused_linear_scaled_cross_entropy"
    ).LigerFusedLinearScaledCrossEntropyFunction.apply
    keywords = {"return_entropy": entropy, "selected_token_ids": selected}
    for seed in range(theirs.ROUNDS):
        given = inputs(seed)
        target = given["selected_token_ids"].flatten()
        target[given["attention_mask"].flatten() == 0] = -100

        def run(function, given=given, target=target):
            hidden = given["_input"].flatten(0, 1).clone().requires_grad_()
            weight = given["lin_weight"].clone().requires_grad_()
            found = function(hidden, weight, target, 0.7, **keywords)
            found = found if isinstance(found, tuple) else (found,)
            torch.manual_seed(1)
            total = sum((torch.randn_like(x) * x).sum() for x in found)
            return [*found, *torch.autograd.grad(total, (hidden, weight))]

        for mine, other in zip(run(scaled_cross_entropy), run(apply), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"loss_type": "ppo"}, "loss_type must be one of grpo, .* luspo, came 'ppo'"),
        ({"loss_type": "luspo"}, "luspo has one ratio a sequence; set importance_sampling_level"),
        ({"loss_type": "dr_grpo"}, "divides by max_completion_length; set it"),
        ({"importance_sampling_level": "row"}, "must be token or sequence, came 'row'"),
        (
            {"loss_type": "sapo", "importance_sampling_level": "sequence"},
            "not supported for loss_type 'sapo'; set importance_sampling_level='token'",
        ),
    ],
)
def test_what_is_not_here_is_refused(settings, line):
    with pytest.raises(ValueError, match=line):
        FusedLinearGRPOLoss(**settings)


def test_the_reference_by_its_hidden_states():
    """`ref_input` and `ref_weight` give what their log-probs give, and nothing is an error."""
    given = inputs(0)
    loss = FusedLinearGRPOLoss(beta=0.5)
    ref_hidden, ref_weight = torch.randn(3, 5, 8), torch.randn(13, 8)
    logprob = (ref_hidden @ ref_weight.T).log_softmax(-1)
    given["ref_per_token_logps"] = logprob.gather(-1, given["selected_token_ids"][..., None])[
        ..., 0
    ]
    expected = results(loss, given)
    given["ref_per_token_logps"] = None
    with pytest.raises(ValueError, match="give ref_per_token_logps, or ref_input and ref_weight"):
        loss(**given)
    by_states = results(loss, {**given, "ref_input": ref_hidden, "ref_weight": ref_weight})
    torch.testing.assert_close(by_states, expected)


@pytest.mark.parametrize("kind", AGGREGATION)
def test_padding_changes_nothing_and_has_no_gradient(kind):
    """What stands behind the mask, a log-prob of the reference of 1e4 or a hidden state, is unread.

    Liger-Kernel's luspo counts the KL there.
    """
    level = "sequence" if kind == "luspo" else "token"
    loss = FusedLinearGRPOLoss(
        loss_type=kind, importance_sampling_level=level, max_completion_length=7, beta=0.5
    )
    given = inputs(1)
    outside = given["attention_mask"] == 0
    assert outside.any()
    expected = results(loss, given)
    given["ref_per_token_logps"] = given["ref_per_token_logps"].masked_fill(outside, 1e4)
    given["_input"] = torch.where(outside[..., None], 3.0, given["_input"])
    found = results(loss, given)
    torch.testing.assert_close(found, expected)
    gradient = found[-3]
    assert gradient[outside].abs().max() == 0
    assert gradient[~outside].abs().max() > 1e-3


def test_bnpo_divides_by_its_own_batch_and_dapo_by_the_count_that_it_is_given():
    """Three sequences with 5 tokens each of which all are alive: 15, where dapo is told 30."""
    given = {**inputs(0), "attention_mask": torch.ones(3, 5), "num_items_in_batch": 30}
    bnpo, dapo = (results(FusedLinearGRPOLoss(loss_type=k), given)[0] for k in ("bnpo", "dapo"))
    torch.testing.assert_close(bnpo, 2 * dapo)
