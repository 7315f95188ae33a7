"""float32 logits of 16-bit operands, whether or not a GPU's torch multiplies into them.

No such GPU is here: tensors on the CPU say that they lie on a "cuda" device, as ROCm's do too, and
torch.mm is a stand-in.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo.ops import head, products
from fastppo.ops.config import HeadLora

MM = torch.mm


class OnCuda(Tensor):
    """A tensor that says it lies on a GPU."""

    device = property(lambda self: torch.device("cuda", 0))  # type: ignore[assignment]


def rocm_of_torch_2_8(a: Tensor, b: Tensor, **keywords: Any) -> Tensor:
    if "out_dtype" in keywords:
        raise RuntimeError(
            "gemm input type at::BFloat16 and output type float is not supported for ROCm"
        )
    assert a.dtype == b.dtype == keywords["out"].dtype
    return MM(a, b, **keywords)


def cuda(a: Tensor, b: Tensor, *, out: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    if out_dtype is None:
        return MM(a, b, out=out)
    assert a.dtype == b.dtype == torch.bfloat16
    assert out_dtype == out.dtype == torch.float32
    calls.append(tuple(out.shape))
    return out.copy_(MM(a.float(), b.float()))


def older_than_2_8(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    return MM(a, b, out=out)


calls: list[tuple[int, ...]] = []


@pytest.mark.parametrize("mm", [rocm_of_torch_2_8, cuda, older_than_2_8], ids=lambda f: f.__name__)
def test_logits_are_the_float32_product_whatever_torch_can(mm, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(7, 16, generator=generator).bfloat16()
    weight_VD = torch.randn(2500, 16, generator=generator).bfloat16()
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(products, "_widening", {})
    calls.clear()
    there = [x.as_subclass(OnCuda) for x in (hidden_ND, weight_VD, torch.empty(7, 2500))]
    found = [head.Head(there[1]).logits(there[0], there[2]) for _ in range(2)]
    want = hidden_ND.float() @ weight_VD.float().T
    for logits_NV in found:
        torch.testing.assert_close(logits_NV.as_subclass(Tensor), want, atol=1e-5, rtol=1e-5)
    # Asked once, then all words in one product.
    assert calls == ([(16, 16), (7, 2500), (7, 2500)] if mm is cuda else [])


def test_out_of_memory_is_not_taken_for_an_unsupported_gemm(monkeypatch):
    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "mm", full)
    monkeypatch.setattr(products, "_widening", {})
    hidden_ND, weight_VD = torch.ones(2, 4).bfloat16(), torch.ones(3, 4).bfloat16()
    with pytest.raises(torch.OutOfMemoryError):
        head.Head(weight_VD).logits(hidden_ND, torch.empty(2, 3))
    assert not products._widening


def addmm_of_cuda(total: Tensor, a: Tensor, b: Tensor, **keywords: Any) -> Tensor:
    assert keywords.pop("out_dtype") == total.dtype == torch.float32
    assert keywords.pop("out") is total
    calls.append(tuple(total.shape))
    return total.add_(MM(a.float(), b.float()), **keywords)


def addmm_of_rocm(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("gemm input type at::BFloat16 and output type float is not supported")


@pytest.mark.parametrize("addmm", [addmm_of_cuda, addmm_of_rocm], ids=lambda f: f.__name__)
def test_a_gradient_of_16_bit_operands_is_added_up_in_float32(addmm, monkeypatch):
    """In place where torch can: 1 + 2^-9 is no bfloat16, and so is lost where a product is one."""
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(products, "_widening", {})
    calls.clear()
    a = torch.tensor([[1.0, 2.0**-9]]).bfloat16().as_subclass(OnCuda)
    b = torch.ones(2, 1).bfloat16().as_subclass(OnCuda)
    total = torch.full((1, 1), 3.0).as_subclass(OnCuda)
    products.add_product(total, a, b)
    products.add_product(total, a, b, alpha=2.0)
    exact = addmm is addmm_of_cuda
    assert total.item() == (3 + 3 * (1 + 2.0**-9) if exact else 6.0)
    assert calls == ([(16, 16), (1, 1), (1, 1)] if exact else [])


def addmm_of_a_bias(bias_V: Tensor, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """A GPU's: the bias is added to the accumulators, which are float32."""
    assert bias_V.dtype == a.dtype == b.dtype == out.dtype
    calls.append(tuple(out.shape))
    return out.copy_(MM(a.float(), b.float()) + bias_V.float())


def test_a_bias_is_added_before_16_bit_logits_are_rounded(monkeypatch):
    """By the GEMM: 1 + 2^-8 + 2^-8 is a bfloat16, and 1 + 2^-8 is not and rounds to 1."""
    monkeypatch.setattr(torch, "addmm", addmm_of_a_bias)
    calls.clear()
    there = (torch.tensor([[1.0, 2.0**-8]]), torch.ones(1, 2), torch.tensor([2.0**-8]))
    hidden_ND, weight_VD, bias_V = (x.bfloat16().as_subclass(OnCuda) for x in there)
    into_NV = torch.full((1, 1), float("nan")).bfloat16().as_subclass(OnCuda)
    found = head.Head(weight_VD, bias_V).logits(hidden_ND, into_NV)
    assert found.item() == 1 + 2.0**-7
    assert calls == [(1, 1)]


def test_an_adapters_share_of_a_gradient_is_not_rounded_before_it_is_added():
    """1 of the weight, 2^-8 + 2^-20 of a float32 adapter: more than half of the way to 1 + 2^-7."""
    lora = HeadLora(torch.tensor([[2.0**-8 + 2.0**-20]]), torch.ones(1, 1), 1.0)
    rows = head.LinearRows(
        torch.ones(1, 1).bfloat16(),
        head.Head(torch.ones(1, 1).bfloat16(), None, lora),
        torch.float32,
        torch.float32,
        None,
        None,
    )
    into_ND = torch.empty(1, 1).bfloat16()
    rows.to_hidden(torch.ones(1, 1), into_ND)
    assert into_ND.item() == 1 + 2.0**-7


def test_rows_of_whole_waves_by_hand():
    """Two multiprocessors, a head of one tile's columns: 3 tiles take as long as 4."""
    # 384 rows are 3 tiles, two waves; 256 are 2, one wave; 768 rows of them take 3 waves, not 4.
    assert products.rows_of_whole_waves(768, 384, 256, 256, 2) == 256
    # Of equal costs the fewest chunks: 512 rows are 2 waves of 4 tiles.
    assert products.rows_of_whole_waves(1024, 512, 256, 256, 2) == 512
    # Fewer rows than a tile has: nothing to choose.
    assert products.rows_of_whole_waves(7, 7, 256, 256, 2) == 7
