"""PPO's loss in a training loop of your own, then the same step in TRL's words. Seconds on a CPU.

    python examples/custom_loop.py

A tiny random Llama and random responses, nothing downloaded: what matters is how tensors go in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastppo.ops import PolicyLossConfig, advantages, linear_policy_loss, pack, value_loss
from fastppo.ops import linear_token_logprobs as head_logprobs

B, PROMPT, RESPONSE, VOCAB, DIM = 4, 6, 10, 512, 32


def plain_loop(model: LlamaForCausalLM, ids: Tensor, live: Tensor, reward: Tensor) -> list[float]:
    """transformers and torch: a token is predicted by the hidden state before it."""
    packing = pack(live[:, 1:])
    token, head = packing.gather(ids[:, 1:]), model.lm_head.weight
    with torch.no_grad():
        hidden = packing.gather(model.model(ids).last_hidden_state[:, :-1])
        behaviour = head_logprobs(hidden, head, token).logprob_N
    advantage = (reward - reward.mean()).repeat_interleave(packing.offsets.diff())
    weight = torch.full_like(behaviour, 1 / len(packing))  # token-mean
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        hidden = packing.gather(model.model(ids).last_hidden_state[:, :-1])
        result = linear_policy_loss(hidden, head, token, behaviour, advantage, weight)
        optimizer.zero_grad()
        result.loss.backward()  # the head is trained too; frozen, it would cost one GEMM less
        optimizer.step()
        losses.append(result.loss.item())
    return losses


def trl_step(hidden: Tensor, lm_head: Tensor, vpreds: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """TRL's `compute_rewards`, `compute_advantages`, `loss`: its (B, T) tensors and defaults."""
    packing = pack(batch["masks"])
    old = {
        name: packing.gather(batch[name])
        for name in ("responses", "logprobs", "ref_logprobs", "values")
    }
    advantage, returns, _, _ = advantages(
        batch["scores"],
        old["logprobs"],
        old["ref_logprobs"],
        old["values"],
        packing.offsets,
        kl_coef=0.2,  # init_kl_coef
        gamma=1.0,
        lam=0.95,
    )
    masked_mean = torch.full_like(returns, 1 / len(packing))
    pg_loss, *_, stats = linear_policy_loss(
        packing.gather(hidden),
        lm_head,
        old["responses"],
        old["logprobs"],
        advantage,
        masked_mean,
        config=PolicyLossConfig(clip_low=0.2, clip_high=0.2),  # cliprange
    )
    vf_loss, _ = value_loss(  # cliprange_value
        packing.gather(vpreds), old["values"], returns, masked_mean, clip=0.2
    )
    print(f"ppo/loss/policy {pg_loss:.4f}, ppo/loss/value {vf_loss:.4f}", end=", ")
    print(f"ppo/policy/clipfrac {stats.clipped_sum / stats.count:.3f}")
    return pg_loss + 0.1 * vf_loss  # vf_coef


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": DIM, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=VOCAB, num_attention_heads=2, num_key_value_heads=1, **sizes)
    model = LlamaForCausalLM(config)
    ids = torch.randint(VOCAB, (B, PROMPT + RESPONSE))
    lengths = torch.tensor([10, 7, 3, 9])  # padded right, where a causal model does not look
    place = torch.arange(PROMPT + RESPONSE)
    live = (place >= PROMPT) & (place < PROMPT + lengths[:, None])
    reward = torch.randn(B)
    print("plain loop, loss", [round(loss, 4) for loss in plain_loop(model, ids, live, reward)])

    before = slice(PROMPT - 1, -1)
    hidden = model.model(ids).last_hidden_state[:, before]
    responses, v_head = ids[:, PROMPT:], nn.Linear(DIM, 1)
    with torch.no_grad():
        flat = hidden.flatten(0, 1), model.lm_head.weight, responses.flatten()
        logprobs = head_logprobs(*flat).logprob_N.view(B, RESPONSE)
        values = v_head(hidden).squeeze(-1)
    batch = {"responses": responses, "masks": live[:, PROMPT:], "scores": reward}
    batch |= {"logprobs": logprobs, "ref_logprobs": logprobs - 0.1, "values": values}
    vpreds = v_head(hidden).squeeze(-1)
    trl_step(hidden, model.lm_head.weight, vpreds, batch).backward()


if __name__ == "__main__":
    main()
