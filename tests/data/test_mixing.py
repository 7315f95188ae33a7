"""Several data sets to one, counts of records, and what is held out."""

from __future__ import annotations

import datasets
import pytest

from fastppo.errors import UserError
from tests.project import PROMPTS, asked, describe, records, write_json


@pytest.fixture
def three(project):
    """Sets a (5 rows), b (2) and c (3)."""
    entries = {}
    for name, count in (("a", 5), ("b", 2), ("c", 3)):
        rows = [{"instruction": f"{name}{i}"} for i in range(count)]
        write_json(project / "data" / f"{name}.json", rows)
        entries[name] = {"file_name": f"{name}.json"}
    describe(project, **entries)
    return project


def test_comma_lists_and_max_samples_of_each_set(project):
    got = records(project, dataset="prompts, chats", max_samples=2)
    assert asked(got.train) == ["Say 0", "Say 1", "Hi"]


def test_max_samples_are_good_rows(project, capsys):
    got = records(project, [PROMPTS[0], {}, *PROMPTS[1:]], max_samples=2)
    assert asked(got.train) == ["Say 0", "Say 1"]
    assert "1 of 3 rows" in capsys.readouterr().err


# By hand. Under: rounds of one row of each set until b has none. Over: until a, the longest, is
# used up; b and c begin again. Once: every row a single time.
MIXES = {
    "concat": "a0 a1 a2 a3 a4 b0 b1 c0 c1 c2",
    "interleave_under": "a0 b0 c0 a1 b1 c1",
    "interleave_over": "a0 b0 c0 a1 b1 c1 a2 b0 c2 a3 b1 c0 a4 b0 c1",
    "interleave_once": "a0 b0 c0 a1 b1 c1 a2 c2 a3 a4",
}


@pytest.mark.parametrize("strategy", MIXES)
def test_mixes_by_hand(three, strategy):
    got = records(three, dataset="a,b,c", mix_strategy=strategy)
    assert asked(got.train) == MIXES[strategy].split()


def test_a_mix_with_shares_is_the_one_that_datasets_makes(three):
    sets = [
        datasets.Dataset.from_list([{"text": f"{name}{i}"} for i in range(count)])
        for name, count in (("a", 5), ("c", 3))
    ]
    golden = datasets.interleave_datasets(
        sets, probabilities=[0.9, 0.1], seed=7, stopping_strategy="all_exhausted"
    )
    how = {"mix_strategy": "interleave_over", "interleave_probs": "0.9, 0.1", "seed": 7}
    assert asked(records(three, dataset="a,c", **how).train) == golden["text"][:]


def test_one_set_needs_no_mixing(three):
    assert asked(records(three, dataset="b", mix_strategy="interleave_under").train) == ["b0", "b1"]


@pytest.mark.parametrize("count", [3, 4, 11])
def test_num_samples_is_exact_and_spares_no_row(project, count):
    one, again = (records(project, PROMPTS, {"num_samples": count}) for _ in range(2))
    assert one == again
    drawn = asked(one.train)
    assert len(drawn) == count
    assert len(set(drawn)) == min(count, 4)
    other = records(project, PROMPTS, {"num_samples": count}, seed=1)
    assert asked(other.train) != drawn


def test_num_samples_counts_good_rows_and_max_samples_comes_after(project):
    rows = [*PROMPTS, {}]
    assert len(records(project, rows, {"num_samples": 9}).train) == 9
    assert len(records(project, rows, {"num_samples": 9}, max_samples=6).train) == 6


@pytest.mark.parametrize(("size", "held"), [(0.25, 1), (1, 1), (2, 2), (0.01, 1), (0.3, 2)])
def test_val_size_is_a_share_or_a_count_seeded_disjoint_and_complete(project, size, held):
    one, again = (records(project, val_size=size) for _ in range(2))
    assert one == again
    assert (len(one.train), len(one.eval)) == (4 - held, held)
    both = [record.where for record in one.train + one.eval]
    assert sorted(both) == sorted(f"data/prompts.json row {i}" for i in range(1, 5))


@pytest.mark.parametrize("size", [0.1, 7, 0.33])
def test_val_size_holds_out_the_rows_that_llamafactory_does(project, size):
    rows = [{"instruction": str(i)} for i in range(40)]
    golden = datasets.Dataset.from_list(rows).train_test_split(size, seed=42)["test"]
    got = records(project, rows, val_size=size)
    assert sorted(asked(got.eval)) == sorted(golden["instruction"])


def test_eval_dataset_is_a_list_too(three):
    got = records(three, dataset="a", eval_dataset="b,c", max_samples=2)
    assert (asked(got.train), asked(got.eval)) == (["a0", "a1"], ["b0", "b1", "c0", "c1"])


def test_a_set_that_both_lists_name_is_noted_once(project, capsys):
    records(project, [*PROMPTS, {}], dataset="rows", eval_dataset="rows")
    assert capsys.readouterr().err.count("note:") == 1


def test_an_error_of_a_later_set_is_one_line_alone(project, capsys):
    with pytest.raises(UserError, match="eval_dataset"):
        records(project, [*PROMPTS, {}], eval_dataset="nothing")
    assert capsys.readouterr().err == ""
