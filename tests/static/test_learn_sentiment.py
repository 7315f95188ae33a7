"""The demo's task: what its runs leave, what the page concludes, and that TRL trains the same."""

from __future__ import annotations

import json
import math
import re
import runpy
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from benchmarks import step as step_benchmark
from benchmarks.learn import __main__ as command
from benchmarks.learn import beside_trl, page, pictures, readme, runs, sentiment
from benchmarks.learn.results import best_gold, over_optimised, read, running
from benchmarks.learn.sentiment_lines import one_response, sentiment_verdict, trl_verdict
from benchmarks.peers.environments import TRL
from fastppo import init_state, step_update
from fastppo.ppo import trainer as ppo_loop

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"cpu": "x", "cores": 2, "torch": "2", "threads": 1, "backend": None}


def toy_state(folder: Path, **changes):
    settings = {**sentiment.BASE, **sentiment.CONTROLLED, **sentiment.QUICK, "seed": 1, **changes}
    files = sentiment.toy_files(folder)
    return files, init_state(sentiment.make_config(settings, files, folder))


def test_the_two_runs_differ_in_the_controller_alone():
    on, off = sentiment.sentiment((1,))
    different = {key for key in on.settings if on.settings[key] != off.settings[key]}
    assert different == {"adap_kl_ctrl"}
    assert on.settings["max_steps"] >= 100
    assert on.settings["max_new_tokens"] == 16


def test_a_choice_differs_from_the_run_beside_it_in_one_key_that_the_token_task_has_too():
    on, _ = sentiment.sentiment((1,))
    files = {on.file}
    for run in sentiment.sentiment_choices((1,)):
        different = {key for key in on.settings if on.settings[key] != run.settings.get(key)}
        different |= run.settings.keys() - on.settings.keys()
        assert {key: run.settings[key] for key in different} == sentiment.CHOICES[run.name]
        assert len(different) == 1
        assert any(different == changes.keys() for changes in runs.CHOICES.values())
        files.add(run.file)
    assert len(files) == 1 + len(sentiment.CHOICES)


