"""Scoring and update as trainers write them, on the trainer's own models.

Logits of every position in float32, log_softmax, gather, autograd, PEFT's casts; layers are
checkpointed and nothing is offloaded.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from benchmarks.gpu.phases import Phases
from fastppo.models.batch import Batch, make_batch, token_index
from fastppo.offload.activations import wrap
from fastppo.ppo import trainer
from fastppo.ppo.advantage import estimate
from fastppo.ppo.score import score
from fastppo.types import Experience, Rollout


def usual(state: trainer.State, rollout: Rollout, cuda: bool) -> dict[str, Any]:
    """Scoring and update as trainers write them, on the same models."""
    clock, made = Phases(cuda), state.roles
    wrap(made.base, "checkpoint")
    scored = score(
        made,
        rollout,
        state.reward(rollout),
        temperature=state.config.temperature,
        budget=state.budgets.scoring,
        chunk_bytes=state.budgets.chunk_bytes,
    )
    experience = estimate(scored, state.config, state.controller, state.running_score)
    batches = [make_batch(rollout, [row]) for row in range(len(rollout.prompts))]
    adapted = [module for module in made.model.modules() if isinstance(module, LoraLayer)]
    for module in adapted:
        module.cast_input_dtype_enabled = True
    try:
        with clock("score"), torch.no_grad():
            for batch in batches:
                for role in ("actor", "reference"):
                    with made.use(role):
                        log_softmax(state, batch)
                with made.use("critic"):
                    made.value(made.hidden(**batch.inputs))
            state.reward(rollout)
        made.train()
        with clock("update"):
            for batch in batches:
                usual_backward(state, experience, batch)
            for group in state.optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], 1.0)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
    finally:
        made.eval()
        for module in adapted:
            module.cast_input_dtype_enabled = False
    return {"phases": clock.found}


def log_softmax(state: trainer.State, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs of every next token and entropies, (B, T) each, from logits in float32."""
    made = state.roles
    with made.precision():
        logits = made.base(
            input_ids=batch.input_ids_BT, attention_mask=batch.mask_BT, use_cache=False
        ).logits
    log_p = torch.log_softmax(logits.float(), dim=-1)
    token_BT = torch.roll(batch.input_ids_BT, shifts=-1, dims=1)
    return log_p.gather(2, token_BT[..., None]).squeeze(2), -(log_p.exp() * log_p).sum(-1)


def usual_backward(state: trainer.State, experience: Experience, batch: Batch) -> None:
    """Clipped surrogate with entropy, then the clipped value loss; autograd for both."""
    made, scored = state.roles, experience.scored
    at = token_index(scored.rollout.response_lengths, batch.rows).to(batch.input_ids_BT.device)
    advantage, old = experience.advantage_N[at], scored.logprob_N[at]
    with made.use("actor"):
        logprob_BT, entropy_BT = log_softmax(state, batch)
        ratio = (batch.packing.gather(logprob_BT) - old).exp()
        surrogate = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
        (surrogate - 0.0 * batch.packing.gather(entropy_BT)).mean().backward()
    with made.use("critic"):
        hidden_BTD = made.hidden(**batch.inputs)
        value, target = made.value(batch.packing.gather(hidden_BTD)), experience.return_N[at]
        before = scored.value_N[at]
        clipped = before + (value - before).clamp(-0.2, 0.2)
        worst = torch.max((value - target).square(), (clipped - target).square())
        (0.05 * worst.mean()).backward()
