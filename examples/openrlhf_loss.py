"""OpenRLHF's PolicyLoss, ValueLoss and log-probs, and ours in their place: time and memory.

    python examples/openrlhf_loss.py [STEPS]

It needs openrlhf 0.11.2, and neither ray nor a GPU. A small model with random weights and a
vocabulary of 32768 takes a few steps of PPO, each way in a process of its own.
"""

from __future__ import annotations

import sys
import time
import types
from importlib.util import find_spec

import torch
from both_ways import Series, compare
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, ROWS, LENGTH = 32768, 8, 96


def load_openrlhf() -> None:
    """Let `openrlhf.models.loss` be imported without a GPU.

    OpenRLHF's packages import flash_attn and deepspeed. Its losses need torch alone, so here the
    packages are entered without their __init__. On a machine that has both, leave this out.
    """
    spec = find_spec("openrlhf")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("examples/openrlhf_loss.py: there is no openrlhf; pip install openrlhf==0.11.2")
    for name in ("openrlhf", "openrlhf.models"):
        package = types.ModuleType(name)
        package.__path__ = [f"{spec.submodule_search_locations[0]}/{name[9:]}"]
        sys.modules[name] = package
    sys.modules["deepspeed"] = types.ModuleType("deepspeed")
    import openrlhf.models.loss
    import openrlhf.models.utils  # noqa: F401 - while deepspeed can be imported

    del sys.modules["deepspeed"]


def train(ours: bool, steps: int) -> tuple[Series, float]:
    """Numbers of a few steps, and the CPU seconds from logits to the gradient of the logits."""
    load_openrlhf()
    if ours:  # the two lines that are fastppo's
        from fastppo.integrations import openrlhf

        openrlhf.install()
    from openrlhf.models import loss, utils

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
    value_head = torch.nn.Linear(128, 1)
    # The head's inputs are of size 1, 128 of them: a larger rate would make its loss grow.
    groups = [{"params": model.parameters()}, {"params": value_head.parameters(), "lr": 1e-3}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    policy_loss = loss.PolicyLoss(clip_eps_high=0.28, dual_clip=3.0)
    value_loss = loss.ValueLoss(clip_eps=0.2)
    ids = torch.randint(VOCAB, (ROWS, LENGTH + 1))
    mask = (torch.arange(LENGTH) < torch.randint(8, LENGTH + 1, (ROWS, 1))).float()
    advantages, returns = torch.randn(2, ROWS, LENGTH)
    old_log_probs = old_values = None
    series: Series = {"policy loss": [], "value loss": [], "grad_norm": []}
    seconds = 0.0
    for _ in range(steps):
        out = model(ids[:, :-1], output_hidden_states=True)
        start = time.process_time()
        log_probs = utils.log_probs_from_logits(out.logits, ids[:, 1:], 0.9)
        if old_log_probs is None:
            old_log_probs = log_probs.detach() + 0.3 * torch.randn_like(log_probs)
        actor, *_ = policy_loss(log_probs, old_log_probs, advantages, mask)
        (gradient,) = torch.autograd.grad(actor, out.logits)
        seconds += time.process_time() - start
        values = value_head(out.hidden_states[-1])[..., 0]
        old_values = values.detach() if old_values is None else old_values
        critic = value_loss(values, old_values, returns, mask)
        torch.autograd.backward([out.logits, critic], [gradient, None])
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
        for name, value in zip(series, (actor, critic, norm), strict=True):
            series[name].append(value.item())
    return series, seconds


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    compare("OpenRLHF's", "log-probs, loss and their backward", train, steps)