def test_the_gold_score_is_of_the_rollouts_texts_and_no_part_of_the_score(tmp_path, monkeypatch):
    """However high it is, what PPO trains on is the reward model's score alone."""
    from examples import demo_judge

    heard: list[list[str]] = []

    def judge(prompts, completions):
        heard.append(completions)
        return [1000.0 + len(text) for text in completions]

    monkeypatch.setattr(demo_judge, "judge", judge)
    _, state = toy_state(tmp_path)
    trained = sentiment.train(state)
    assert len(trained["curve"]) == len(heard) == 2
    for row, point, texts in zip(state.metrics.rows, trained["curve"], heard, strict=True):
        assert row["score"] == pytest.approx(row["score_shaped"])
        assert row["score"] == pytest.approx(point["proxy"], abs=1e-4)
        assert abs(row["return_mean"]) < 100
        assert len(texts) == 4
        assert point["gold"] == pytest.approx(1000 + sum(map(len, texts)) / 4, abs=1e-3)
    assert trained["updates"] == 4  # two steps of two epochs
    assert trained["curve"][0]["kl"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.slow
def test_a_quick_walk_leaves_scores_kl_and_a_page(tmp_path, capsys):
    asked = ["--quick", "--only", "sentiment", "--seeds", "1", "--out", str(tmp_path)]
    assert command.main(asked) == 0
    found = read(tmp_path)
    assert {row["name"] for row in found["sentiment"]} == {*sentiment.CONTROLLERS}
    for row in found["sentiment"]:
        assert [point["samples"] for point in row["curve"]] == [4, 8] == [4, row["samples"]]
        assert row["held_out"] == 8
        numbers = [row[f"{w}_{x}"] for w in ("proxy", "gold") for x in ("before", "after")]
        assert all(map(math.isfinite, numbers))
    betas = {row["name"]: {p["kl_coef"] for p in row["curve"]} for row in found["sentiment"]}
    assert len(betas["controller off"]) == 1 < len(betas["controller on"])
    capsys.readouterr()
    assert command.main(asked) == 0
    assert "2 runs, 2 of them done" in capsys.readouterr().out
    text = page.markdown(found)
    assert "Over-optimisation was not reached" in text
    assert pictures.draw(found, tmp_path) == [tmp_path / "learning_sentiment.png"]
    assert (tmp_path / "learning_sentiment.png").stat().st_size > 10_000


def curve(kl, proxy, gold, steps=40):
    """A curve whose columns are functions of the share of the steps that are done."""
    shares = [i / (steps - 1) for i in range(steps)]
    return [
        {
            "step": i + 1,
            "samples": 8 * (i + 1),
            "kl": kl(t),
            "proxy": proxy(t),
            "gold": gold(t) + 0.1 * (-1) ** i,
            "kl_coef": 0.01,
            "length": 16.0,
        }
        for i, t in enumerate(shares)
    ]


def made_up(section="sentiment", name="controller off", seed=1, **more):
    row = {"section": section, "name": name, "seed": seed, "date": "2026-01-01", "seconds": 60.0}
    row |= {"machine": MACHINE, "kl": 5.0, "samples": 320, "updates": 80}
    row |= {"gold_before": 0.3, "gold_after": 0.5, "gold_error": 0.02, "proxy_before": 0.0}
    row |= {"proxy_after": 1.0, "proxy_error": 0.1, "settings": {"learning_rate": 3e-4}}
    row["curve"] = curve(lambda t: 60 * t, lambda t: 3 * t, lambda t: 0.5 * t)
    return {**row, **more}


def test_running_means_by_hand():
    points = running(made_up(curve=curve(lambda t: 39 * t, lambda t: 0.0, lambda t: 0.0)))
    assert len(points) == 31  # the first of them after ten steps
    assert points[0].kl == pytest.approx(4.5)  # of 0 to 9
    assert points[0].samples == 80
    # +0.1 and -0.1 in turns: a deviation of 0.1 sqrt(10 / 9), over the root of ten steps.
    assert points[0].gold_error == pytest.approx(0.1 * math.sqrt(10 / 9) / math.sqrt(10))


@pytest.mark.parametrize(
    ("kl", "proxy", "gold", "words"),
    [
        (25, lambda t: 3 * t, lambda t: 0.5 * t, "Over-optimisation was not reached"),
        # It would be over-optimised, but that was looked for past a KL of 30.
        (25, lambda t: 3 * t, lambda t: t * (1 - t), "Over-optimisation was not reached"),
        (60, lambda t: 3 * t, lambda t: 0.5 * t, "in 0 of them"),
        (60, lambda t: 3 * t, lambda t: 4 * t * (1 - t), "in 1 of them"),
        # The proxy falls too: the policy is broken, which is something else.
        (60, lambda t: t * (1 - t), lambda t: 4 * t * (1 - t), "in 0 of them"),
    ],
)
def test_over_optimisation_is_a_gold_score_that_falls_while_the_proxy_rises(kl, proxy, gold, words):
    row = made_up(curve=curve(lambda t: kl * t, proxy, gold))
    assert words in sentiment_verdict([row])
    assert sentiment_verdict([row]).endswith("Not run yet: controller on.")
    both = sentiment_verdict([row, made_up(name="controller on")])
    assert both.endswith("With one seed each, what differs between the two may be chance.")
    if "1 of them" in words:
        assert over_optimised(row)
        assert 20 < best_gold(row).kl < 40


def test_a_policy_that_says_one_thing_to_every_prompt_is_told_from_a_good_one():
    row = made_up()
    assert not one_response(row)
    row["curve"] = [{**point, "gold": 0.9, "length": 10.0} for point in row["curve"]]
    assert one_response(row)
    assert "the policy says one thing to every prompt" in sentiment_verdict([row])
    row["curve"][-1] |= {"length": 10.5}
    assert not one_response(row)


def test_a_run_that_learned_nothing_is_named():
    assert "has learned nothing" not in sentiment_verdict([made_up()])
    assert "(controller off, seed 1) has learned nothing" in sentiment_verdict(
        [made_up(proxy_after=0.1)]
    )


@pytest.mark.parametrize(
    ("gold", "words"),
    [
        (0.5, "is where it was, though its gold score has risen."),
        (0.1, "is where it was, though its gold score has fallen."),
        (0.33, "is where it was."),
    ],
)
def test_nothing_learned_is_no_word_about_a_gold_score_that_moved(gold, words):
    assert words in sentiment_verdict([made_up(proxy_after=0.1, gold_after=gold)])


def test_the_verdict_has_the_controllers_beta_and_kl():
    settings = {"adap_kl_ctrl": True, "ppo_target": 6.0, "learning_rate": 3e-4}
    rows = [made_up(name="controller on", seed=seed, settings=settings) for seed in (1, 2, 3)]
    for row, beta in zip(rows, (0.4, 0.05, 0.1), strict=True):
        row["curve"][-1]["kl_coef"] = beta
    said = sentiment_verdict(rows)
    assert "has raised beta to 0.4, 0.05 and 0.1, and the KL is" in said
    assert "there for a target of 6 (seeds 1, 2 and 3)." in said
    assert "there for a target of 6 (seed 1)." in sentiment_verdict(rows[:1])


def beside(ours: dict[int, float], theirs: dict[int, float]):
    return [
        made_up("trl", trainer, seed, trainer=trainer, gold_after=gold)
        for trainer, scores in (("fastppo", ours), ("TRL", theirs))
        for seed, gold in scores.items()
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ({1: 0.6, 2: 0.7, 3: 0.6}, {1: 0.5, 2: 0.5, 3: 0.5}, "fastppo is ahead of TRL"),
        ({1: 0.5, 2: 0.5, 3: 0.5}, {1: 0.6, 2: 0.7, 3: 0.6}, "TRL is ahead of fastppo"),
        ({1: 0.6, 2: 0.4, 3: 0.6}, {1: 0.5, 2: 0.5, 3: 0.4}, "Nobody is surely ahead"),
        ({1: 0.51, 2: 0.51}, {1: 0.50, 2: 0.50}, "Nobody is surely ahead"),
        ({1: 0.7}, {1: 0.5}, "may be chance"),
        ({1: 0.7, 2: 0.7}, {2: 0.7}, "1 seed)"),  # the seed that both have
        ({1: 0.7}, {}, "No seed has been run by both"),
    ],
)
def test_the_table_says_who_is_ahead_and_when_nobody_is(ours, theirs, words):
    rows = beside(ours, theirs)
    assert words in trl_verdict(rows)
    assert words in " ".join(page.markdown(defaultdict(list, trl=rows)).split())


