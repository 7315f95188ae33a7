"""Log-prob of the sampled token and entropy of the distribution it came from."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops import checks
from fastppo.ops.backend import choose
from fastppo.ops.registry import Op, Shape, register
from fastppo.ops.rows import DenseRows, RowSpec, gradient, row_outputs, row_spec, statistics


class TokenLogprobs(NamedTuple):
    """Log-prob of the sampled token and entropy, (N,), in nats; 0 on ignored rows."""

    logprob_N: Tensor
    entropy_N: Tensor


def token_logprobs(
    logits_NV: Tensor,
    token_N: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = checks.IGNORE_INDEX,
    check: bool = False,
    backend: str | None = None,
) -> TokenLogprobs:
    r"""Log-prob of each sampled token and entropy of each row, in nats; both differentiable.

        z = softcap tanh(x / softcap) / temperature
        logprob = z[token] - log sum exp z,    entropy = - sum p log p

    Any loss of these two can be built on top of it: its gradient passes through.

    Args:
        logits_NV: float (N, V), any strides; -inf is masked vocabulary.
        token_N: int64 (N,), in [0, V), or `ignore_index`: that row is not read, gives 0 and no
            gradient.
        temperature: > 0, a float or a float tensor () or (N,); no gradient flows to it.
        softcap: > 0, or None for none.
        check: also refuse tokens out of range; waits for the device.
        backend: "torch", or None to choose by device.

    Returns:
        TokenLogprobs(logprob_N, entropy_N), float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes that disagree, a setting out of range, a backend that cannot run.
        TypeError: logits that hold no floats, tokens that hold no integers.
    """
    op = "token_logprobs"
    choose(op, backend)
    checks.floating(op, "logits_NV", logits_NV, ndim=2)
    n, vocab = logits_NV.shape
    checks.tokens(op, token_N, logits_NV, n=n, vocab=vocab, ignore_index=ignore_index, check=check)
    checks.temperature(op, temperature, logits_NV, n=n)
    checks.softcap(op, softcap)
    dtype = checks.stat_dtype(logits_NV)
    spec = row_spec(token_N, token_N != ignore_index, temperature, softcap, dtype)
    logprob_N, entropy_N = _TokenLogprobs.apply(logits_NV, spec, dtype)  # type: ignore[no-untyped-call]
    return TokenLogprobs(logprob_N, entropy_N)


class _TokenLogprobs(torch.autograd.Function):
    """Two sweeps over the logits, one forward and one backward; nothing of size N x V is kept."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, spec: RowSpec, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        logprob_N, entropy_N = row_outputs(logits_NV, logits_NV.shape[0], dtype)

        def visitor(rows: slice, x: Tensor) -> None:
            stats = statistics(x, spec.at(rows))
            logprob_N[rows], entropy_N[rows] = stats.logprob, stats.entropy

        DenseRows(logits_NV, dtype).visit(visitor)
        ctx.save_for_backward(logits_NV)
        ctx.spec, ctx.dtype = spec, dtype
        ctx.set_materialize_grads(False)
        return logprob_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g_N: Tensor | None, h_N: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        (logits_NV,) = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        DenseRows(logits_NV, ctx.dtype, grad_NV).visit(upstream(ctx.spec, g_N, h_N))
        return grad_NV, None, None


def upstream(spec: RowSpec, g_N: Tensor | None, h_N: Tensor | None) -> Any:
    """A visitor that gives a block's gradient for those of log-prob and entropy."""

    def visitor(rows: slice, x: Tensor) -> Tensor:
        here = spec.at(rows)
        stats = statistics(x, here)
        g = torch.zeros_like(stats.logprob) if g_N is None else g_N[rows]
        return gradient(stats, here, g, None if h_N is None else h_N[rows])

    return visitor


def token_logprobs_reference(
    logits_NV: Tensor,
    token_N: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = checks.IGNORE_INDEX,
) -> TokenLogprobs:
    """The definition of `token_logprobs`, for autograd."""
    live = token_N != ignore_index
    log_p = log_probs_reference(logits_NV, live, temperature, softcap)
    logprob = log_p.gather(1, torch.where(live, token_N, 0).long()[:, None]).squeeze(1)
    possible = log_p > float("-inf")
    finite = torch.where(possible, log_p, 0)
    entropy = -torch.where(possible, log_p.exp() * finite, 0).sum(-1)
    return TokenLogprobs(torch.where(live, logprob, 0), torch.where(live, entropy, 0))


def log_probs_reference(
    logits_NV: Tensor, live_N: Tensor, temperature: float | Tensor, softcap: float | None
) -> Tensor:
    """log softmax of the bent and tempered logits, in the statistics' dtype."""
    x = torch.where(live_N[:, None], logits_NV, 0).to(checks.stat_dtype(logits_NV))
    masked = x == float("-inf")
    if softcap is not None:
        x = softcap * torch.tanh(torch.where(masked, 0, x) / softcap)
    tau = temperature
    if isinstance(tau, Tensor) and tau.ndim == 1:
        tau = torch.where(live_N, tau, 1)[:, None]
    z = torch.where(masked, float("-inf"), torch.where(masked, 0, x) / tau)
    return z.log_softmax(-1)


def make_logits(shape: Shape, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Logits with the spread of a language model's and tokens sampled from them."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = 2 * torch.randn(shape.n, shape.vocab, generator=generator, dtype=torch.float32)
    token_N = torch.randint(shape.vocab, (shape.n,), generator=generator)
    return logits_NV.to(dtype), token_N


def _make_inputs(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    logits_NV, token_N = make_logits(shape, dtype, seed)
    return {"logits_NV": logits_NV, "token_N": token_N}


register(
    Op(
        name="token_logprobs",
        function=token_logprobs,
        reference=token_logprobs_reference,
        make_inputs=_make_inputs,
        # forward: one read; backward: one read and one write
        bytes_moved=lambda s, dtype: 3 * s.n * s.vocab * dtype.itemsize,
        flops=lambda s: 12 * s.n * s.vocab,
        differentiable=("logits_NV",),
    )
)
