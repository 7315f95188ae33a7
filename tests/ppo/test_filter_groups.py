"""Dynamic sampling: groups of one score are left out, others sampled, exactly under resume."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastppo.ppo import trainer
from fastppo.ppo.filter_groups import fill, groups_that_differ
from fastppo.run.preflight import check

WANTED = {"num_generations": 2, "per_device_train_batch_size": 4, "filter_groups": True}
ALIKE, DIFFER = [1.0, 1.0], [0.0, 1.0]


@pytest.fixture
def batch(lay_out, template):
    """A function from scores of groups of two to a scored rollout, with a number in each text."""

    def make(number: int, *groups: list[float]):
        texts = [f"{number}-{i // 2}" for i in range(2 * len(groups))]
        responses = [[70 + number] * (1 + number) + [template.eos_id] for _ in texts]
        score_B = torch.tensor([score for group in groups for score in group])
        return lay_out(texts, responses), (score_B, {"part": -score_B})

    return make


def test_groups_of_one_score_are_left_out():
    score_B = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.5, 0.5, 2.0, -2.0])
    assert groups_that_differ(score_B, 2) == [2, 3, 6, 7]
    assert groups_that_differ(score_B, 4) == list(range(8))


def test_batches_are_sampled_until_there_are_enough_and_what_is_over_is_left_out(batch, config):
    """Two prompts a step: 1 of the first batch, none of the second, 2 of the third."""
    later = {1: batch(1, ALIKE, ALIKE), 2: batch(2, DIFFER, DIFFER)}
    rollout, (score_B, parts) = fill(batch(0, ALIKE, DIFFER), later.pop, config(**WANTED), 0)
    assert not later
    assert [prompt.text for prompt in rollout.prompts] == ["0-1", "0-1", "2-0", "2-0"]
    assert score_B.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert parts["part"].tolist() == [0.0, -1.0, 0.0, -1.0]
    assert rollout.response_lengths == [2, 2, 4, 4]
    assert rollout.sampler_logprob_N.numel() == 12
    for row, length in enumerate(rollout.lengths):
        assert rollout.input_ids_BT[row, length:].eq(0).all()
        assert rollout.input_ids_BT[row, length - 2] == 70 + (0, 2)[row // 2]
    found = rollout.filtered_from
    assert (found.batches, found.groups, found.differing, found.kept) == (3, 6, 3, 2)
    assert (found.responses, found.tokens) == (12, 4 * (2 + 3 + 4))
    assert found.score == pytest.approx((3 * 1.0 + 3 * 0.5) / 6)


def test_refills_are_bounded_and_the_step_goes_on_with_fewer(batch, config):
    asked = Counter()

    def later(number):
        asked[number] += 1
        return batch(number, ALIKE, ALIKE)

    settings = config(**WANTED, max_num_gen_batches=3)
    rollout, _ = fill(batch(0, ALIKE, DIFFER), later, settings, 0)
    assert asked == {1: 1, 2: 1}
    assert [prompt.text for prompt in rollout.prompts] == ["0-1", "0-1"]
    assert rollout.filtered_from.kept == 1


def test_without_any_group_that_differs_the_last_batch_is_shown_and_not_trained_on(batch, config):
    settings = config(**WANTED, max_num_gen_batches=2)
    rollout, (score_B, _) = fill(
        batch(0, ALIKE, ALIKE), lambda n: batch(n, ALIKE, ALIKE), settings, 0
    )
    assert [prompt.text for prompt in rollout.prompts] == ["1-0", "1-0", "1-1", "1-1"]
    assert score_B.tolist() == [1.0] * 4
    assert rollout.filtered_from.kept == 0


def half(prompts, completions, **_):
    """0 or 1, by the first byte: often the same for both responses to a prompt."""
    return [float(sum(map(ord, text[:1])) % 4 == 0) for text in completions]


def rows_of(folder: Path) -> list[dict[str, float]]:
    with (folder / "training_metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) for k, v in row.items() if "second" not in k} for row in rows]


@pytest.fixture
def run(config, tmp_path):
    """A function that runs stage ppo with filter_groups; returns the rows of its metrics."""

    def make(**changes):
        settings = config(
            **{**WANTED, "advantage": "grpo", "eval_max_samples": 2, "max_num_gen_batches": 4},
            reward_model=f"{__name__}:half",
            reward_model_type="function",
            **changes,
        )
        trainer.run(settings, check(settings))
        return rows_of(tmp_path / "metrics")

    return make


@pytest.mark.slow
def test_a_run_refills_and_a_resumed_one_reads_on_at_the_same_prompt(run):
    """The third step reads the prompts after all that were refilled before the checkpoint."""
    whole = run(max_steps=4, save_steps=2)
    assert sum(row["refills"] for row in whole[:2]) > 0
    for row in whole:
        assert row["sampled_responses"] == 4 * (1 + row["refills"])
        assert row["groups_trained"] <= 2
        assert row["sampled_tokens"] >= row["response_tokens"]
    resumed = run(max_steps=4, save_steps=2, resume_from_checkpoint=True)
    assert resumed == whole
