"""The peers' own functions, from benchmarks/peers/.site, and random batches for them and for ours.

Single modules are loaded, in pinned versions, and what a module imports but the function does not
use (ray, deepspeed, configuration classes) is a stub. Where a peer is not installed a test fails:
`make test-peers` installs them.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.peers.stubs import ActorConfig, in_place_of, stub, verl_core
from fastppo.ops import losses

__all__ = ["ActorConfig"]
ROUNDS = 200


@cache
def verl() -> Any:
    """verl.trainer.ppo.core_algos."""
    return verl_core(peers.SITE / "verl", lambda module: peers.load("verl", module))


@cache
def verl_correction() -> Any:
    """verl.trainer.ppo.rollout_corr_helper."""
    verl()
    return peers.load("verl", "verl.trainer.ppo.rollout_corr_helper")


def verl_filtered_groups(score_by_uid: dict[str, list[float]]) -> set[str]:
    """The groups that verl's ReplayBuffer filters out: prompt -> the rewards of its responses.

    The rewards come from a queue, of which the stub holds what is asked for.
    """
    buffer = verl_replay_buffer()
    rewards = {
        f"{uid}_{session}_0": torch.tensor([0.0, reward], dtype=torch.float64)
        for uid, scores in score_by_uid.items()
        for session, reward in enumerate(scores)
    }
    sys.modules["transfer_queue"].kv_batch_get = (  # type: ignore[attr-defined]
        lambda keys, **_: {"rm_scores": [rewards[key] for key in keys]}
    )
    held = SimpleNamespace(
        filter_groups_metric="reward",
        finished_keys={"train": set(score_by_uid)},
        partitions={"train": dict.fromkeys(rewards)},
        _dapo_classification_cache=defaultdict(dict),
    )
    found: set[str] = buffer._dapo_filtered_keys(held, "train")[0]
    return found


@cache
def verl_gsm8k() -> Callable[[str, str], float]:
    """verl's `compute_score` of GSM8K."""
    found: Any = peers.load("verl", "verl.utils.reward_score.gsm8k")
    return found.compute_score  # type: ignore[no-any-return]


@cache
def verl_replay_buffer() -> Any:
    """verl.trainer.ppo.v1.replay_buffer.ReplayBuffer."""
    verl()
    stub("transfer_queue", KVBatchMeta=object)
    stub("verl.utils.skip", SkipManager=SimpleNamespace(annotate_tq=lambda *_, **__: lambda x: x))
    with in_place_of("omegaconf", DictConfig=object):
        return peers.load("verl", "verl.trainer.ppo.v1.replay_buffer").ReplayBuffer


@cache
def openrlhf(module: str) -> Any:
    """openrlhf.models.loss or openrlhf.models.utils."""
    with in_place_of("deepspeed"):
        return peers.load("openrlhf", f"openrlhf.models.{module}")


@cache
def openrlhf_gae() -> Callable[..., Any]:
    """RemoteExperienceMaker's GAE, which does not use the object that it is a method of."""
    nothing = type("Nothing", (), {})
    openrlhf("utils")
    for name, attributes in {
        "trainer.ppo_utils.experience": ("Experience",),
        "trainer.ppo_utils.length_penalty": ("apply_length_penalties",),
        "trainer.ray": (),
        "trainer.ray.launcher": ("RayActorGroup",),
        "utils.logging_utils": ("init_logger",),
        "utils.seqlen_balancing": (
            "get_minimum_num_micro_batch_size",
            "get_seqlen_balanced_partitions",
        ),
    }.items():
        made = dict.fromkeys(attributes, nothing)
        if "init_logger" in made:
            made["init_logger"] = lambda *_: None
        stub(f"openrlhf.{name}", **made)
    with in_place_of("ray", remote=lambda *_, **__: lambda x: x):
        module = peers.load("openrlhf", "openrlhf.trainer.ppo_utils.experience_maker")
    (maker,) = (x for x in vars(module).values() if hasattr(x, "get_advantages_and_returns"))
    return lambda *given: maker.get_advantages_and_returns(None, *given)


@cache
def openrlhf_length_penalty() -> Callable[..., int]:
    """OpenRLHF's `apply_overlong_penalty`; its module is a stub where the GAE alone is loaded."""
    stub("openrlhf.utils.logging_utils", init_logger=lambda *_: None)
    name = "openrlhf.trainer.ppo_utils.length_penalty"
    held = sys.modules.pop(name, None)
    module = peers.load("openrlhf", name)
    if held is not None:
        sys.modules[name] = held
    found: Callable[..., int] = module.apply_overlong_penalty
    return found