def test_a_page_of_some_sections_says_what_was_not_run(tmp_path):
    every = defaultdict(list, sentiment=[made_up()], trl=beside({1: 0.6}, {1: 0.5}))
    nothing = page.markdown(defaultdict(list))
    assert nothing.count("Not run yet") == 8
    assert ".png" not in nothing
    words = " ".join(page.markdown(every).split())
    assert words.count("Not run yet") == 7  # the other controller too
    drawn = pictures.draw(every, tmp_path)
    assert [path.name for path in drawn] == ["learning_sentiment.png", "learning_trl.png"]
    assert pictures.draw(defaultdict(list), tmp_path) == []


def test_the_pages_pictures_are_there_and_no_others():
    named = set(re.findall(r"\((learning\w*\.png)\)", page.PAGE.read_text(encoding="utf-8")))
    assert named == {path.name for path in page.DOCS.glob("learning*.png")}


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_says_what_the_committed_runs_say(name):
    words = readme.sentences(read())[name]
    text = (ROOT / name).read_text(encoding="utf-8")
    assert words in text
    assert readme.put(text, words) == text
    other = readme.put(text, "Other words.")
    assert "Other words." in other
    assert words not in other


def test_both_trainers_have_the_same_grid_and_the_same_settings():
    tried = list(beside_trl.trl_rates(runs.SEEDS))
    rates = {
        who: [r.settings["learning_rate"] for r in tried if r.trainer == who]
        for who in beside_trl.TRAINERS
    }
    assert rates["fastppo"] == rates["TRL"] == list(beside_trl.RATES)
    assert {run.seed for run in tried} == {beside_trl.TUNING_SEED}
    assert beside_trl.TUNING_SEED not in runs.SEEDS
    ours, theirs = beside_trl.trl((1,))
    assert {**ours.settings, "learning_rate": 0} == {**theirs.settings, "learning_rate": 0}
    assert ours.settings["max_steps"] > tried[0].settings["max_steps"]


