"""PPO for a language model on one page, in plain PyTorch and transformers: read it top to bottom.

    python examples/ppo_in_one_page.py

A random two-layer Llama over bytes learns to answer in vowels, in about half a minute on a CPU. The
trainer's arithmetic is this one; a test holds its gradients against these in float64.
Shapes: B responses, T tokens of prompt and response, R tokens of response, V vocabulary.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

STEPS, EPOCHS, BATCH, MINI_BATCH = 40, 4, 32, 32
MAX_NEW_TOKENS, LEARNING_RATE, MAX_GRAD_NORM = 12, 3e-3, 1.0
GAMMA, LAM, CLIP_RANGE, VF_COEF = 1.0, 0.95, 0.2, 0.1
KL_COEF, KL_TARGET, HORIZON = 0.01, 6.0, 2000  # beta, nats a response, responses
EOS, PAD = 256, 257  # behind the 256 bytes
PROMPTS = [f"{ask} {what}." for ask in ("Write about", "Tell me of") for what in ("rain", "tea")]


def score(answer: str) -> float:
    """The reward of a finished response: its share of vowels."""
    return sum(letter in "aeiou" for letter in answer.lower()) / max(len(answer), 1)


def forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probs (B, R, V) of a response's tokens, and the states (B, R, D) before each of them."""
    position_BT = (batch["mask"].cumsum(1) - 1).clamp(min=0)  # prompts are padded on the left
    out = model(batch["ids"], batch["mask"], position_BT, output_hidden_states=True)
    before = slice(-1 - batch["token"].shape[1], -1)  # a token is predicted by the state before it
    return out.logits[:, before].log_softmax(-1), out.hidden_states[-1][:, before]


def of_tokens(logprob_BRV: Tensor, token_BR: Tensor) -> Tensor:
    """The log-probs (B, R) of the tokens that were sampled."""
    return logprob_BRV.gather(2, token_BR[:, :, None]).squeeze(2)


@torch.no_grad()
def gae(reward_BR: Tensor, value_BR: Tensor, live_BR: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B, R); past a response's end everything is 0.

    Source: Schulman et al. 2016, High-Dimensional Continuous Control Using GAE, equation 16.
    """
    value_BR, reward_BR = value_BR * live_BR, reward_BR * live_BR
    advantage_BR = torch.zeros_like(value_BR)
    following_B = next_value_B = torch.zeros_like(value_BR[:, 0])
    for t in reversed(range(value_BR.shape[1])):
        delta_B = reward_BR[:, t] + GAMMA * next_value_B - value_BR[:, t]
        following_B = (delta_B + GAMMA * LAM * following_B) * live_BR[:, t]
        advantage_BR[:, t], next_value_B = following_B, value_BR[:, t]
    return advantage_BR, advantage_BR + value_BR


def whiten(x_BR: Tensor, live_BR: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the live tokens."""
    x_N = x_BR[live_BR]
    return (x_BR - x_N.mean()) / (x_N.var() + 1e-8).sqrt()


def ppo_loss(model: nn.Module, value_head: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The clipped surrogate and the value loss, as means over the live tokens.

    Source: Schulman et al. 2017, Proximal Policy Optimization Algorithms, equations 7 and 9.
    """
    token_BR, live_BR = batch["token"], batch["live"]
    logprob_BRV, hidden_BRD = forward(model, batch)
    ratio_BR = (of_tokens(logprob_BRV, token_BR) - batch["logprob"]).exp()
    clipped_BR = ratio_BR.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
    policy_BR = torch.maximum(-batch["advantage"] * ratio_BR, -batch["advantage"] * clipped_BR)
    value_BR = value_head(hidden_BRD).squeeze(2)
    error_BR = 0.5 * (value_BR - batch["return"]).square()
    return (policy_BR + VF_COEF * error_BR)[live_BR].mean()


def sample(model: nn.Module, prompts: list[str]) -> dict[str, Tensor]:
    """Prompts padded on the left, a response to each, and which of its tokens are live."""
    rows = [list(prompt.encode()) for prompt in prompts]
    first = max(map(len, rows))
    ids_BP = torch.tensor([[PAD] * (first - len(row)) + row for row in rows])
    ids_BT = model.generate(
        ids_BP,
        attention_mask=(ids_BP != PAD).long(),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=True,
        top_k=0,  # the sampler is the policy itself: nothing is cut off
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    token_BR = ids_BT[:, first:]
    ended_BR = (token_BR == EOS).cumsum(1) - (token_BR == EOS).long()  # EOS itself is live
    mask_BT = torch.cat([(ids_BP != PAD).long(), (ended_BR == 0).long()], 1)
    return {"ids": ids_BT, "mask": mask_BT, "token": token_BR, "live": ended_BR == 0}


@torch.no_grad()
def estimate(
    model: nn.Module, reference: nn.Module, value_head: nn.Module, batch: dict[str, Tensor],
    score_B: Tensor, kl_coef: float,
) -> Tensor:  # fmt: skip
    """Add old log-probs, advantages and returns to the batch; the KL (B,) of each response."""
    token_BR, live_BR = batch["token"], batch["live"]
    logprob_BRV, hidden_BRD = forward(model, batch)
    reference_BRV, _ = forward(reference, batch)
    batch["logprob"] = of_tokens(logprob_BRV, token_BR)
    kl_BR = (batch["logprob"] - of_tokens(reference_BRV, token_BR)) * live_BR
    reward_BR = -kl_coef * kl_BR
    last_B = live_BR.sum(1) - 1
    reward_BR[torch.arange(len(last_B)), last_B] += score_B  # the score comes with the last token
    advantage_BR, batch["return"] = gae(reward_BR, value_head(hidden_BRD).squeeze(2), live_BR)
    batch["advantage"] = whiten(advantage_BR, live_BR)
    return kl_BR.sum(1)


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)  # has no dropout: an old log-prob is what the policy says
    reference, value_head, kl_coef = copy.deepcopy(model), nn.Linear(32, 1), KL_COEF
    parameters = [*model.parameters(), *value_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0)
    for step in range(1, STEPS + 1):
        batch = sample(model, PROMPTS * (BATCH // len(PROMPTS)))
        answers = [bytes(t for t in row if t < 256) for row in batch["token"].tolist()]
        score_B = torch.tensor([score(answer.decode(errors="replace")) for answer in answers])
        kl_B = estimate(model, reference, value_head, batch, score_B, kl_coef)
        for _ in range(EPOCHS):
            for rows in torch.randperm(BATCH).split(MINI_BATCH):
                loss = ppo_loss(model, value_head, {key: x[rows] for key, x in batch.items()})
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
                optimizer.step()
        print(f"step {step}: score {score_B.mean():.3f}, kl {kl_B.mean():.2f}, beta {kl_coef:.4f}")
        error = min(max(kl_B.mean().item() / KL_TARGET - 1.0, -0.2), 0.2)
        kl_coef *= 1.0 + error * BATCH / HORIZON


if __name__ == "__main__":
    main()
