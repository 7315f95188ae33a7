"""Metrics of a loss: one vector, and fields that are made when they are read."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from fastppo.ops import PolicyMetrics, ValueMetrics

BOTH = pytest.mark.parametrize("kind", [PolicyMetrics, ValueMetrics])


@BOTH
def test_fields_are_the_entries_in_their_order(kind):
    vector = torch.arange(float(len(kind._fields)))
    metrics = kind(vector)
    assert kind._fields[0] == "count"
    assert [getattr(metrics, name).item() for name in kind._fields] == vector.tolist()
    count, *rest = metrics
    assert count.item() == 0
    assert len(rest) == len(metrics) - 1 == len(kind._fields) - 1
    assert torch.equal(kind.of(tuple(metrics)).vector, vector)


@BOTH
def test_a_field_shares_the_memory_of_the_vector(kind):
    metrics = kind(torch.zeros(len(kind._fields)))
    metrics.vector[0] = 5
    assert metrics.count == 5
    assert metrics.count.data_ptr() == metrics.vector.data_ptr()


def test_sums_add_up_and_the_maximum_does_not():
    fields = PolicyMetrics._fields
    at = fields.index("ratio_max")
    first, second = torch.full((len(fields),), 2.0), torch.full((len(fields),), 3.0)
    both = PolicyMetrics(first).merge(PolicyMetrics(second))
    assert both.ratio_max == 3
    assert all(value == 5 for i, value in enumerate(both) if i != at)
    assert first.unique().tolist() == [2]
    assert ValueMetrics(torch.ones(6)).merge(ValueMetrics(torch.ones(6))).count == 2


@BOTH
def test_they_are_moved_copied_and_saved_whole(kind):
    """As the tuple of tensors was that they are in place of."""
    metrics = kind(torch.ones(len(kind._fields)))
    doubled = pytree.tree_map(lambda x: 2 * x, {"metrics": metrics})["metrics"]
    assert isinstance(doubled, kind)
    for other in (doubled, copy.deepcopy(doubled), pickle.loads(pickle.dumps(doubled))):
        assert type(other) is kind
        assert other.count == 2
