"""Log-prob and entropy straight from hidden states; the logits of a batch never exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops import checks
from fastppo.ops.backend import choose
from fastppo.ops.config import HeadLora
from fastppo.ops.head import Head, LinearRows, check_head, logits_dtype_of
from fastppo.ops.registry import Op, Shape, register
from fastppo.ops.rows import RowSpec, row_outputs, row_spec, statistics
from fastppo.ops.token_logprobs import TokenLogprobs, token_logprobs_reference, upstream


def linear_token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    token_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    head_lora: HeadLora | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    ignore_index: int = checks.IGNORE_INDEX,
    check: bool = False,
    backend: str | None = None,
) -> TokenLogprobs:
    r"""`token_logprobs` of logits = h W^T + bias, in nats, without ever holding them.

    Differentiable in the hidden states and in whatever of the head asks for a gradient: one GEMM
    without a gradient; with one, the backward makes the logits again (three GEMMs, four for a
    trained head). Where the loss is PPO's, `linear_policy_loss` needs two and three. Operands are
    multiplied in the dtype they have; autocast is not consulted.

    Args:
        hidden_ND: float (N, D).
        weight_VD: float (V, D), of the same dtype.
        token_N: int64 (N,), in [0, V), or `ignore_index`: that row gives 0 and no gradient.
        bias_V: float (V,).
        head_lora: an adapter on the head, see HeadLora.
        temperature: > 0, a float or a float tensor () or (N,).
        softcap: > 0, or None for none.
        chunk_bytes: how many bytes of logits may exist at a time; None suits the device.
        logits_dtype: what the GEMM gives; None is the operands' dtype, float32 keeps what bf16
            rounds.
        check: also refuse tokens out of range; waits for the device.
        backend: "torch", or None to choose by device.

    Returns:
        TokenLogprobs(logprob_N, entropy_N), float32 (float64 for float64 hidden states).

    Raises:
        ValueError: shapes that disagree, a setting out of range, a backend that cannot run.
        TypeError: inputs of the wrong kind, hidden states and weight of two dtypes.
    """
    op = "linear_token_logprobs"
    choose(op, backend)
    head = Head(weight_VD, bias_V, head_lora)
    check_head(op, hidden_ND, head)
    n, vocab = hidden_ND.shape[0], weight_VD.shape[0]
    checks.tokens(op, token_N, hidden_ND, n=n, vocab=vocab, ignore_index=ignore_index, check=check)
    checks.temperature(op, temperature, hidden_ND, n=n)
    checks.softcap(op, softcap)
    dtype = checks.stat_dtype(hidden_ND)
    spec = row_spec(token_N, token_N != ignore_index, temperature, softcap, dtype)
    settings = (dtype, logits_dtype_of(op, hidden_ND, logits_dtype), chunk_bytes)
    logprob_N, entropy_N = _LinearTokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_ND, *head.tensors(), head, spec, settings
    )
    return TokenLogprobs(logprob_N, entropy_N)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        a_RD: Tensor | None,
        b_VR: Tensor | None,
        head: Head,
        spec: RowSpec,
        settings: tuple[torch.dtype, torch.dtype, int | None],
    ) -> tuple[Tensor, Tensor]:
        logprob_N, entropy_N = row_outputs(hidden_ND, hidden_ND.shape[0], settings[0])

        def visitor(at: slice, x: Tensor) -> None:
            stats = statistics(x, spec.at(at))
            logprob_N[at], entropy_N[at] = stats.logprob, stats.entropy

        LinearRows(hidden_ND, head.detach(), *settings, spec.live_N).visit(visitor)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, a_RD, b_VR)
        ctx.scaling = head.lora.scaling if head.lora is not None else 1.0
        ctx.spec, ctx.settings = spec, settings
        ctx.set_materialize_grads(False)
        return logprob_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_N: Tensor | None, h_N: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, a_RD, b_VR = ctx.saved_tensors
        lora = None if a_RD is None else HeadLora(a_RD, b_VR, ctx.scaling)
        head, wanted = Head(weight_VD, bias_V, lora), ctx.needs_input_grad[:5]
        dtype, logits_dtype, chunk_bytes = ctx.settings
        live_N = ctx.spec.live_N
        rows = LinearRows(hidden_ND, head, dtype, logits_dtype, chunk_bytes, live_N, wanted)
        rows.visit(upstream(ctx.spec, g_N, h_N))
        return (*cast_like(rows.grads, ctx.saved_tensors), None, None, None)


def cast_like(
    grads: list[Tensor | None], like: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients in their inputs' dtypes, as autograd wants them."""
    return tuple(
        None if grad is None or tensor is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, like, strict=True)
    )


def dense_logits(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head_lora: HeadLora | None
) -> Tensor:
    """All logits at once: the definition that the linear ops never follow."""
    logits_NV = hidden_ND @ weight_VD.T
    if bias_V is not None:
        logits_NV = logits_NV + bias_V
    if head_lora is not None:
        low_NR = hidden_ND @ head_lora.A_RD.T
        logits_NV = logits_NV + head_lora.scaling * (low_NR @ head_lora.B_VR.T)
    return logits_NV


def linear_token_logprobs_reference(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    token_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    head_lora: HeadLora | None = None,
    **keywords: Any,
) -> TokenLogprobs:
    """The definition of `linear_token_logprobs`, for autograd."""
    logits_NV = dense_logits(hidden_ND, weight_VD, bias_V, head_lora)
    return token_logprobs_reference(logits_NV, token_N, **keywords)


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


register(
    Op(
        name="linear_token_logprobs",
        function=linear_token_logprobs,
        reference=linear_token_logprobs_reference,
        make_inputs=make_hidden,
        bytes_moved=lambda s, dtype: (3 * s.n * s.hidden + 2 * s.vocab * s.hidden) * dtype.itemsize,
        flops=lambda s: 6 * s.n * s.vocab * s.hidden,
        differentiable=("hidden_ND",),
    )
)
