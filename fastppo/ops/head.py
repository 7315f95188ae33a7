"""Compute logits chunk by chunk from hidden states, and the gradient; never all of [N, V].

A chunk of tokens goes through one library GEMM, a kernel turns its logits into their gradient, and
a second GEMM makes it that of the hidden states. Only a trained head costs a third.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.ops.config import HeadLora
from fastppo.ops.products import add_product, first_product, rows_of_whole_waves, widens
from fastppo.ops.rows import ChunkKernel
from fastppo.ops.workspace import fresh, fresh_rows

# A chunk re-reads the whole weight, and a GEMM of few rows is slow: so it is large, and more so on
# a GPU. On a CPU it has so many rows at least, whatever the vocabulary; more where the head trains,
# whose gradient is read and written once a chunk and is far larger than the chunk.
_CHUNK_BYTES_CPU = 80 << 20
_CHUNK_ROWS_CPU = 128
_CHUNK_ROWS_TRAINED_CPU = 256
_CHUNK_BYTES_DEVICE = 512 << 20
# Words whose logits are made at a time where the weight is widened for them, which takes memory;
# and on a CPU in float32. Of more, what its library has packed of the weight leaves the caches
# before it is used again; of fewer, it packs the hidden states more often than it should.
_WORDS = 1024
_WORDS_FLOAT32 = 4096

WEIGHT = 1  # its place in `LinearRows.wanted`: hidden, weight, bias, A, B


class HeadArguments(NamedTuple):
    """A head as the registered operators take it; the first four may train."""

    weight_VD: Tensor
    bias_V: Tensor | None
    lora_A_RD: Tensor | None
    lora_B_VR: Tensor | None
    lora_scaling: float


class HeadGradients(NamedTuple):
    """Gradients of hidden states and head; empty where not wanted."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor
    lora_A_RD: Tensor
    lora_B_VR: Tensor


@dataclass(frozen=True)
class Head:
    """An output head: logits = h W^T + bias + scaling (h A^T) B^T."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    lora: HeadLora | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that may train, in autograd's order."""
        a, b = (None, None) if self.lora is None else (self.lora.A_RD, self.lora.B_VR)
        return self.weight_VD, self.bias_V, a, b

    def arguments(self) -> HeadArguments:
        """The head as arguments of the registered operators."""
        if self.lora is None:
            return HeadArguments(self.weight_VD, self.bias_V, None, None, 1.0)
        lora = self.lora
        return HeadArguments(self.weight_VD, self.bias_V, lora.A_RD, lora.B_VR, lora.scaling)

    @classmethod
    def of(cls, given: HeadArguments) -> Head:
        """The inverse of `arguments`."""
        lora = None
        if given.lora_A_RD is not None and given.lora_B_VR is not None:
            lora = HeadLora(given.lora_A_RD, given.lora_B_VR, given.lora_scaling)
        return cls(given.weight_VD, given.bias_V, lora)

    def detach(self) -> Head:
        """The same head without gradient."""
        return self.map(Tensor.detach)

    def map(self, change: Callable[[Tensor], Tensor]) -> Head:
        """The same head with each tensor changed."""
        lora = self.lora
        if lora is not None:
            lora = HeadLora(change(lora.A_RD), change(lora.B_VR), lora.scaling)
        return Head(
            change(self.weight_VD), None if self.bias_V is None else change(self.bias_V), lora
        )

    def first_words(self, vocab_size: int) -> Head:
        """The head of the first words alone: views, nothing is copied."""
        lora = self.lora
        if lora is not None:
            lora = HeadLora(lora.A_RD, lora.B_VR[:vocab_size], lora.scaling)
        bias = None if self.bias_V is None else self.bias_V[:vocab_size]
        return Head(self.weight_VD[:vocab_size], bias, lora)

    def logits(self, hidden_ND: Tensor, into_NV: Tensor) -> Tensor:
        """Logits of some tokens, in the dtype of `into_NV`, whatever the GEMM's operands are."""
        out, vocab, weight_VD = into_NV, self.weight_VD.shape[0], self.weight_VD
        bias_V = None if self.bias_V is None else self.bias_V.to(out.dtype)
        wider = out.dtype != weight_VD.dtype
        if wider and widens(weight_VD, out.dtype):
            torch.mm(hidden_ND, weight_VD.T, out_dtype=out.dtype, out=out)
        elif wider or (out.device.type == "cpu" and out.dtype == torch.float32):
            wide_ND = hidden_ND.to(out.dtype)
            words = _WORDS if wider else _WORDS_FLOAT32
            for first in range(0, vocab, words):
                own = slice(first, first + words)
                torch.mm(wide_ND, weight_VD[own].T.to(out.dtype), out=out[:, own])
        elif bias_V is not None and out.device.type == "cuda":
            # In the GEMM's epilogue: no pass over the logits, and 16 bits are rounded to once.
            torch.addmm(bias_V, hidden_ND, weight_VD.T, out=out)
            bias_V = None
        else:
            torch.mm(hidden_ND, weight_VD.T, out=out)
        if self.lora is not None:
            low = hidden_ND.to(self.lora.A_RD.dtype) @ self.lora.A_RD.T
            add_product(out, low, self.lora.B_VR.T, alpha=self.lora.scaling)
        return out if bias_V is None else out.add_(bias_V)


