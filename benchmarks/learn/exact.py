"""The best policy and the value of any policy, by going through every response.

For a reference p and a reward r, the objective of PPO with a fixed beta is

    J(q) = E_q[r] - beta KL(q, p)

over whole responses. Its largest value is beta log Z with Z = E_p[exp(r / beta)], reached by
q*(y) = p(y) exp(r(y) / beta) / Z, and J(q*) - J(q) = beta KL(q, q*).

Source: Ziebart 2010, Modeling Purposeful Adaptive Behavior, chapter 5; Rafailov et al. 2023, Direct
Preference Optimization, eq. 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastppo.models.build import Roles

Rewards = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


class Value(NamedTuple):
    """Expectations of a policy, each a mean over the prompts."""

    objective: float  # reward - beta kl
    reward: float
    kl: float  # to the reference, nats a response


@dataclass(frozen=True)
class Tree:
    """Every response to every prompt.

    Prefixes of d letters are numbered in the order of `itertools.product`, so the children of
    prefix i are the prefixes 4 i to 4 i + 3 of d + 1 letters.
    """

    ids_PLT: Tensor  # prompts, prefixes of length - 1 letters, tokens with the prompt in front
    ended: list[Tensor]  # by d: (P, prefixes), reward of the response that ends there by EOS
    full_PL: Tensor  # (P, prefixes of `length` letters), reward of the response that runs out

    @property
    def length(self) -> int:
        """The most tokens that a response has."""
        return len(self.ended)


def make_tree(
    prompts: Sequence[str], letters: str, length: int, rewards: Rewards, first_id: int = 1
) -> Tree:
    """List every response; letters have the ids from `first_id` on."""

    def scores(depth: int) -> Tensor:
        texts = ["".join(chosen) for chosen in product(letters, repeat=depth)]
        found = [rewards([prompt] * len(texts), texts) for prompt in prompts]
        return torch.tensor(found, dtype=torch.float64)

    ids_LT = torch.tensor(list(product(range(len(letters)), repeat=length - 1))) + first_id
    prompt_P = torch.tensor([letters.index(prompt) for prompt in prompts]) + first_id
    front_PL1 = prompt_P[:, None, None].expand(-1, len(ids_LT), 1)
    return Tree(
        torch.cat([front_PL1, ids_LT.expand(len(prompts), -1, -1)], dim=-1),
        [scores(depth) for depth in range(length)],
        scores(length),
    )


@torch.no_grad()
def logprobs(roles: Roles, role: str, tree: Tree, rows: int = 8192) -> list[Tensor]:
    """By depth d: (P, prefixes of d letters, V), float64, what `role` says comes next."""
    prompts, leaves, _ = tree.ids_PLT.shape
    roles.eval()
    with roles.use(role):
        weight_VD = roles.lm_head.weight_VD
        parts = [
            (roles.hidden(ids_BT) @ weight_VD.T).double().log_softmax(-1)
            for ids_BT in tree.ids_PLT.flatten(0, 1).split(rows)
        ]
    every_PLTV = torch.cat(parts).unflatten(0, (prompts, leaves))
    width = leaves
    found = []
    for depth in range(tree.length):
        found.append(every_PLTV[:, ::width, depth])  # one response of those that share the prefix
        width //= every_PLTV.shape[-1] - 1
    return found


def best_policy(tree: Tree, reference: list[Tensor], beta: float) -> tuple[float, list[Tensor]]:
    """beta log Z, mean over the prompts, and q* as `logprobs` gives a policy; EOS has id 0."""
    after_PL = tree.full_PL / beta  # log Z of what comes after each prefix
    best: list[Tensor] = []
    for depth in reversed(range(tree.length)):
        letters_PLC = after_PL.unflatten(1, (*reference[depth].shape[1:2], -1))
        tilt_PLV = torch.cat([tree.ended[depth][..., None] / beta, letters_PLC], dim=-1)
        joint_PLV = reference[depth] + tilt_PLV
        after_PL = joint_PLV.logsumexp(-1)
        best.insert(0, joint_PLV - after_PL[..., None])
    return beta * after_PL.mean().item(), best


def value(tree: Tree, policy: list[Tensor], reference: list[Tensor], beta: float) -> Value:
    """J of a policy, with its two parts."""
    reward_PL, kl_PL = tree.full_PL, torch.zeros_like(tree.full_PL)
    for depth in reversed(range(tree.length)):
        shape = (*policy[depth].shape[1:2], -1)
        p_PLV = policy[depth].exp()
        reward_PLV = torch.cat([tree.ended[depth][..., None], reward_PL.unflatten(1, shape)], -1)
        later_PLV = torch.nn.functional.pad(kl_PL.unflatten(1, shape), (1, 0))
        reward_PL = (p_PLV * reward_PLV).sum(-1)
        kl_PL = (p_PLV * (policy[depth] - reference[depth] + later_PLV)).sum(-1)
    reward, kl = reward_PL.mean().item(), kl_PL.mean().item()
    return Value(reward - beta * kl, reward, kl)