@cache
def trl(module: str) -> Any:
    """A module of trl.trainer, or trl.kernels.chunked_logprob."""
    if module != "trainer.utils":
        trl("trainer.utils")
        stub("trl", __version__=peers.PINS["trl"])  # of the package, whose __init__ does not run
    return peers.load("trl", f"trl.{module}")


@cache
def liger(module: str) -> Any:
    """A module of liger_kernel."""
    return peers.load("liger-kernel", f"liger_kernel.{module}")


@cache
def torchrl() -> Any:
    """torchrl's functional value estimators."""
    return peers.load("torchrl", "torchrl.objectives.value.functional")


class Batch(NamedTuple):
    """A padded batch, float64. Outside the mask stand numbers like any others."""

    logprob: Tensor
    old_logprob: Tensor
    ref_logprob: Tensor
    advantage: Tensor
    value: Tensor
    old_value: Tensor
    reward: Tensor
    mask: Tensor  # float: 0 or 1, with holes; some rows empty where `batches` is asked for them

    @property
    def advantage_B(self) -> Tensor:
        """One advantage a sequence."""
        return self.advantage[:, 0].contiguous()

    @property
    def group(self) -> Tensor:
        """The advantages of a batch with one for each sequence, (B, T)."""
        return self.advantage[:, :1].expand_as(self.advantage)


def batches(*, empty_rows: bool = False, holes: bool = True) -> Iterator[Batch]:
    """200 batches of 1 to 5 sequences of up to 9 tokens, with half of the ratios beyond a clip."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for _ in range(ROUNDS):
        rows, length = (int(torch.randint(1, n, (), generator=generator)) for n in (6, 10))
        shape = (rows, length)
        if holes:
            mask = (torch.rand(shape, generator=generator) < 0.7).double()
        else:
            last = torch.randint(1, length + 1, (rows, 1), generator=generator)
            mask = (torch.arange(length) < last).double()
        if not empty_rows:
            mask[:, 0] = 1
        elif not mask.any():
            mask[0, 0] = 1
        logprob = -normal(*shape).abs() - 0.01
        old = (logprob + 0.3 * normal(*shape)).clamp(max=-1e-3)
        ref = (logprob + 0.3 * normal(*shape)).clamp(max=-1e-3)
        others = (normal(*shape) for _ in range(4))
        yield Batch(logprob, old, ref, *others, mask)


LOW, HIGH, LENGTH, BETA = 0.2, 0.28, 16, 0.04
CLIP = {"clip_low": LOW, "clip_high": HIGH}
# TRL's loss_type and importance_sampling_level, which Liger-Kernel has taken over, with the bounds
# above -> our loss of a token, and our aggregation.
GRPO_LOSSES = {
    ("grpo", "token"): (partial(losses.ppo_clip, **CLIP), "seq-mean-token-mean"),
    ("bnpo", "token"): (partial(losses.ppo_clip, **CLIP), "token-mean"),
    ("dapo", "token"): (partial(losses.ppo_clip, **CLIP), "token-mean"),
    ("dr_grpo", "token"): (partial(losses.dr_grpo, **CLIP), "seq-mean-token-sum-norm"),
    ("luspo", "sequence"): (partial(losses.gspo, **CLIP), "seq-mean-token-sum"),
    ("grpo", "sequence"): (partial(losses.gspo, **CLIP), "seq-mean-token-mean"),
    ("dapo", "sequence"): (partial(losses.gspo, **CLIP), "token-mean"),
    ("cispo", "token"): (partial(losses.cispo, clip_low=1.0, clip_high=4.0), "token-mean"),
    ("sapo", "token"): (losses.sapo, "seq-mean-token-mean"),
    ("vespo", "token"): (losses.vespo, "token-mean"),
}


def value_and_gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """A loss at some tensor, and its gradient there."""
    leaf = at.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
    return value.detach(), torch.zeros_like(leaf) if gradient is None else gradient


def assert_same_loss(
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    at: Tensor,
    tolerance: float = 1e-9,
) -> None:
    """Both losses have the same value and the same gradient."""
    for mine, other in zip(
        value_and_gradient(ours, at), value_and_gradient(theirs, at), strict=True
    ):
        torch.testing.assert_close(mine.double(), other.double(), rtol=tolerance, atol=tolerance)