def chunk_slices(
    n: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device,
    chunk_bytes: int | None,
    *,
    trained: bool = False,
    hidden: int = 0,
) -> list[slice]:
    """Consecutive slices of n tokens whose logits fit the budget, all of nearly one length.

    None is the budget that suits the device, and on a CPU whether the head is `trained`. On a GPU
    they are shortened to whole waves of GEMMs of `hidden` columns, if that is given.
    """
    if chunk_bytes is not None:
        rows = max(1, chunk_bytes // (vocab * dtype.itemsize))
    elif device.type == "cpu":
        least = _CHUNK_ROWS_TRAINED_CPU if trained else _CHUNK_ROWS_CPU
        rows = max(least, _CHUNK_BYTES_CPU // (vocab * dtype.itemsize))
    else:
        rows = max(1, _CHUNK_BYTES_DEVICE // (vocab * dtype.itemsize))
    count = -(-n // rows)
    if count and hidden and device.type == "cuda" and torch.cuda.is_available():
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        rows = rows_of_whole_waves(n, -(-n // count), vocab, hidden, multiprocessors)
        return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]
    return [slice(i * n // count, (i + 1) * n // count) for i in range(count)]


def full_precision(device: torch.device) -> torch.autocast:
    """No autocast: it would round logits that were asked for in float32, forward or backward."""
    return torch.autocast(device.type, enabled=False)


@dataclass
class LinearRows:
    """Rows of logits that exist a chunk at a time. Gradients of what trains are left in `grads`.

    `wanted` says of hidden, weight, bias, A and B whether a gradient is asked for. Gradients of the
    head are accumulated in the statistics' dtype; rows that are not live have no part in them. That
    of the weight goes into `weight_memory_VD` where there is some.
    """

    hidden_ND: Tensor
    head: Head
    dtype: torch.dtype
    logits_dtype: torch.dtype
    chunk_bytes: int | None
    live_N: Tensor | None  # may be None where nothing of the head trains
    wanted: Sequence[bool] = (False,) * 5
    weight_memory_VD: Tensor | None = None
    grads: list[Tensor | None] = field(default_factory=lambda: [None] * 5)

    def __post_init__(self) -> None:
        hidden, *head = self.wanted
        if hidden:
            self.grads[0] = torch.empty_like(self.hidden_ND, memory_format=torch.contiguous_format)
        for i, (needed, tensor) in enumerate(zip(head, self.head.tensors(), strict=True), 1):
            if needed and i == WEIGHT and self.weight_memory_VD is not None:
                self.grads[i] = self.weight_memory_VD
            elif needed and i == WEIGHT and self.hidden_ND.shape[0]:
                # The first chunk writes it: zeros would be one more pass over the largest of all.
                vocab, size = self.head.weight_VD.shape
                self.grads[i] = fresh((vocab, size), self.dtype, self.hidden_ND.device)
            elif needed:
                assert tensor is not None
                self.grads[i] = torch.zeros(
                    tensor.shape, dtype=self.dtype, device=self.hidden_ND.device
                )

    def chunks(self) -> list[slice]:
        """Consecutive tokens whose logits fit the budget."""
        n, vocab = self.hidden_ND.shape[0], self.head.weight_VD.shape[0]
        return chunk_slices(
            n,
            vocab,
            self.logits_dtype,
            self.hidden_ND.device,
            self.chunk_bytes,
            trained=self.wanted[WEIGHT],
            hidden=self.hidden_ND.shape[1],
        )

    def visit(self, kernel: ChunkKernel, *, write: bool) -> None:
        """Call `kernel` with every chunk; add the gradients that it writes to those in `grads`."""
        for chunk, x_NV, dx_NV in self.made(self._gradient_dtype() if write else None):
            kernel(chunk, x_NV, dx_NV)
            if dx_NV is not None:
                self._backward(chunk, self.hidden_ND[chunk], dx_NV)

    def made(
        self, gradient: torch.dtype | None, *, apart: bool = False
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Compute the logits of every chunk.

        Args:
            gradient: dtype of the gradient of the logits; None if there is none.
            apart: whether the gradient needs memory of its own, also if it could overwrite the
                logits.

        Yields:
            The chunk's place in the batch, its logits, and uninitialised memory for their gradient.
        """
        chunks, device = self.chunks(), self.hidden_ND.device
        # One buffer for all chunks: fresh memory costs as much as the arithmetic on it.
        rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
        vocab = self.head.weight_VD.shape[0]
        logits_NV = fresh_rows(rows, vocab, self.logits_dtype, device)
        grad_NV = None if gradient is None else logits_NV
        if gradient is not None and (apart or gradient != logits_NV.dtype):
            grad_NV = fresh_rows(rows, vocab, gradient, device)
        with full_precision(device):
            for chunk in chunks:
                own = slice(0, chunk.stop - chunk.start)
                x_NV = self.head.logits(self.hidden_ND[chunk], logits_NV[own])
                yield chunk, x_NV, None if grad_NV is None else grad_NV[own]

    def to_hidden(self, dx_NV: Tensor, into_ND: Tensor, d_low_NR: Tensor | None = None) -> None:
        """Turn a gradient of some logits into that of their hidden states: one GEMM.

        `d_low_NR` is the gradient of the adapter's inner activations where somebody has it.
        """
        weight_VD, lora = self.head.weight_VD, self.head.lora
        small_NV = dx_NV.to(weight_VD.dtype)
        if into_ND.dtype == weight_VD.dtype:
            torch.mm(small_NV, weight_VD, out=into_ND)
        else:
            first_product(into_ND, small_NV, weight_VD)
        if lora is not None:
            if d_low_NR is None:
                d_low_NR = dx_NV.to(lora.B_VR.dtype) @ lora.B_VR * lora.scaling
            add_product(into_ND, d_low_NR, lora.A_RD)

    def _gradient_dtype(self) -> torch.dtype:
        """That of the GEMM's operands, or a wider one where something of the head trains in it."""
        dtype = self.hidden_ND.dtype
        for needed, tensor in zip(self.wanted[1:], self.head.tensors(), strict=True):
            if needed and tensor is not None:
                dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype

    def _backward(self, chunk: slice, hidden: Tensor, dx_NV: Tensor) -> None:
        lora, d_low_NR = self.head.lora, None
        d_hidden, d_weight, d_bias, d_a, d_b = self.grads
        if any(self.wanted[1:]):
            assert self.live_N is not None
            # Their gradient is 0, but 0 times a NaN in the hidden state is NaN.
            hidden = hidden.masked_fill(~self.live_N[chunk, None], 0)
        if lora is not None and (d_a is not None or d_b is not None):
            lora_dx_NV = dx_NV.to(lora.B_VR.dtype)
            d_low_NR = lora_dx_NV @ lora.B_VR * lora.scaling
            hidden_lora = hidden.to(lora.A_RD.dtype)
            if d_a is not None:
                add_product(d_a, d_low_NR.T, hidden_lora)
            if d_b is not None:
                low_NR = hidden_lora @ lora.A_RD.T
                add_product(d_b, lora_dx_NV.T, low_NR, alpha=lora.scaling)
        if d_hidden is not None:
            self.to_hidden(dx_NV, d_hidden[chunk], d_low_NR)
        if d_weight is not None:
            small_NV = dx_NV.to(self.head.weight_VD.dtype)
            if d_weight.dtype == hidden.dtype:
                # beta 0 overwrites whatever was there, NaN too.
                d_weight.addmm_(small_NV.T, hidden, beta=0 if chunk.start == 0 else 1)
            elif chunk.start == 0:
                first_product(d_weight, small_NV.T, hidden)
            else:
                add_product(d_weight, small_NV.T, hidden)
        if d_bias is not None:
            d_bias.add_(dx_NV.sum(0, dtype=self.dtype))

    def results(self) -> HeadGradients:
        """The gradients in their inputs' dtypes, as autograd wants them; empty where unwanted."""
        inputs = (self.hidden_ND, *self.head.tensors())
        return HeadGradients(
            *(
                self.hidden_ND.new_empty(0)
                if grad is None or tensor is None
                else grad.to(tensor.dtype)
                for grad, tensor in zip(self.grads, inputs, strict=True)
            )
        )


def fake_results(hidden_ND: Tensor, head: Head, wanted: Sequence[bool]) -> HeadGradients:
    """Tensors with the shapes of `LinearRows.results`."""
    return HeadGradients(
        *(
            torch.empty_like(tensor, memory_format=torch.contiguous_format)
            if needed and tensor is not None
            else hidden_ND.new_empty(0)
            for needed, tensor in zip(wanted, (hidden_ND, *head.tensors()), strict=True)
        )
    )


def asked(needed: Sequence[bool], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients with None in place of the empty ones."""
    return tuple(grad if need else None for need, grad in zip(needed, grads, strict=True))
