"""A patched model gives the log-probs and entropies that its own logits have."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from fastppo.integrations.transformers import patch_causal_lm
from tests import zoo


def tiny(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(zoo.config_of(family))


def by_logits(model, ids, labels, temperature=1.0):
    """Log-probs and entropies (B, T-1) of the shifted labels, from the model's own logits."""
    log_softmax = (model(input_ids=ids).logits[:, :-1] / temperature).log_softmax(-1)
    token = labels[:, 1:].clamp(min=0)
    live = (labels[:, 1:] != -100).to(log_softmax.dtype)
    logprob = log_softmax.gather(-1, token[..., None])[..., 0] * live
    return logprob, -(log_softmax.exp() * log_softmax).sum(-1) * live


@pytest.fixture
def batch():
    torch.manual_seed(0)
    ids = torch.randint(5, 60, (2, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, 6:] = -100
    return ids, labels


def gradients(loss, model):
    found = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, found, allow_unused=True)


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere2", "granite"])
def test_values_and_gradients_are_those_of_the_logits(kind, batch, entropy_grad):
    """Softcap, scale of logits and tied heads; the entropy is in the loss, with its gradient."""
    ids, labels = batch
    model = tiny(kind).double().eval()

    def loss(logprob, entropy):
        return (torch.linspace(-1, 2, logprob.numel()).view_as(logprob) * logprob).sum() + (
            0.3 * entropy.square().sum()
        )

    expected = by_logits(model, ids, labels, 0.7)
    wanted = gradients(loss(*expected), model)
    patch_causal_lm(model, temperature=0.7, entropy_grad=entropy_grad)
    out = model(input_ids=ids, labels=labels)
    torch.testing.assert_close((out.logprob, out.entropy), expected)
    for found, mine in zip(gradients(loss(out.logprob, out.entropy), model), wanted, strict=True):
        torch.testing.assert_close(found, mine)


def test_loss_is_the_models_own_and_restore_gives_its_forward_back(batch):
    ids, labels = batch
    model = tiny("llama").eval()
    own = model(input_ids=ids, labels=labels)
    restore = patch_causal_lm(model)
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, own.loss)
    part = model(input_ids=ids, labels=labels, num_items_in_batch=100).loss
    torch.testing.assert_close(part, own.loss * (labels[:, 1:] != -100).sum() / 100)
    torch.testing.assert_close(model(input_ids=ids).logits, own.logits)
    assert model.generate(ids[:1], max_new_tokens=3, do_sample=False).shape == (1, 12)
    restore()
    assert model(input_ids=ids, labels=labels).logits.shape == own.logits.shape


def test_inside_and_below_peft(batch):
    """A LoRA model is patched through its wrapper, and a patched model can be wrapped."""
    ids, labels = batch
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(tiny("llama"), config).eval()
    expected, _ = by_logits(model, ids, labels)
    patch_causal_lm(model)
    torch.testing.assert_close(model(input_ids=ids, labels=labels).logprob, expected)
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
    taken = model(input_ids=ids, shift_labels=shifted).logprob
    torch.testing.assert_close(taken[:, :-1], expected)
    assert (taken[:, -1] == 0).all()
    torch.manual_seed(1)
    below = tiny("llama")
    patch_causal_lm(below)
    wrapped = get_peft_model(below, config).eval()
    assert wrapped(input_ids=ids, labels=labels).logprob.shape == (2, 8)


def test_what_cannot_be_patched_is_refused(batch):
    """An adapter on the head; and logits that something changes behind the head."""
    ids, labels = batch
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"output head is Linear, .* without an adapter"):
        patch_causal_lm(model)
    changed = tiny("llama")
    own = changed.forward

    def forward(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = out.logits + torch.arange(out.logits.shape[-1])
        return out

    changed.forward = forward
    patch_causal_lm(changed)
    with pytest.raises(ValueError, match=r"logits of llama are not its output head"):
        changed(input_ids=ids, labels=labels)
    assert isinstance(changed.lm_head, nn.Linear)
