"""What a rank of verl's Megatron engine calls, where ranks share the vocabulary out; over gloo."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch

from benchmarks import peers
from tests.peers import theirs


def heads(group: Any, rank: int) -> dict[str, list[torch.Tensor]]:
    """Log-probs, entropies and gradients of hidden states and weight.

    "ours" is the name in verl's module, given this rank's words as verl's engine gives them. "verl"
    is verl's head in PyTorch, given all words: its kernels for ranks need GPUs.
    """
    theirs.verl()
    functional = peers.load("verl", "verl.utils.experimental.torch_functional")
    whole = functional.FusedLinearForPPO()
    own = functional.FusedLinearForPPO.forward
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("fastppo.integrations.verl")
    module = peers.load("verl", "verl.utils.kernel.linear_cross_entropy")
    torch.manual_seed(0)
    states, words, labels = torch.randn(5, 1, 8), torch.randn(14, 8), torch.randint(14, (1, 5))
    g, h = torch.randn(2, 5)
    found = {}
    for name in ("ours", "verl"):
        weight = words[7 * rank : 7 * rank + 7] if name == "ours" else words
        weight, hidden = weight.clone().requires_grad_(), states.clone().requires_grad_()
        if name == "ours":
            result = module.linear_cross_entropy(hidden, weight, labels, 0.7, "none", group)
        else:
            result = own(whole, hidden.transpose(0, 1), weight, labels, 0.7)
        logprob, entropy = (x.flatten() for x in result)
        ((g * logprob).sum() + (h * entropy).sum()).backward()
        found[name] = [logprob.detach(), entropy.detach(), hidden.grad, weight.grad]
    return found
