"""Every operator of the registry as trainers write it in eager PyTorch, and how a contender runs.

Not the definitions that the tests compare with: those mask and copy more, or go token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastppo.ops import PolicyLoss, PolicyMetrics, Scores
from tests.ops.registry import Op, Shape

CLIP = 0.2


def gae_loop(
    reward_N: Tensor, value_N: Tensor, offsets: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """TRL's loop over time, on a padded batch of one length."""
    batch = offsets.numel() - 1
    reward_BT, value_BT = reward_N.float().view(batch, -1), value_N.float().view(batch, -1)
    carry, columns = torch.zeros(batch), []
    for t in reversed(range(reward_BT.shape[1])):
        last = t + 1 == reward_BT.shape[1]
        following = torch.zeros(batch) if last else value_BT[:, t + 1]
        carry = reward_BT[:, t] + gamma * following - value_BT[:, t] + gamma * lam * carry
        columns.append(carry)
    advantage_N = torch.stack(columns[::-1], dim=1).flatten()
    return advantage_N, advantage_N + value_N.float()


def gae_masked_loop(
    reward_N: Tensor, value_N: Tensor, offsets: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """verl's loop: a masked token keeps the value and the trace of the one after it."""
    batch = offsets.numel() - 1
    reward_BT, value_BT = reward_N.float().view(batch, -1), value_N.float().view(batch, -1)
    mask_BT = torch.ones_like(reward_BT)
    following, carry, columns = torch.zeros(batch), torch.zeros(batch), []
    for t in reversed(range(reward_BT.shape[1])):
        delta = reward_BT[:, t] + gamma * following - value_BT[:, t]
        moved = delta + gamma * lam * carry
        live = mask_BT[:, t]
        following = value_BT[:, t] * live + (1 - live) * following
        carry = moved * live + (1 - live) * carry
        columns.append(carry)
    advantage_BT = torch.stack(columns[::-1], dim=1)
    return advantage_BT.flatten(), (advantage_BT + value_BT).flatten()


def advantages_loop(
    score_B: Tensor,
    logprob_N: Tensor,
    ref_logprob_N: Tensor,
    value_N: Tensor,
    offsets: Tensor,
    kl_coef: float,
) -> tuple[Tensor, ...]:
    """KL reward, the loop, and whitening."""
    kl_N = logprob_N.float() - ref_logprob_N.float()
    reward_BT = (-kl_coef * kl_N).view(offsets.numel() - 1, -1)
    reward_BT[:, -1] += score_B.float()
    reward_N = reward_BT.flatten()
    advantage_N, return_N = gae_loop(reward_N, value_N, offsets)
    return whiten(advantage_N), return_N, reward_N, kl_N


def whiten(x_N: Tensor) -> Tensor:
    """The two lines that everybody has."""
    x_N = x_N.float()
    return (x_N - x_N.mean()) * torch.rsqrt(x_N.var() + 1e-8)


def token_kl(logprob_N: Tensor, ref_logprob_N: Tensor, kind: str = "k3") -> Tensor:
    """k3, in float32."""
    assert kind == "k3"
    away_N = ref_logprob_N.float() - logprob_N.float()
    return away_N.exp() - 1 - away_N


def value_loss(
    value_N: Tensor, old_value_N: Tensor, return_N: Tensor, weight_N: Tensor
) -> tuple[Tensor]:
    """TRL's two lines, in float32."""
    value_N, old_value_N, return_N = value_N.float(), old_value_N.float(), return_N.float()
    held_N = torch.clamp(value_N, old_value_N - CLIP, old_value_N + CLIP)
    worst_N = torch.max((value_N - return_N) ** 2, (held_N - return_N) ** 2)
    return ((weight_N.float() * worst_N).sum() / 2,)


def token_logprobs(logits_NV: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
    """One log-softmax, a gather and a sum."""
    log_p_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    logprob_N = log_p_NV.gather(1, token_N[:, None]).squeeze(1)
    return logprob_N, -(log_p_NV.exp() * log_p_NV).sum(-1)


def clipped_loss(
    logprob_N: Tensor, behaviour_logprob_N: Tensor, advantage_N: Tensor, weight_N: Tensor
) -> Tensor:
    """PPO's loss of log-probs, however they were made."""
    ratio_N = (logprob_N - behaviour_logprob_N).exp()
    held_N = ratio_N.clamp(1 - CLIP, 1 + CLIP)
    return (weight_N * torch.max(-advantage_N * ratio_N, -advantage_N * held_N)).sum()


def policy_loss(
    logits_NV: Tensor,
    token_N: Tensor,
    behaviour_logprob_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    ref_logprob_N: Tensor | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
) -> PolicyLoss:
    """What trainers write after the model's forward, with autograd for the rest."""
    logprob_N, entropy_N = token_logprobs(logits_NV, token_N)
    loss = clipped_loss(logprob_N, behaviour_logprob_N, advantage_N, weight_N)
    kl_N = torch.zeros_like(logprob_N)
    if ref_logprob_N is not None:
        kl_N = token_kl(logprob_N, ref_logprob_N)
        loss = loss + (weight_N * (kl_coef * kl_N - entropy_coef * entropy_N)).sum()
    ratio_N = (logprob_N.detach() - behaviour_logprob_N).exp()
    zero = ratio_N.new_zeros(())
    own = {"ratio_sum": ratio_N.sum(), "clipped_sum": ((ratio_N - 1).abs() > CLIP).sum().float()}
    metrics = PolicyMetrics.of([own.get(name, zero) for name in PolicyMetrics._fields])
    return PolicyLoss(loss, logprob_N.detach(), entropy_N.detach(), kl_N.detach(), metrics)


def score_tokens(logits_NV: Tensor, ref_logits_NV: Tensor, token_N: Tensor) -> Scores:
    """Two log-softmaxes and three sums."""
    with torch.no_grad():
        log_p_NV = torch.log_softmax(logits_NV.float(), dim=-1)
        log_q_NV = torch.log_softmax(ref_logits_NV.float(), dim=-1)
        p_NV, at_N1 = log_p_NV.exp(), token_N[:, None]
        return Scores(
            log_p_NV.gather(1, at_N1).squeeze(1),
            log_q_NV.gather(1, at_N1).squeeze(1),
            -(p_NV * log_p_NV).sum(-1),
            (p_NV * (log_p_NV - log_q_NV)).sum(-1),
        )


def linear_token_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, token_N: Tensor
) -> tuple[Tensor, Tensor]:
    """All logits at once; the entropy is a value, as ours gives it by default."""
    logprob_N, entropy_N = token_logprobs(hidden_ND @ weight_VD.T, token_N)
    return logprob_N, entropy_N.detach()


def linear_policy_loss(
    hidden_ND: Tensor, weight_VD: Tensor, token_N: Tensor, *rest: Any, **keywords: Any
) -> PolicyLoss:
    """All logits at once."""
    return policy_loss(hidden_ND @ weight_VD.T, token_N, *rest, **keywords)


def linear_score_tokens(
    hidden_ND: Tensor, ref_hidden_ND: Tensor, weight_VD: Tensor, token_N: Tensor
) -> Scores:
    """All logits of both policies at once."""
    return score_tokens(hidden_ND @ weight_VD.T, ref_hidden_ND @ weight_VD.T, token_N)


EAGER: dict[str, Callable[..., Any]] = {
    "token_logprobs": token_logprobs,
    "policy_loss": policy_loss,
    "score_tokens": score_tokens,
    "linear_token_logprobs": linear_token_logprobs,
    "linear_policy_loss": linear_policy_loss,
    "linear_score_tokens": linear_score_tokens,
    "token_kl": token_kl,
    "value_loss": value_loss,
    "gae": gae_loop,
    "advantages": advantages_loop,
    "whiten": whiten,
}
# Why torch.compile of these is no contender.
NOT_COMPILED = dict.fromkeys(
    ("gae", "advantages"), "its loop unrolls into one graph node a time step, minutes of compiling"
)
# Definitions that go token by token, quadratic ones among them: eager is the oracle in their place,
# held against them at small sizes by a test.
SLOW_DEFINITIONS = ("gae", "advantages", "value_loss")


def oracle(op: Op) -> Callable[..., Any]:
    """What gives an operator's right answer from float32 inputs of any size."""
    return EAGER[op.name] if op.name in SLOW_DEFINITIONS else op.reference


def make_inputs(op: Op, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """The registry's inputs, no ratio of a policy loss at an edge of the clip.

    There the rounding of a contender decides between a gradient and none, and a comparison of
    answers would compare luck.
    """
    inputs = op.make_inputs(shape, dtype, 0)
    if "behaviour_logprob_N" in inputs:
        plain = EAGER[op.name.replace("policy_loss", "token_logprobs")]
        names = ("hidden_ND", "weight_VD") if "weight_VD" in inputs else ("logits_NV",)
        with torch.no_grad():
            logprob_N, _ = plain(*(inputs[name].float() for name in names), inputs["token_N"])
        inputs["behaviour_logprob_N"] = off_the_edges(logprob_N, inputs["behaviour_logprob_N"])
    return inputs


def off_the_edges(logprob_N: Tensor, behaviour_logprob_N: Tensor) -> Tensor:
    """Behaviour log-probs whose log-ratio is the nearest of four, half of them clipped ones."""
    allowed = torch.tensor([-0.5, -0.05, 0.05, 0.5])
    away = (logprob_N - behaviour_logprob_N)[:, None] - allowed
    return logprob_N - allowed[away.abs().argmin(dim=1)]


def in_float32(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers for the oracle."""
    return {
        name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def step(op: Op, function: Callable[..., Any], inputs: dict[str, Any], **keywords: Any) -> Any:
    """Forward, and backward where there is one; gives back the result."""
    for name in op.differentiable:
        inputs[name].grad = None
    result = function(**inputs, **keywords)
    if op.differentiable:
        loss_of(op, result).backward()
    return result


def loss_of(op: Op, result: Any) -> Tensor:
    """What backward is called on."""
    if isinstance(result, Tensor):
        return result.sum()
    if op.loss and hasattr(result, op.loss):
        return getattr(result, op.loss)
    return sum(x.sum() for x in result if isinstance(x, Tensor) and x.requires_grad)


def answer(
    op: Op, function: Callable[..., Any], inputs: dict[str, Any], **keywords: Any
) -> list[Tensor]:
    """Results without metrics, then gradients."""
    result = step(op, function, inputs, **keywords)
    parts = [result] if isinstance(result, Tensor) else [x for x in result if torch.is_tensor(x)]
    return [*(x.detach() for x in parts), *(inputs[name].grad for name in op.differentiable)]


def leaves(op: Op, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, those that are differentiable as leaves of their own."""
    made = dict(inputs)
    for name in op.differentiable:
        made[name] = inputs[name].detach().requires_grad_()
    return made


def right_answer(op: Op, inputs: dict[str, Any]) -> list[Tensor]:
    """The oracle's answer to inputs of any dtype."""
    return answer(op, oracle(op), leaves(op, in_float32(inputs)))
