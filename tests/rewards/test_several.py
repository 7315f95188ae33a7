"""Several rewards at once: weights, names, what does not apply, and where each is logged."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace

import pytest
import torch

from fastppo.cli import main
from fastppo.config import config_from_dict
from fastppo.config.rewards import reward_specs
from fastppo.errors import TrainingStopped, UserError
from fastppo.models.batch import Budget
from fastppo.ppo import checkpoint, evaluation, trainer
from fastppo.ppo.advantage import KLController, RunningScore, estimate
from fastppo.ppo.columns import COLUMNS
from fastppo.ppo.score import score
from fastppo.rewards.reward import Reward, make_reward
from fastppo.run import save

MODULE = """
def short(completions, **kwargs):
    return [-len(text) / 10 for text in completions]

def rainy(prompts, completions):
    return [1.0 if "rain" in prompt else None for prompt in prompts]

def nothing(completions, **kwargs):
    return [None] * len(completions)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's own, importable for the length of a test."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_rewards.py").write_text(MODULE)
    yield "mine_rewards"
    sys.modules.pop("mine_rewards", None)


@pytest.fixture
def several(mine, reward_dir):
    """Keys of a YAML with a reward model and two functions."""
    return {
        "reward_model": f"{reward_dir}, {mine}:short, {mine}:rainy",
        "reward_model_type": "lora, function, function",
        "reward_weights": [1.0, 0.5, 2.0],
    }


def test_the_score_is_the_weighted_sum_over_what_applies(
    several, config, tiny_roles, template, tokenizer, rollout
):
    settings = config(**several)
    made = tiny_roles(**several)
    rollout = replace(rollout, texts=["", "ab", "abcd", "x" * 10])
    reward = make_reward(settings, made, template, tokenizer, rollout.prompts)
    score_B, parts = reward(rollout)
    lora, short, rainy = names = list(parts)
    assert names[1:] == ["short", "rainy"]
    torch.testing.assert_close(parts[short], torch.tensor([0.0, -0.2, -0.4, -1.0]))
    assert parts[rainy].isnan().tolist() == [True, False, True, True]
    expected = parts[lora] + 0.5 * parts[short] + torch.tensor([0.0, 2.0, 0.0, 0.0])
    torch.testing.assert_close(score_B, expected)
    alone = tiny_roles(reward_model_type="lora", reward_model=several["reward_model"].split(",")[0])
    one, only = make_reward(
        config(reward_model=str(several["reward_model"].split(",")[0]), reward_model_type="lora"),
        alone,
        template,
        tokenizer,
        rollout.prompts,
    )(rollout)
    assert torch.equal(one, parts[lora])
    assert list(only) == [lora]


def test_every_part_is_kept_with_the_scored_rollout(several, config, tiny_roles, template, rollout):
    made = tiny_roles(**several)
    reward = make_reward(config(**several), made, template, template.tokenizer, rollout.prompts)
    scored = score(made, rollout, reward(rollout), temperature=1.0, budget=Budget(rows=4))
    assert list(scored.reward_parts) == reward.names
    settings = config(**several)
    experience = estimate(scored, settings, KLController(0.1, 6.0, 10000), RunningScore())
    assert torch.equal(experience.score_B, scored.score_B)
    assert scored.score_B.isfinite().all()


def test_two_reward_models_on_one_base_each_score_as_if_alone(
    config, tiny_roles, template, rollout, reward_dir, model_dir, tmp_path
):
    from fastppo import toy
    from fastppo.models import build as roles

    other = roles.build(config(), torch.device("cpu"))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in [*other.trainable_parameters("actor"), *other.critic_head.parameters()]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save.save_model(other.model, other.critic_head, toy.byte_tokenizer(), tmp_path / "b")
    folders = [str(reward_dir), str(tmp_path / "b")]

    def parts_of(*names):
        keys = {"reward_model": ",".join(names), "reward_model_type": "lora"}
        made = tiny_roles(**keys)
        reward = make_reward(config(**keys), made, template, template.tokenizer, rollout.prompts)
        return list(reward(rollout)[1].values()), made

    both, made = parts_of(*folders)
    for folder, part in zip(folders, both, strict=True):
        assert torch.equal(parts_of(folder)[0][0], part)
    assert not torch.equal(both[0], both[1])
    assert not any(".reward" in n and p.requires_grad for n, p in made.model.named_parameters())


def test_a_response_that_nothing_applies_to_is_refused(mine, rollout, template, config, tiny_roles):
    keys = {"reward_model": f"{mine}:nothing,{mine}:rainy", "reward_model_type": "function"}
    reward = make_reward(
        config(**keys), tiny_roles(**keys), template, template.tokenizer, rollout.prompts
    )
    words = r"no reward applies to 'Hi'; give .* in nothing or rainy"
    with pytest.raises(UserError, match=words):
        reward(rollout)
    reward.has_worked = True  # what has worked and then fails is the run's trouble, not the input's
    with pytest.raises(TrainingStopped, match=words):
        reward(rollout)


