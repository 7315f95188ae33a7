"""PPO's loss in a loop of your own, then in TRL's words: a random tiny Llama, seconds on a CPU."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastppo.ops import advantages, linear_policy_loss, linear_token_logprobs, pack, value_loss

torch.manual_seed(0)
B, PROMPT, RESPONSE, VOCAB, SIZE = 4, 6, 10, 512, 32
heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
config = LlamaConfig(vocab_size=VOCAB, hidden_size=SIZE, intermediate_size=64, **heads)
model, v_head = LlamaForCausalLM(config), torch.nn.Linear(SIZE, 1)
head = model.lm_head.weight
ids = torch.randint(VOCAB, (B, PROMPT + RESPONSE))  # padded right, where a causal model is blind
place = torch.arange(PROMPT + RESPONSE)
live = (place >= PROMPT) & (place < PROMPT + torch.tensor([10, 7, 3, 9])[:, None])
score = torch.randn(B)  # one a response, from your reward model

# A token is predicted by the hidden state before it; prompts and padding never meet the head.
packing = pack(live[:, 1:])
token = packing.gather(ids[:, 1:])


def hidden_states() -> torch.Tensor:
    return packing.gather(model.model(ids).last_hidden_state[:, :-1])


with torch.no_grad():
    behaviour = linear_token_logprobs(hidden_states(), head, token).logprob_N
advantage = (score - score.mean()).repeat_interleave(packing.offsets.diff())
weight = torch.full_like(behaviour, 1 / len(packing))  # token-mean
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for epoch in range(4):
    result = linear_policy_loss(hidden_states(), head, token, behaviour, advantage, weight)
    optimizer.zero_grad()
    result.loss.backward()  # the head is trained too; frozen, it would cost one GEMM less
    optimizer.step()
    print(f"plain loop, epoch {epoch}: loss {result.loss.item():.4f}")

# TRL's PPOTrainer.step from its tensors, (B, T) each: compute_rewards, compute_advantages, loss.
with torch.no_grad():
    logprobs = packing.scatter(linear_token_logprobs(hidden_states(), head, token).logprob_N)
    values = packing.scatter(v_head(hidden_states()).squeeze(-1))
responses, masks, ref_logprobs = ids[:, 1:], live[:, 1:], logprobs - 0.1
packing = pack(masks)
old = [packing.gather(x) for x in (logprobs, ref_logprobs, values)]
advantage, returns, *_ = advantages(  # init_kl_coef, gamma, lam; whitened
    score, *old, packing.offsets, kl_coef=0.2, gamma=1.0, lam=0.95
)
hidden = hidden_states()
pg_loss, *_, stats = linear_policy_loss(  # cliprange is 0.2
    hidden, head, packing.gather(responses), old[0], advantage, weight
)
vpreds = v_head(hidden).squeeze(-1)
vf_loss, _ = value_loss(vpreds, old[2], returns, weight, clip=0.2)  # cliprange_value
(pg_loss + 0.1 * vf_loss).backward()  # vf_coef
clipfrac = (stats.clipped_sum / stats.count).item()
print(f"ppo/loss/policy {pg_loss.item():.4f}, ppo/loss/value {vf_loss.item():.4f}", end=", ")
print(f"ppo/policy/clipfrac {clipfrac:.3f}")
