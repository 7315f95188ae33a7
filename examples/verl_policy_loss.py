"""verl's fused output head and policy loss, and ours by their names: numbers, CPU time, memory.

    python examples/verl_policy_loss.py [STEPS]

It needs verl 0.9.1 with its packages, ray among them, and no GPU. A small model with random weights
and a vocabulary of 32768 takes a few steps of verl's actor loss, each way in a process of its own.
The setting is the one that a run of verl.trainer.main_ppo has: an environment variable, by which
every worker imports fastppo.integrations.verl, and the name of a loss.
"""

from __future__ import annotations

import os
import sys
import time

import torch
from both_ways import Series, compare
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, ROWS, LENGTH = 32768, 8, 96


def train(ours: bool, steps: int) -> tuple[Series, float]:
    """Numbers of a few steps, and the CPU seconds from hidden states to their gradient."""
    if ours:  # the two lines that are fastppo's
        os.environ["VERL_USE_EXTERNAL_MODULES"] = "fastppo.integrations.verl"
    loss_mode = "fastppo_ppo_clip" if ours else "vanilla"

    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    actor = FSDPActorConfig(
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=ROWS,
        clip_ratio_high=0.28,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
    )
    policy_loss = get_policy_loss_fn(actor.policy_loss.loss_mode)
    head = FusedLinearForPPO(impl_backend="torch")  # model.use_fused_kernels=true
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(VOCAB, (ROWS, LENGTH + 1))
    mask = (torch.arange(LENGTH) < torch.randint(8, LENGTH + 1, (ROWS, 1))).float()
    advantages = torch.randn(ROWS, LENGTH)
    old_log_prob = None
    series: Series = {"loss": [], "entropy": [], "grad_norm": []}
    seconds = 0.0
    for _ in range(steps):
        hidden = model.model(ids[:, :-1]).last_hidden_state
        start = time.process_time()
        log_prob, entropy = head(hidden, model.lm_head.weight, ids[:, 1:], 0.9)
        if old_log_prob is None:
            old_log_prob = log_prob.detach() + 0.3 * torch.randn_like(log_prob)
        loss, _ = policy_loss(
            old_log_prob=old_log_prob,
            log_prob=log_prob,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode="token-mean",
            config=actor,
            rollout_is_weights=None,
        )
        gradients = torch.autograd.grad(loss, [hidden, model.lm_head.weight])
        seconds += time.process_time() - start
        model.lm_head.weight.grad = gradients[1]
        hidden.backward(gradients[0])
        optimizer.step()
        optimizer.zero_grad()
        series["loss"].append(loss.item())
        series["entropy"].append(((entropy.detach() * mask).sum() / mask.sum()).item())
        series["grad_norm"].append(torch.cat([x.flatten() for x in gradients]).norm().item())
    return series, seconds


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    compare("verl's", "head, loss and their backward", train, steps)