def test_a_model_that_gives_nan_stops_the_run(rollout):
    specs = reward_specs("somewhere", "full", None)
    reward = Reward(specs, (lambda rollout: torch.full((4,), float("nan")),))
    with pytest.raises(TrainingStopped, match="reward 'somewhere' gave a score that is not finite"):
        reward(rollout)


def test_names_are_short_and_never_the_same():
    specs = reward_specs(
        "saves/good, a.b:good, http://h:1/x?k=v, https://h/, owner/good",
        "lora, function, api, api, full",
        None,
    )
    assert [spec.name for spec in specs] == ["good", "good_2", "api", "api_2", "good_3"]
    assert {spec.weight for spec in specs} == {1.0}


BASE = {
    "stage": "ppo",
    "model_name_or_path": "m",
    "dataset": "d",
    "output_dir": "o",
}


@pytest.mark.parametrize(
    ("models", "types", "weights"),
    [
        ("a, m:f", "lora, function", "1, -0.5"),
        (["a", "m:f"], ["lora", "function"], [1, -0.5]),
        ("a,m:f", ["lora", "function"], ["1", "-5e-1"]),
    ],
)
def test_comma_lists_and_yaml_lists_are_the_same(models, types, weights):
    keys = {"reward_model": models, "reward_model_type": types, "reward_weights": weights}
    specs = config_from_dict({**BASE, **keys}).rewards
    found = [(spec.kind, spec.target, spec.weight) for spec in specs]
    assert found == [("lora", "a", 1.0), ("function", "m:f", -0.5)]


def test_one_weight_may_be_a_number_and_one_type_is_all_types():
    for weight in (1, 2.5):
        one = config_from_dict({**BASE, "reward_model": "a", "reward_weights": weight})
        assert [(spec.kind, spec.weight) for spec in one.rewards] == [("lora", weight)]
    two = config_from_dict({**BASE, "reward_model": "a:b,c:d", "reward_model_type": "function"})
    assert [spec.kind for spec in two.rewards] == ["function", "function"]


@pytest.mark.parametrize(
    "curves", ["not drawn", pytest.param("drawn", marks=(pytest.mark.slow, pytest.mark.pictures))]
)
def test_each_reward_is_a_column_and_in_summary_samples_and_terminal(
    several, config, tmp_path, capsys, reward_dir, curves
):
    settings = config(**several, max_steps=2, critic="shared", eval_max_samples=2)
    data = settings.model_dump(exclude_none=True)
    (tmp_path / "run.json").write_text(json.dumps(data))
    assert main([str(tmp_path / "run.json")]) == 0
    out = capsys.readouterr().out
    for words in (f"base + LoRA '{reward_dir.name}' + head", "0.5 x function 'short'", "2 x func"):
        assert words in out
    assert ", reward/short -" in out
    assert ", reward/rainy +1.000 -> +1.000" in out

    names = [f"reward/{name}" for name in (reward_dir.name, "short", "rainy")]
    with (tmp_path / "metrics" / "training_metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[-3:] == names
    assert set(rows[0]) - set(COLUMNS) == set(names)
    for row in rows:
        lora, short, rainy = (float(row[name]) for name in names)
        assert rainy == 1.0  # of the one prompt of four that it applies to
        # A mean of sums: the part that applies to a quarter counts for a quarter.
        assert float(row["score"]) == pytest.approx(lora + 0.5 * short + 2.0 * rainy / 4, abs=1e-5)
    summary = json.loads((tmp_path / "metrics" / "summary.json").read_text())
    samples = json.loads((tmp_path / "metrics" / "samples.json").read_text())
    for name in names:
        assert isinstance(summary[f"{name}_before"], float)
        values = [sample[f"{name}_after"] for sample in samples]
        known = [value for value in values if value is not None]
        assert summary[f"{name}_after"] == pytest.approx(sum(known) / len(known), abs=1e-6)
    assert [sample["reward/rainy_after"] for sample in samples] == [None, 1.0]


def test_a_reward_that_applied_to_nothing_in_a_step_has_an_empty_cell(mine, state, tmp_path):
    keys = {"reward_model": f"{mine}:short,{mine}:nothing", "reward_model_type": "function"}
    run = trainer.step_update(state(**keys))
    with (tmp_path / "metrics" / "training_metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["reward/nothing"] == ""
    assert row["reward/short"] == row["score"]
    summary = evaluation.evaluate(run)
    assert summary["reward/nothing_after"] is None


def test_one_reward_has_no_column_but_score(state, tmp_path):
    trainer.step_update(state())
    header = (tmp_path / "metrics" / "training_metrics.csv").read_text().splitlines()[0]
    assert set(header.split(",")) <= set(COLUMNS)


def test_resuming_with_other_rewards_is_refused(mine, state, tmp_path):
    keys = {"reward_model": f"{mine}:short,{mine}:nothing", "reward_model_type": "function"}
    checkpoint.save_to_resume(trainer.step_update(state(**keys)), tmp_path)
    with pytest.raises(UserError, match="it has rewards reward/short; keep reward_model as it was"):
        checkpoint.resume(state(), tmp_path / "checkpoint-1")
