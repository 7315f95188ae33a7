"""Hand-computed: formulas that TRL, verl and OpenRLHF are known for, and the ops on the same tokens.

Written out over padded batches in Python floats; the ops get the tokens packed. No line of those
trainers runs here: a docstring names the function whose formula it is, as a place to look it up.
Where a trainer has a quirk that the ops do not share, its test says so.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastppo.ops import PolicyLossConfig, gae, pack, policy_loss, token_kl, value_loss, whiten
from tests.ops.oracle import device_of

Table = list[list[float]]

# Two responses of 4 and 2 tokens in a table of 4 columns; 9 is filler that nothing may read.
MASK: Table = [[1, 1, 1, 1], [1, 1, 0, 0]]
LOGPROB: Table = [[-1.0, -0.4, -2.0, -0.7], [-1.5, -0.2, 9, 9]]
OLD: Table = [[-1.3, -0.4, -1.5, -2.4], [-1.4, -0.9, 9, 9]]
REF: Table = [[-1.1, -0.9, -1.0, -0.7], [-1.2, -0.1, 9, 9]]
ADVANTAGE: Table = [[1.0, -0.5, 2.0, -1.5], [-1.0, 0.25, 9, 9]]
VALUE: Table = [[0.5, 0.1, -0.3, 0.7], [0.2, -0.4, 9, 9]]
OLD_VALUE: Table = [[0.1, 0.2, -0.3, 0.2], [0.5, -0.3, 9, 9]]
RETURN: Table = [[1.0, 0.0, 0.4, 0.1], [-0.5, -0.6, 9, 9]]
REWARD: Table = [[0.1, -0.2, 0.3, 1.0], [0.0, -1.0, 9, 9]]
PLACES = [(b, t) for b in range(2) for t in range(4) if MASK[b][t]]
LENGTHS = [4, 2]


def packed(table: Table, backend: str) -> Tensor:
    live = pack(torch.tensor(MASK))
    return live.gather(torch.tensor(table)).to(device_of(backend))


def loss_of_tokens(
    backend: str, weight: Table, config: PolicyLossConfig, kl_coef: float = 0.0
) -> float:
    """policy_loss on logits that give exactly LOGPROB: two words, the sampled one first."""
    logprob = packed(LOGPROB, backend)
    logits = torch.stack([logprob, torch.log1p(-logprob.exp())], dim=1)
    token = torch.zeros(len(logprob), dtype=torch.long, device=logprob.device)
    given = (packed(x, backend) for x in (OLD, ADVANTAGE, weight))
    return policy_loss(
        logits,
        token,
        *given,
        ref_logprob_N=packed(REF, backend),
        kl_coef=kl_coef,
        config=config,
        backend=backend,
    ).loss.item()


def clipped(b: int, t: int, low: float = 0.2, high: float = 0.2) -> float:
    ratio = math.exp(LOGPROB[b][t] - OLD[b][t])
    held = min(max(ratio, 1 - low), 1 + high)
    return max(-ADVANTAGE[b][t] * ratio, -ADVANTAGE[b][t] * held)


def token_mean() -> Table:
    return [[1 / 6] * 4] * 2


def test_trl_policy_loss(backend):
    """TRL 0.9.6 trl/trainer/ppo_trainer.py, PPOTrainer.loss: masked mean of the larger loss."""
    want = sum(clipped(b, t) for b, t in PLACES) / 6
    assert loss_of_tokens(backend, token_mean(), PolicyLossConfig()) == pytest.approx(
        want, rel=1e-5
    )


@pytest.mark.parametrize(
    ("mode", "weight"),
    [
        ("token-mean", [[1 / 6] * 4] * 2),
        ("seq-mean-token-sum", [[1 / 2] * 4] * 2),
        ("seq-mean-token-mean", [[1 / 8] * 4, [1 / 4] * 4]),
        ("seq-mean-token-sum-norm", [[1 / 8] * 4] * 2),
    ],
)
def test_verl_aggregation_modes(mode, weight, backend):
    """verl verl/trainer/ppo/core_algos.py, agg_loss: the modes are weights.

    The last one's divisor there is the padded width of the batch unless it is given: 4 here.
    """
    sums = [sum(clipped(b, t) for b_, t in PLACES if b_ == b) for b in range(2)]
    want = {
        "token-mean": sum(sums) / 6,
        "seq-mean-token-sum": sum(sums) / 2,
        "seq-mean-token-mean": (sums[0] / 4 + sums[1] / 2) / 2,
        "seq-mean-token-sum-norm": sum(sums) / 2 / 4,
    }[mode]
    got = loss_of_tokens(backend, weight, PolicyLossConfig())
    assert got == pytest.approx(want, rel=1e-5)


def test_verl_dual_clip_and_clip_higher(backend):
    """verl core_algos.py, compute_policy_loss_vanilla: clip_ratio_c bounds the loss where A < 0."""
    c = 3.0
    total = 0.0
    for b, t in PLACES:
        loss = clipped(b, t, 0.2, 0.28)
        bound = -ADVANTAGE[b][t] * c
        total += min(bound, loss) if ADVANTAGE[b][t] < 0 else loss
    config = PolicyLossConfig(clip_high=0.28, dual_clip=c)
    assert loss_of_tokens(backend, token_mean(), config) == pytest.approx(total / 6, rel=1e-5)
    # token (0, 3) has ratio e^1.7 = 5.5 and A < 0: the bound is met
    assert clipped(0, 3) > 3.0 * 1.5


def test_openrlhf_dual_clip(backend):
    """OpenRLHF openrlhf/models/loss.py, PolicyLoss: the same bound, written as a maximum."""
    total = 0.0
    for b, t in PLACES:
        a, ratio = ADVANTAGE[b][t], math.exp(LOGPROB[b][t] - OLD[b][t])
        first = min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
        total -= max(first, 2.0 * a) if a < 0 else first
    config = PolicyLossConfig(dual_clip=2.0)
    assert loss_of_tokens(backend, token_mean(), config) == pytest.approx(total / 6, rel=1e-5)


def test_verl_kl_in_the_loss(backend):
    """verl dp_actor.py: policy loss + kl_loss_coef * agg_loss(low_var_kl)."""
    kl = sum(
        math.exp(REF[b][t] - LOGPROB[b][t]) - 1 - (REF[b][t] - LOGPROB[b][t]) for b, t in PLACES
    )
    want = sum(clipped(b, t) for b, t in PLACES) / 6 + 0.1 * kl / 6
    got = loss_of_tokens(backend, token_mean(), PolicyLossConfig(kl_kind="k3"), kl_coef=0.1)
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("k1", "TRL kl, verl kl and k1, OpenRLHF k1"),
        ("abs", "TRL abs, verl abs"),
        ("k2", "TRL mse, verl mse and k2, OpenRLHF k2"),
        ("k3", "verl low_var_kl and k3, OpenRLHF k3"),
    ],
)
def test_kinds_of_kl(kind, names, backend):
    """TRL _kl_penalty; verl core_algos.py kl_penalty; OpenRLHF utils compute_approx_kl.

    verl and OpenRLHF also clamp the result to +-10, which no token here meets and the op does not.
    """
    got = token_kl(
        packed(LOGPROB, backend), packed(REF, backend), kind=kind, backend=backend
    ).tolist()
    for value, (b, t) in zip(got, PLACES, strict=True):
        d = LOGPROB[b][t] - REF[b][t]
        want = {"k1": d, "abs": abs(d), "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind]
        assert value == pytest.approx(want, abs=1e-6), names


def test_trl_value_loss(backend):
    """TRL ppo_trainer.py, loss: half the masked mean of the larger of two squared errors."""
    total = 0.0
    for b, t in PLACES:
        v, old, goal = VALUE[b][t], OLD_VALUE[b][t], RETURN[b][t]
        held = min(max(v, old - 0.2), old + 0.2)
        total += max((v - goal) ** 2, (held - goal) ** 2)
    given = (packed(x, backend) for x in (VALUE, OLD_VALUE, RETURN, token_mean()))
    got = value_loss(*given, clip=0.2, backend=backend).loss.item()
    assert got == pytest.approx(total / 6 / 2, rel=1e-5)


def test_trl_gae_and_whitening(backend):
    """TRL ppo_trainer.py compute_advantages; core.py masked_whiten (unbiased, eps 1e-8)."""
    advantages: list[float] = []
    for b, length in enumerate(LENGTHS):
        last, row = 0.0, []
        for t in reversed(range(length)):
            following = VALUE[b][t + 1] if t + 1 < length else 0.0
            last = REWARD[b][t] + 0.99 * following - VALUE[b][t] + 0.99 * 0.95 * last
            row.append(last)
        advantages += row[::-1]
    mean = sum(advantages) / 6
    variance = sum((a - mean) ** 2 for a in advantages) / 5
    offsets = pack(torch.tensor(MASK)).offsets.to(device_of(backend))
    got, returns = gae(
        packed(REWARD, backend), packed(VALUE, backend), offsets, gamma=0.99, backend=backend
    )
    assert got.tolist() == pytest.approx(advantages, abs=1e-5)
    values = [VALUE[b][t] for b, t in PLACES]
    assert returns.tolist() == pytest.approx(
        [a + v for a, v in zip(advantages, values, strict=True)], abs=1e-5
    )
    want = [(a - mean) / math.sqrt(variance + 1e-8) for a in advantages]
    assert whiten(got, backend=backend).tolist() == pytest.approx(want, abs=1e-5)


# One response with two tokens of a tool's output in its middle, which the policy did not write.
TOOL_MASK = [1, 1, 0, 0, 1]
TOOL_REWARD = [0.1, 0.2, 5.0, 5.0, 1.0]
TOOL_VALUE = [0.3, -0.2, 7.0, 7.0, 0.4]


def test_verl_carries_gae_over_masked_tokens(backend):
    """verl core_algos.py compute_gae_advantage_return: a masked token hands value and trace on.

    That is the packed batch without it.
    """
    following = last = 0.0
    want: list[float] = []
    for r, v, m in zip(TOOL_REWARD[::-1], TOOL_VALUE[::-1], TOOL_MASK[::-1], strict=True):
        now = r + 0.9 * following - v + 0.9 * 0.8 * last
        following = v * m + (1 - m) * following
        last = now * m + (1 - m) * last
        if m:
            want.append(last)
    live = pack(torch.tensor([TOOL_MASK]))
    device = device_of(backend)
    reward, value = (live.gather(torch.tensor([x])).to(device) for x in (TOOL_REWARD, TOOL_VALUE))
    got, _ = gae(reward, value, live.offsets.to(device), gamma=0.9, lam=0.8, backend=backend)
    assert got.tolist() == pytest.approx(want[::-1], abs=1e-6)


def test_openrlhf_stops_gae_at_masked_tokens(backend):
    """OpenRLHF experience_maker.py get_advantages_and_returns: values and rewards are zeroed first.

    That is the packed batch with these tokens in it, at value and reward 0.
    """
    reward = [r * m for r, m in zip(TOOL_REWARD, TOOL_MASK, strict=True)]
    value = [v * m for v, m in zip(TOOL_VALUE, TOOL_MASK, strict=True)]
    following = last = 0.0
    want: list[float] = []
    for r, v in zip(reward[::-1], value[::-1], strict=True):
        last = r + 0.9 * following - v + 0.9 * 0.8 * last
        following = v
        want.append(last)
    device = device_of(backend)
    offsets = torch.tensor([0, 5], dtype=torch.int32, device=device)
    given = (torch.tensor(x, device=device) for x in (reward, value))
    got, _ = gae(*given, offsets, gamma=0.9, lam=0.8, backend=backend)
    assert got.tolist() == pytest.approx(want[::-1], abs=1e-6)
