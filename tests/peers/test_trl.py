"""TRL 1.16's log-probs, entropy, tiled log-probs, and GRPOTrainer's own loss, held against ours."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from fastppo import ops
from fastppo.config import config_from_dict
from fastppo.models.batch import token_weights
from fastppo.ops import losses
from tests.peers import theirs
from tests.peers.theirs import BETA, CLIP, GRPO_LOSSES, HIGH, LENGTH, LOW, Batch, assert_same_loss
from tests.project import PPO

pytestmark = pytest.mark.peers

VESPO = ("k_pos", "lambda_pos", "k_neg", "lambda_neg")


def trainer(b: Batch, logprob, kind: str, level: str, **arguments) -> SimpleNamespace:
    """What GRPOTrainer._compute_loss reads of its trainer: settings, and the log-probs."""
    alone = SimpleNamespace(
        num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x, sync_gradients=True
    )
    settings = {"use_bias_correction_kl": False, "delta": None, "steps_per_generation": 1}
    settings |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, **arguments}
    settings |= {f"vespo_{k}": v for k, v in zip(VESPO, (2.0, 3.0, 3.0, 2.0), strict=True)}
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            logprob,
            torch.zeros_like(b.mask),
            None,
        ),
        get_gamma_weights=theirs.trl("trainer.grpo_trainer").GRPOTrainer.get_gamma_weights,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        loss_type=kind,
        beta=BETA,
        epsilon_low=LOW,
        epsilon_high=5.0 if kind == "cispo" else HIGH,
        use_vllm=False,
        max_completion_length=LENGTH,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True),
        accelerator=alone,
        args=SimpleNamespace(**settings),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )


def trl_loss(x, b: Batch, kind: str, level: str, **arguments):
    prompt = torch.ones(len(b.mask), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": torch.ones_like(b.mask, dtype=torch.long),
        "completion_mask": b.mask,
        "advantages": b.advantage_B,
        "old_per_token_logps": b.old_logprob,
        "ref_per_token_logps": b.ref_logprob,
        "num_items_in_batch": b.mask.sum(),
    }
    compute = theirs.trl("trainer.grpo_trainer").GRPOTrainer._compute_loss
    return compute(trainer(b, x, kind, level, **arguments), None, inputs)


def aggregate(loss, b: Batch, mode: str):
    norm = {"max_length": float(LENGTH)} if mode.endswith("norm") else {}
    return losses.aggregate(loss, b.mask, mode, **norm)


@pytest.mark.parametrize(("kind", "level"), GRPO_LOSSES)
def test_the_loss_of_grpo_trainer(kind, level):
    """With k3 to a reference; its own aggregation, on one process without accumulation."""
    loss, mode = GRPO_LOSSES[kind, level]
    for b in theirs.batches():
        assert_same_loss(
            lambda x, b=b: aggregate(
                loss(x, b.old_logprob, b.group, b.mask).loss
                + BETA * losses.kl(x, b.ref_logprob, b.mask),
                b,
                mode,
            ),
            lambda x, b=b: trl_loss(x, b, kind, level),
            b.logprob,
            1e-7 if kind == "sapo" else 1e-9,  # they round its temperatures to float32
        )


def test_two_sided_clip_and_corrected_kl():
    for b in theirs.batches():
        assert_same_loss(
            lambda x, b=b: losses.aggregate(
                losses.ppo_clip(x, b.old_logprob, b.group, b.mask, **CLIP, dual_clip=1.5).loss
                + BETA
                * losses.kl(
                    x, b.ref_logprob, b.mask, bias_correction=True, old_logprob=b.old_logprob
                ),
                b.mask,
            ),
            lambda x, b=b: trl_loss(x, b, "dapo", "token", delta=1.5, use_bias_correction_kl=True),
            b.logprob,
        )


@pytest.mark.parametrize(("kind", "level"), [k for k in GRPO_LOSSES if k[1] == "token"])
def test_the_loss_of_grpo_trainer_without_truncated_responses(kind, level):
    """mask_truncated_completions: GRPOTrainer sets their mask to 0; ours leaves their rows out."""
    loss, mode = GRPO_LOSSES[kind, level]
    for b in theirs.batches(holes=False):
        ended_B = torch.arange(len(b.mask)) % 3 != 1
        masked = b._replace(mask=b.mask * ended_B[:, None])
        lengths = [int(n) for n in b.mask.sum(1)[ended_B]]
        out = int((~ended_B).sum())
        weight_B = torch.zeros(len(b.mask), dtype=torch.float64)
        weight_B[ended_B] = torch.tensor(
            token_weights(lengths, mode, LENGTH, left_out=out), dtype=torch.float64
        )
        assert_same_loss(
            lambda x, b=b, w=weight_B: (
                w[:, None]
                * b.mask
                * (
                    loss(x, b.old_logprob, b.group, b.mask).loss
                    + BETA * losses.kl(x, b.ref_logprob, b.mask)
                )
            ).sum(),
            lambda x, b=masked: trl_loss(x, b, kind, level),
            b.logprob,
            1e-7 if kind == "sapo" else 1e-9,
        )


def test_log_probs_and_entropy_of_logits():
    utils = theirs.trl("trainer.utils")
    for seed in range(theirs.ROUNDS):
        torch.manual_seed(seed)
        logits, token = 3 * torch.randn(5, 13, dtype=torch.float64), torch.randint(13, (5,))
        g, h = torch.randn(2, 5, dtype=torch.float64)

        def ours(x, token=token, g=g, h=h):
            logprob_N, entropy_N, _ = ops.token_logprobs(x, token)
            return (g * logprob_N + h * entropy_N).sum()

        def trls(x, token=token, g=g, h=h):
            logprob = utils.selective_log_softmax(x[None], token[None])[0]
            return (g * logprob + h * utils.entropy_from_logits(x)).sum()

        assert_same_loss(ours, trls, logits)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_log_probs_from_hidden_states_by_tiles(trained):
    """chunked_logprob with tiles of four columns, temperature and softcap; entropy too."""
    apply = theirs.trl("kernels.chunked_logprob").ChunkedLogProbFunction.apply
    for seed in range(theirs.ROUNDS):
        torch.manual_seed(seed)
        given = {"hidden": torch.randn(6, 4), "weight": torch.randn(11, 4), "bias": torch.randn(11)}
        token = torch.randint(11, (6,))
        g, h = torch.randn(2, 6)

        def ours(x, given=given, token=token, g=g, h=h):
            hidden, weight, bias = {**given, trained: x}.values()
            found = ops.linear_token_logprobs(
                hidden,
                weight,
                token,
                bias_V=bias,
                temperature=0.8,
                softcap=5.0,
                entropy_grad=True,
            )
            return (g * found.logprob_N + h * found.entropy_N).sum()

        def trls(x, given=given, token=token, g=g, h=h):
            hidden, weight, bias = {**given, trained: x}.values()
            logprob, entropy, *_ = apply(
                hidden, weight, bias, token, 0.8, 4, 5.0, 1.0, ("entropy",)
            )
            return (g * logprob + h * entropy).sum()

        assert_same_loss(ours, trls, given[trained], 1e-4)


def test_the_correction_by_trls_names_has_trls_defaults():
    fields = theirs.trl("trainer.grpo_config").GRPOConfig.__dataclass_fields__
    made = config_from_dict({**PPO, "vllm_importance_sampling_correction": True})
    assert made.importance_mode == fields["vllm_importance_sampling_mode"].default
    assert made.importance_bounds[1] == fields["vllm_importance_sampling_clip_max"].default
