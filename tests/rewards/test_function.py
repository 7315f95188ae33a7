"""Reward functions: TRL's calling convention, and what a function may not do."""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastppo.errors import UserError
from fastppo.rewards.function import FunctionReward, call_scores, check_arguments, load_function


def call(function, columns=None, ids=None):
    return call_scores(function, "reward_model: m:f", ["p1", "p2"], ["c1", "c2"], columns, ids)


def test_everything_goes_by_keyword_whatever_the_order():
    seen = {}

    def score(answer, *, completions, prompts):
        seen.update(prompts=prompts, completions=completions, answer=answer)
        return [1, 2.5]

    assert call(score, {"answer": [7, 8], "other": [0, 0]}) == [1.0, 2.5]
    assert seen == {"prompts": ["p1", "p2"], "completions": ["c1", "c2"], "answer": [7, 8]}


def test_kwargs_takes_every_column_and_the_ids():
    """The shape of every example in TRL's documentation: what it does not need goes to kwargs."""
    seen = {}

    def score(completions, **kwargs):
        seen.update(kwargs)
        return [0.0] * len(completions)

    call(score, {"answer": [7, 8]}, [[1], [2, 3]])
    assert seen == {"prompts": ["p1", "p2"], "answer": [7, 8], "completion_ids": [[1], [2, 3]]}


def test_columns_of_the_record_with_none_where_it_lacks_one(rollout, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_columns.py").write_text(
        "def f(completions, completion_ids, answer, **kwargs):\n"
        "    assert 'prompts' in kwargs and kwargs['prompts'][0] == 'Hi'\n"
        "    assert [len(ids) for ids in completion_ids] == [1, 3, 5, 2]\n"
        "    return [None if a is None else float(a == c) for a, c in zip(answer, completions)]\n"
    )
    columns = [{"answer": "x"}, {"answer": "y"}, {}, {"answer": "x", "prompts": "a column"}]
    prompts = [replace(p, columns=c) for p, c in zip(rollout.prompts, columns, strict=True)]
    score_B = FunctionReward("mine_columns:f", prompts)(replace(rollout, prompts=prompts))
    sys.modules.pop("mine_columns")
    assert score_B.isnan().tolist() == [False, False, True, False]
    assert score_B[[0, 1, 3]].tolist() == [1.0, 0.0, 1.0]


def test_function_reward_scores_the_texts(rollout):
    texts = ["aaaa", "abab", "bbbb", ""]
    score_B = FunctionReward("fastppo.toy:vowels")(replace(rollout, texts=texts))
    assert score_B.tolist() == [1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    "answer", [np.array([1.0, 2.0]), torch.tensor([1, 2]), (1, 2), iter([1, 2]), [np.float32(1), 2]]
)
def test_anything_with_a_number_for_each_will_do(answer):
    assert call(lambda **_: answer) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([1.0], "gave 1 scores for 2 completions; one for each"),
        ([], "gave 0 scores for 2"),
        ([1.0, math.nan], "gave nan for the completion 'c2'"),
        ([math.inf, 1.0], "gave inf for the completion 'c1'"),
        ([1e300, 1.0], r"gave 1e\+300 for the completion 'c1'"),
        (None, "gave 'None'; it must give a list"),
        (1.0, r"gave '1\.0'; it must give a list"),
        ("no", "gave 'no'; it must give a list"),
        ([[1.0], [2.0]], r"gave '\[\[1\.0\], \[2\.0\]\]'; it must give a list"),
        ([1, 10**400], "it must give a list"),
    ],
)
def test_bad_scores_are_refused(answer, words):
    with pytest.raises(UserError, match=words):
        call(lambda **_: answer)


def test_none_is_not_a_number_and_not_an_error():
    assert call(lambda **_: [None, 0.5]) == [None, 0.5]


def test_what_a_function_raises_is_one_line_with_its_place():
    def score(completions):
        return {}["key"]

    with pytest.raises(UserError, match=r"raised KeyError: 'key' \(test_function\.py line"):
        call(score)


def test_an_argument_that_nothing_gives_is_refused_before_the_run(rollout, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_arguments.py").write_text("def f(completions, answr): return [0.0]\n")
    prompts = [replace(prompt, columns={"answer": 1}) for prompt in rollout.prompts]
    words = "takes 'answr', which is none of answer, completion_ids, completions, prompts"
    with pytest.raises(UserError, match=words):
        FunctionReward("mine_arguments:f", prompts)
    sys.modules.pop("mine_arguments")


def test_arguments_with_defaults_need_nothing_and_positional_ones_cannot_be_given():
    check_arguments(lambda completions, scale=2.0, *rest, **more: [], "k", {"completions"})
    with pytest.raises(UserError, match="'completions' cannot be given by name; drop the '/'"):
        check_arguments(lambda completions, /: [], "k", {"completions"})


ASYNC = """
import functools

async def plain(completions, **kwargs):
    return [0.0]

class Object:
    async def __call__(self, completions, **kwargs):
        return [0.0]

made = Object()
half = functools.partial(plain, x=1)

def hidden(completions, **kwargs):
    return plain(completions)

number = 5
"""


@pytest.mark.parametrize("name", ["plain", "made", "half", "hidden"])
def test_async_functions_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_async.py").write_text(ASYNC)
    with pytest.raises(UserError, match=r"is an async function; give a plain|not an async one"):
        call(load_function(f"mine_async:{name}", "reward_model"))
    sys.modules.pop("mine_async")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vowels", "'vowels' is not module:function"),
        ("a:b:c", "is not module:function"),
        ("mine/rewards.py:f", "is not module:function with importable names"),
        ("./mine:f", "is not module:function"),
        (".mine:f", "is not module:function"),
        ("mine:f()", "is not module:function"),
        ("mine:f.g", "is not module:function"),
        ("os; import sys:f", "is not module:function"),
        ("class:f", "is not module:function"),
        ("mine:", "is not module:function"),
        (":f", "is not module:function"),
        ("no_such_module_here:f", "cannot import 'no_such_module_here'"),
        ("fastppo.toy:consonants", "'fastppo.toy' has no function 'consonants'"),
        ("fastppo.toy:SPECIAL", "has no function 'SPECIAL'"),
    ],
)
def test_functions_that_are_not_there(name, message):
    with pytest.raises(UserError, match=message):
        load_function(name, "reward_model")


@pytest.mark.parametrize("text", ["1 / 0", "def f(:"])
def test_a_module_that_does_not_import(text, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_broken.py").write_text(text)
    with pytest.raises(UserError, match=r"importing 'mine_broken' raised (ZeroDiv|Syntax)"):
        load_function("mine_broken:f", "reward_model")


def test_partials_and_objects_are_functions_too():
    def score(completions, scale):
        return [scale] * len(completions)

    assert call(functools.partial(score, scale=2.0)) == [2.0, 2.0]
