"""The peers' log-probs of tokens from hidden states, each as (hidden, weight, token) -> log-prob.

Every label says what ran: on a CPU some peers have another path than on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks import peers

Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]
WithEntropy = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

VERL_CHUNK = 512


def trl_chunks() -> tuple[Any, int]:
    """TRL's autograd.Function, and the columns of a tile that its trainers ask for."""
    # Its backward imports this module; importing it here keeps that out of a measurement.
    utils: Any = peers.load("trl", "trl.trainer.utils")
    module: Any = peers.load("trl", "trl.kernels.chunked_logprob")
    return module.ChunkedLogProbFunction.apply, utils._CHUNKED_LOGPROB_CHUNK_SIZE


def trl() -> Logprobs:
    apply, chunk = trl_chunks()
    return lambda hidden, weight, token: apply(
        hidden, weight, None, token, 1.0, chunk, None, 1.0, ()
    )[0]


def trl_with_entropy() -> WithEntropy:
    apply, chunk = trl_chunks()
    return lambda hidden, weight, token: apply(
        hidden, weight, None, token, 1.0, chunk, None, 1.0, ("entropy",)
    )[:2]


def liger_scaled() -> Logprobs:
    module: Any = peers.load("liger-kernel", "liger_kernel.ops.fused_linear_scaled_cross_entropy")
    apply = module.LigerFusedLinearScaledCrossEntropyFunction.apply
    return lambda hidden, weight, token: -apply(hidden, weight, token)


def liger_scaled_with_entropy() -> WithEntropy:
    module: Any = peers.load("liger-kernel", "liger_kernel.ops.fused_linear_scaled_cross_entropy")
    apply = module.LigerFusedLinearScaledCrossEntropyFunction.apply

    def call(hidden: Tensor, weight: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = apply(hidden, weight, token, return_entropy=True)
        return -nll, entropy

    return call


def liger_chunked() -> Logprobs:
    module: Any = peers.load("liger-kernel", "liger_kernel.chunked_loss.fused_linear_ppo")
    forward = module.LigerFusedLinearPPOBase.chunk_forward
    return lambda hidden, weight, token: forward(hidden[None], weight, token[None])[0]


def cut_cross_entropy() -> Logprobs:
    module: Any = peers.load("cut-cross-entropy", "cut_cross_entropy.torch_compile")
    loss = module.torch_compile_linear_cross_entropy
    return lambda hidden, weight, token: -loss(hidden, weight, token, reduction="none")


def verl() -> Logprobs:
    module: Any = peers.load("verl", "verl.utils.experimental.torch_functional")
    head = module.FusedLinearForPPO(chunk_size=VERL_CHUNK)
    return lambda hidden, weight, token: head(hidden, weight, token)[0]


# Package, what of it runs on a CPU, and how to load it.
MODERN: tuple[tuple[str, str, Callable[[], Logprobs]], ...] = (
    ("trl", "chunked_logprob, its tiles in PyTorch", trl),
    ("liger-kernel", "scaled cross-entropy, its fallback in PyTorch", liger_scaled),
    ("cut-cross-entropy", "torch_compile", cut_cross_entropy),
)
ALL = (
    *MODERN,
    ("liger-kernel", "chunked GRPO loss in PyTorch, its log-prob alone", liger_chunked),
    (
        "verl",
        f'FusedLinearForPPO, impl_backend="torch", chunk {VERL_CHUNK}, entropy and the '
        "head's gradient too",
        verl,
    ),
)
WITH_ENTROPY: tuple[tuple[str, str, Callable[[], WithEntropy]], ...] = (
    ("trl", "chunked_logprob, its tiles in PyTorch", trl_with_entropy),
    ("liger-kernel", "scaled cross-entropy, its fallback in PyTorch", liger_scaled_with_entropy),
)
