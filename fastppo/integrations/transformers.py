"""A transformers model whose forward gives log-probs and entropies of labels in place of logits.

    from fastppo.integrations.transformers import patch_causal_lm

    restore = patch_causal_lm(model)
    out = model(input_ids=ids, attention_mask=mask, labels=labels)  # (B, T)
    out.logprob, out.entropy                                        # (B, T-1), of labels[:, 1:]
    restore()

Without labels the forward is the model's own, so generate() is. A PEFT model may be given; wrapping
a patched model in PEFT works too. It needs the packages of the extra `train`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from fastppo.integrations.head import logprobs_and_entropy
from fastppo.models.load import causal_lm, logit_scale, trunk
from fastppo.models.rounding import LIMITS, product_precision

IGNORED = -100
CHECKED = 16  # tokens whose log-probs are compared with the model's own logits


@dataclass
class LogprobOutput(ModelOutput):
    """What a patched model returns where labels are given.

    Attributes:
        loss: mean negative log-prob of the labels, as the model's own forward computes it at
            temperature 1; their sum over `num_items_in_batch` if that is given.
        logprob: (B, T-1), or (B, T) with `shift_labels`; 0 where the label is -100.
        entropy: the same shape, in nats, and 0 there too.
    """

    loss: Tensor | None = None
    logprob: Tensor | None = None
    entropy: Tensor | None = None


def patch_causal_lm(
    model: nn.Module, *, temperature: float = 1.0, entropy_grad: bool = False
) -> Callable[[], None]:
    """Let a causal language model's forward compute log-probs where it is given labels.

    `labels` (B, T) are shifted as transformers shifts them: position t is scored by the hidden
    state before it. `shift_labels` (B, T) are taken as they are.

    Args:
        model: a transformers causal language model, or one inside PEFT.
        temperature: > 0, of the logits.
        entropy_grad: prepare the gradient of the entropy in the forward; without it that gradient
            is computed when a backward asks for it.

    Returns:
        A function that gives the model its own forward back.

    Raises:
        ValueError: at once for an output head that is no plain linear layer; and in the first
            forward with labels, for a model whose logits are not head(hidden).
    """
    base: Any = causal_lm(model)
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(
            f"patch_causal_lm: the output head is {type(head).__name__}, and must be a plain "
            "nn.Linear without an adapter of its own"
        )
    own = base.forward
    settings: dict[str, Any] = {
        "temperature": temperature,
        "softcap": getattr(base.config.get_text_config(), "final_logit_softcapping", None),
        "logit_scale": logit_scale(base),
        "entropy_grad": entropy_grad,
        "ignore_index": IGNORED,
    }
    checked = False

    @wraps(type(base).forward)  # generate() reads the signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        nonlocal checked
        if labels is None and shift_labels is None:
            return own(*args, **inputs)
        if not checked:
            check_head(base, own, args, inputs, settings)
            checked = True
        inputs.update(use_cache=False, return_dict=True)
        hidden = trunk(base)(*args, **inputs).last_hidden_state
        if shift_labels is None:
            assert labels is not None
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        logprob, entropy = scores(base, hidden, shift_labels, settings)
        items = num_items_in_batch
        if items is None:
            items = (shift_labels != IGNORED).sum().clamp(min=1)
        return LogprobOutput(-logprob.sum() / items, logprob, entropy)

    base.forward = MethodType(forward, base)

    def restore() -> None:
        del base.forward

    return restore


def scores(
    base: Any, hidden: Tensor, token: Tensor, settings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of tokens by the model's output head, looked up at each call."""
    head = base.get_output_embeddings()
    device = head.weight.device
    return logprobs_and_entropy(
        hidden.to(device), head.weight, token.to(device), head.bias, **settings
    )


@torch.no_grad()
def check_head(
    base: Any, own: Callable[..., Any], args: Any, inputs: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Raise ValueError if the model's logits are not its head applied to its hidden states."""
    short = {k: x[:1, :CHECKED] if isinstance(x, Tensor) else x for k, x in inputs.items()}
    short.update(use_cache=False, return_dict=True)
    args = [x[:1, :CHECKED] for x in args]
    logits = own(*args, **short).logits.float() / settings["temperature"]
    token = logits.argmax(-1)
    logprob, _ = scores(base, trunk(base)(*args, **short).last_hidden_state, token, settings)
    theirs = logits.log_softmax(-1).gather(-1, token[..., None])[..., 0]
    error = (logprob - theirs).abs().max().item()
    width = base.dtype if base.dtype in (torch.float16, torch.bfloat16) else None
    limit = LIMITS[product_precision(base.device, autocast=width)].head
    if not error < limit:
        raise ValueError(
            f"patch_causal_lm: the logits of {base.config.model_type} are not its output head "
            f"applied to its hidden states (a log-prob is off by {error:.3g}); it cannot be patched"
        )
