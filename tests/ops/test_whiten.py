"""Whitening and the moments behind it."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import moments, whiten


def test_three_values_by_hand():
    # mean 2, unbiased variance 1
    assert whiten(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([-1.0, 0.0, 1.0])
    kept = whiten(torch.tensor([1.0, 3.0, 5.0]), shift_mean=False)
    assert kept.tolist() == pytest.approx([2.0, 3.0, 4.0])


def test_mean_0_and_variance_1():
    x = torch.randn(500, dtype=torch.float64) * 7 + 1000
    y = whiten(x)
    assert y.mean().abs() < 1e-12
    assert (y.var() - 1).abs() < 1e-8


@pytest.mark.parametrize(
    ("mask", "want"),
    [
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),  # nothing counts
        ([0.0, 1.0, 0.0], [0.0, 0.0, 0.0]),  # one value: variance 0, no NaN
        ([1.0, 0.0, 1.0], [-(0.5**0.5), 0.0, 0.5**0.5]),  # two: unbiased
    ],
)
def test_23_masked_statistics_of_0_1_and_2_tokens(mask, want):
    x = torch.tensor([1.0, float("nan") if mask[1] == 0 else 5.0, 3.0])
    got = whiten(x, weight_N=torch.tensor(mask))
    assert got.tolist() == pytest.approx(want, abs=1e-6)


def test_merged_moments_are_those_of_all_values():
    x = torch.randn(40, dtype=torch.float64) + 1e6
    merged = moments(x[:1]).merge(moments(x[1:7])).merge(moments(x[7:7])).merge(moments(x[7:]))
    assert merged.count.item() == 40
    assert merged.mean.item() == pytest.approx(x.mean().item(), rel=1e-15)
    assert merged.variance.item() == pytest.approx(x.var().item(), rel=1e-8)
    assert torch.equal(whiten(x, moments=moments(x)), whiten(x))


def test_moments_of_part_of_the_values_take_a_mask():
    got = moments(torch.tensor([1.0, 100.0, 3.0]), weight_N=torch.tensor([True, False, True]))
    assert [v.item() for v in got] == [2.0, 2.0, 2.0]


def test_large_values_lose_nothing_to_cancellation():
    x = torch.tensor([1e6, 1e6 + 1, 1e6 + 2])
    assert moments(x).m2.item() == pytest.approx(2.0)


def test_refusals():
    with pytest.raises(TypeError, match="whiten: x_N must hold floats"):
        whiten(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"moments: weight_N must have shape \(2,\)"):
        moments(torch.zeros(2), weight_N=torch.zeros(3))
