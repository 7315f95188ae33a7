"""Heads as transformers computes them: scaled logits, softcaps, and both in its order."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM

from fastppo.ops import linear_policy_loss, linear_token_logprobs, token_logprobs
from tests import zoo

B, T, CAP = 3, 7, 4.0


def model_and_ids(family):
    """A tiny model in float64, and random words of its vocabulary."""
    torch.manual_seed(0)
    ids = torch.randint(zoo.IDS["vocab_size"], (B, T))
    if family == "cohere":
        config = hf.CohereConfig(**zoo.GROUPED, logit_scale=0.0625)
    else:
        config = zoo.config_of(family)
    return AutoModelForCausalLM.from_config(config).double().eval(), ids


def factor_of(config):
    """Cohere multiplies its logits by logit_scale, Granite divides them by logits_scaling."""
    if hasattr(config, "logit_scale"):
        return config.logit_scale
    return 1 / config.logits_scaling


def log_probs(logits, token):
    return torch.log_softmax(logits, -1).gather(-1, token[..., None])[..., 0]


@pytest.mark.parametrize("softcap", [None, CAP])
@pytest.mark.parametrize("family", ["cohere", "cohere2", "granite"])
def test_log_probs_of_scaled_logits_are_those_of_the_models_forward(family, softcap):
    """Values, and the gradient in the hidden states; a softcap acts on what the scale has made."""
    model, ids = model_and_ids(family)
    scale = factor_of(model.config)
    assert scale != 1
    logits = model(ids).logits.detach()
    hidden = model.model(ids).last_hidden_state.detach().requires_grad_()
    if softcap is not None:  # as Gemma 2 has it, after the model's own scale
        logits = softcap * torch.tanh(logits / softcap)
    want = log_probs(logits, ids)
    weight = model.lm_head.weight.detach()
    found = linear_token_logprobs(hidden, weight, ids, softcap=softcap, logit_scale=scale)
    torch.testing.assert_close(found.logprob_N, want, atol=1e-12, rtol=1e-12)
    found.logprob_N.sum().backward()
    again = hidden.detach().clone().requires_grad_()
    theirs = scale * model.lm_head(again)
    theirs = theirs if softcap is None else softcap * torch.tanh(theirs / softcap)
    log_probs(theirs, ids).sum().backward()
    torch.testing.assert_close(hidden.grad, again.grad, atol=1e-12, rtol=1e-11)
    ones = torch.ones_like(want)
    loss = linear_policy_loss(
        hidden, weight, ids, want, ones, ones / B / T, softcap=softcap, logit_scale=scale
    )
    torch.testing.assert_close(loss.logprob_N, want, atol=1e-12, rtol=1e-12)
    assert loss.loss.item() == pytest.approx(-1.0)


def test_log_probs_of_capped_logits_are_those_of_gemma_2s_forward():
    model, ids = model_and_ids("gemma2")
    cap = model.config.final_logit_softcapping
    assert cap
    want = log_probs(model(ids).logits.detach(), ids)
    hidden = model.model(ids).last_hidden_state.detach()
    weight = model.lm_head.weight.detach()
    found = linear_token_logprobs(hidden, weight, ids, softcap=cap)
    torch.testing.assert_close(found.logprob_N, want, atol=1e-12, rtol=1e-12)
    found = token_logprobs(hidden @ weight.T, ids, softcap=cap)
    torch.testing.assert_close(found.logprob_N, want, atol=1e-12, rtol=1e-12)