def test_the_learning_rate_is_the_one_with_the_best_gold_score(tmp_path):
    assert beside_trl.best_rate("TRL", tmp_path) == beside_trl.RATES[1]
    for rate, gold in zip(beside_trl.RATES, (0.2, 0.3, 0.6), strict=True):
        row = {"trainer": "TRL", "gold_after": gold, "settings": {"learning_rate": rate}}
        (tmp_path / f"trl_rates-trl-{rate}.json").write_text(json.dumps(row))
    assert beside_trl.best_rate("TRL", tmp_path) == beside_trl.RATES[2]
    assert beside_trl.best_rate("fastppo", tmp_path) == beside_trl.RATES[1]


def test_trl_is_given_the_prompts_and_the_reward_model_of_ours(tmp_path, monkeypatch):
    """The exported classifier and the bias that the script adds score as the reward here does."""
    files, state = toy_state(tmp_path, critic="adapter")
    asked = beside_trl.peer_settings(state, files, tmp_path)
    assert asked["prompts"] == [prompt.ids for prompt in state.prompts]
    assert asked["layers"] == [1]  # the upper of two
    folder = Path(asked["classifier"])
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    rollout = None

    def keep(state, given, first, rewards=ppo_loop.step_rewards):
        nonlocal rollout
        rollout = given
        return rewards(state, given, first)

    monkeypatch.setattr(ppo_loop, "step_rewards", keep)
    step_update(state)
    ids_BT, length_B = rollout.input_ids_BT, torch.tensor(rollout.lengths)
    mask_BT = torch.arange(ids_BT.shape[1]) < length_B[:, None]
    with torch.no_grad():
        theirs = model(ids_BT, attention_mask=mask_BT.long()).logits[:, 0]
    mean = (theirs + model.config.score_bias).mean().item()
    proxy, _ = state.reward.extra_names
    assert mean == pytest.approx(state.metrics.rows[0][f"reward/{proxy}"], abs=1e-4)
    assert json.loads((folder / "config.json").read_text())["rope_theta"] > 0


def test_a_peers_response_ends_at_its_first_eos(monkeypatch):
    monkeypatch.syspath_prepend(step_benchmark.PEERS)
    script = runpy.run_path(str(step_benchmark.PEERS / "run_trl_learn.py"))

    class Words:
        eos_token_id, pad_token_id = 1, 0

        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids))

    ids_BT = torch.tensor([[0, 5, 7, 8, 1, 9], [5, 5, 7, 8, 9, 9], [5, 5, 1, 0, 0, 0]])
    assert script["texts_of"](Words(), ids_BT, 2) == ["7 8", "7 8 9 9", ""]


def test_without_trl_a_run_of_it_ends_with_the_cure(tmp_path, monkeypatch):
    absent = beside_trl.TRL.__class__("nothing", ())
    monkeypatch.setattr(beside_trl, "TRL", absent)
    files, state = toy_state(tmp_path)
    with pytest.raises(SystemExit, match=r"python -m benchmarks\.peers\.environments nothing"):
        beside_trl.train_by_trl(state, files, tmp_path)


@pytest.mark.slow
def test_ours_is_walked_through_beside_trl(tmp_path):
    asked = ["--quick", "--only", "trl", "--seeds", "1", "--names", "fastppo", "--out"]
    assert command.main([*asked, str(tmp_path)]) == 0
    (row,) = read(tmp_path)["trl"]
    assert (row["trainer"], row["samples"], row["updates"]) == ("fastppo", 8, 4)


@pytest.mark.peers
def test_trl_trains_on_as_many_samples_with_as_many_updates(tmp_path):
    assert TRL.ready, "run: python -m benchmarks.peers.environments trl"
    asked = ["--quick", "--only", "trl", "--seeds", "1", "--out", str(tmp_path)]
    assert command.main(asked) == 0
    ours, theirs = (
        next(row for row in read(tmp_path)["trl"] if row["trainer"] == who)
        for who in beside_trl.TRAINERS
    )
    for key in ("samples", "updates", "held_out", "gold_before", "proxy_before"):
        assert ours[key] == theirs[key]
    assert theirs["versions"]["trl"] == "0.24.0"
    assert [point["samples"] for point in theirs["curve"]] == [4, 8]
    assert theirs["curve"][0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert theirs["kl"] != 0.0  # the policy that was evaluated is the trained one
