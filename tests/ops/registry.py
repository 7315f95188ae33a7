"""Every operator, its definition, its inputs and its costs; tests and benchmarks loop over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from fastppo import ops
from tests.ops import references


@dataclass(frozen=True)
class Shape:
    """The size of an op's inputs: n tokens in `batch` sequences, a vocabulary, a hidden size."""

    n: int
    vocab: int = 1
    hidden: int = 1
    batch: int = 1


@dataclass(frozen=True)
class Op:
    """One public op, with what a test or a benchmark must know of it.

    Args:
        name: its public name, and the stem of its module, test and kernel.
        function: the op.
        reference: the definition, plain PyTorch for autograd; same arguments (keywords that only
            steer memory or backend excepted), same results.
        make_inputs: (shape, dtype, seed) -> keyword arguments for both, on the CPU.
        bytes_moved: (shape, dtype) -> bytes that forward and backward must at least move.
        flops: (shape) -> floating-point operations that forward and backward must at least do.
        differentiable: arguments through which a gradient flows.
        loss: name of the scalar result to call backward on; None sums over the differentiable
            results.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    make_inputs: Callable[[Shape, torch.dtype, int], dict[str, Any]]
    bytes_moved: Callable[[Shape, torch.dtype], int]
    flops: Callable[[Shape], int]
    differentiable: tuple[str, ...] = field(default=())
    loss: str | None = None


def even_offsets(shape: Shape) -> torch.Tensor:
    """Offsets that cut shape.n tokens into shape.batch sequences of nearly one length."""
    return (torch.arange(shape.batch + 1) * shape.n // max(shape.batch, 1)).int()


def make_token_kl(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    logprob_N = -3 * torch.rand(shape.n, generator=generator, dtype=torch.float64)
    noise_N = 0.3 * torch.randn(shape.n, generator=generator, dtype=torch.float64)
    return {
        "logprob_N": logprob_N.to(dtype),
        "ref_logprob_N": (logprob_N + noise_N).to(dtype),
        "kind": "k3",
    }


def make_gae(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    reward_N, value_N = torch.randn(2, shape.n, generator=generator)
    return {
        "reward_N": reward_N.to(dtype),
        "value_N": value_N.to(dtype),
        "offsets": even_offsets(shape),
        "gamma": 0.99,
    }


def make_whiten(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"x_N": (3 + 2 * torch.randn(shape.n, generator=generator)).to(dtype)}


def make_advantages(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    logprob_N, noise_N, value_N = torch.randn(3, shape.n, generator=generator)
    score_B = torch.randn(shape.batch, generator=generator)
    return {
        "score_B": score_B.to(dtype),
        "logprob_N": (-logprob_N.abs()).to(dtype),
        "ref_logprob_N": (-logprob_N.abs() + 0.1 * noise_N).to(dtype),
        "value_N": value_N.to(dtype),
        "offsets": even_offsets(shape),
        "kl_coef": 0.1,
    }


def make_value_loss(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    value_N, moved_N, goal_N = torch.randn(3, shape.n, generator=generator)
    return {
        "value_N": value_N.to(dtype),
        "old_value_N": (value_N + 0.3 * moved_N).to(dtype),
        "return_N": goal_N.to(dtype),
        "weight_N": torch.full((shape.n,), 1.0 / max(shape.n, 1), dtype=dtype),
    }


def make_logits(shape: Shape, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Logits with the spread of a language model's and tokens sampled from them."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = 2 * torch.randn(shape.n, shape.vocab, generator=generator, dtype=torch.float32)
    token_N = torch.randint(shape.vocab, (shape.n,), generator=generator)
    return logits_NV.to(dtype), token_N


def make_token_logprobs(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    logits_NV, token_N = make_logits(shape, dtype, seed)
    return {"logits_NV": logits_NV, "token_N": token_N}


def make_policy_inputs(
    logits_NV: Tensor, token_N: Tensor, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """Everything but the logits: a policy that has moved, so that every branch occurs."""
    generator = torch.Generator().manual_seed(seed + 1)
    n = token_N.numel()
    moved_N, advantage_N = torch.randn(2, n, generator=generator, dtype=torch.float64)
    live_N = torch.ones(n, dtype=torch.bool)
    log_p_NV = references.log_probs_reference(logits_NV.double(), live_N, 1.0, None)
    behaviour_N = log_p_NV.gather(1, token_N[:, None]).squeeze(1) + 0.3 * moved_N
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "behaviour_logprob_N": behaviour_N.to(stat),
        "advantage_N": advantage_N.to(stat),
        "weight_N": torch.full((n,), 1.0 / max(n, 1), dtype=stat),
        "ref_logprob_N": (behaviour_N - 0.1).to(stat),
        "kl_coef": 0.1,
        "entropy_coef": 0.01,
    }


def make_policy_loss(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    logits_NV, token_N = make_logits(shape, dtype, seed)
    others = make_policy_inputs(logits_NV, token_N, dtype, seed)
    return {"logits_NV": logits_NV, "token_N": token_N, **others}


def make_score_tokens(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    logits_NV, token_N = make_logits(shape, dtype, seed)
    noise_NV, _ = make_logits(shape, dtype, seed + 1)
    return {
        "logits_NV": logits_NV,
        "ref_logits_NV": logits_NV + 0.1 * noise_NV,
        "token_N": token_N,
    }


def make_hidden(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Hidden states and a head whose logits have the spread of a language model's."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(shape.n, shape.hidden, generator=generator)
    weight_VD = torch.randn(shape.vocab, shape.hidden, generator=generator)
    return {
        "hidden_ND": hidden_ND.to(dtype),
        "weight_VD": (2 * weight_VD / shape.hidden**0.5).to(dtype),
        "token_N": torch.randint(shape.vocab, (shape.n,), generator=generator),
    }


def make_linear_policy_loss(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    inputs = make_hidden(shape, dtype, seed)
    logits_NV = inputs["hidden_ND"].double() @ inputs["weight_VD"].double().T
    return {**inputs, **make_policy_inputs(logits_NV, inputs["token_N"], dtype, seed)}


def make_linear_score_tokens(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    inputs = make_hidden(shape, dtype, seed)
    moved = make_hidden(shape, dtype, seed + 1)["hidden_ND"]
    return {**inputs, "ref_hidden_ND": inputs["hidden_ND"] + 0.1 * moved}


_ALL = (
    Op(
        name="token_kl",
        function=ops.token_kl,
        reference=references.token_kl_reference,
        make_inputs=make_token_kl,
        bytes_moved=lambda s, dtype: s.n * (2 * dtype.itemsize + 4),
        flops=lambda s: 4 * s.n,
        differentiable=("logprob_N",),
    ),
    Op(
        name="gae",
        function=ops.gae,
        reference=references.gae_reference,
        make_inputs=make_gae,
        bytes_moved=lambda s, dtype: s.n * (2 * dtype.itemsize + 8),
        flops=lambda s: 6 * s.n,
    ),
    Op(
        name="whiten",
        function=ops.whiten,
        reference=references.whiten_reference,
        make_inputs=make_whiten,
        # one read for the moments, one read and one write to apply them
        bytes_moved=lambda s, dtype: s.n * (2 * dtype.itemsize + 4),
        flops=lambda s: 6 * s.n,
    ),
    Op(
        name="advantages",
        function=ops.advantages,
        reference=references.advantages_reference,
        make_inputs=make_advantages,
        # three reads and four writes of a float, and whitening's read and write
        bytes_moved=lambda s, dtype: s.n * (3 * dtype.itemsize + 16 + 8),
        flops=lambda s: 16 * s.n,
    ),
    Op(
        name="token_logprobs",
        function=ops.token_logprobs,
        reference=references.token_logprobs_reference,
        make_inputs=make_token_logprobs,
        # forward: one read; backward: one read and one write
        bytes_moved=lambda s, dtype: 3 * s.n * s.vocab * dtype.itemsize,
        flops=lambda s: 12 * s.n * s.vocab,
        differentiable=("logits_NV",),
    ),
    Op(
        name="linear_token_logprobs",
        function=ops.linear_token_logprobs,
        reference=references.linear_token_logprobs_reference,
        make_inputs=make_hidden,
        bytes_moved=lambda s, dtype: (3 * s.n * s.hidden + 2 * s.vocab * s.hidden) * dtype.itemsize,
        flops=lambda s: 4 * s.n * s.vocab * s.hidden,
        differentiable=("hidden_ND",),
    ),
    Op(
        name="policy_loss",
        function=ops.policy_loss,
        reference=references.policy_loss_reference,
        make_inputs=make_policy_loss,
        # one read and one write; the second read of a row is meant to hit the caches
        bytes_moved=lambda s, dtype: 2 * s.n * s.vocab * dtype.itemsize,
        flops=lambda s: 10 * s.n * s.vocab,
        differentiable=("logits_NV",),
        loss="loss",
    ),
    Op(
        name="linear_policy_loss",
        function=ops.linear_policy_loss,
        reference=references.linear_policy_loss_reference,
        make_inputs=make_linear_policy_loss,
        bytes_moved=lambda s, dtype: 2 * (s.n + s.vocab) * s.hidden * dtype.itemsize,
        flops=lambda s: 4 * s.n * s.vocab * s.hidden,
        differentiable=("hidden_ND",),
        loss="loss",
    ),
    Op(
        name="score_tokens",
        function=ops.score_tokens,
        reference=references.score_tokens_reference,
        make_inputs=make_score_tokens,
        bytes_moved=lambda s, dtype: 2 * s.n * s.vocab * dtype.itemsize,
        flops=lambda s: 14 * s.n * s.vocab,
    ),
    Op(
        name="linear_score_tokens",
        function=ops.linear_score_tokens,
        reference=references.linear_score_tokens_reference,
        make_inputs=make_linear_score_tokens,
        bytes_moved=lambda s, dtype: 2 * (s.n + s.vocab) * s.hidden * dtype.itemsize,
        flops=lambda s: 4 * s.n * s.vocab * s.hidden,
    ),
    Op(
        name="value_loss",
        function=ops.value_loss,
        reference=references.value_loss_reference,
        make_inputs=make_value_loss,
        bytes_moved=lambda s, dtype: 5 * s.n * dtype.itemsize,
        flops=lambda s: 12 * s.n,
        differentiable=("value_N",),
        loss="loss",
    ),
)
OPS: Final[dict[str, Op]] = {op.name: op for op in _ALL}
