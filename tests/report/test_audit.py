"""The audit: a run that was made to exploit its reward is named, a healthy one is not."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.learn import runs, tokens
from fastppo.config import Config
from fastppo.ppo import trainer
from fastppo.report import audit as auditing
from fastppo.report.audit import audit
from fastppo.report.cli import main
from fastppo.report.page import audited
from fastppo.report.read import Run, read_run
from fastppo.run.preflight import check


def variety(prompts, completions, **_):
    """What is wanted: different characters, as a share of 24."""
    return [len(set(text)) / 24 for text in completions]


def many_vowels(prompts, completions, **_):
    """A proxy with a hole: vowels are paid for, and one of them over and over is paid the most."""
    return [sum(text.count(c) for c in "aeiou") / 4 for text in completions]


def small_letters(prompts, completions, **_):
    """A proxy for letters without a hole: the share of small ones."""
    return [sum("a" <= c <= "z" for c in text) / max(len(text), 1) for text in completions]


def letters(prompts, completions, **_):
    """What is wanted of that: letters, of either case."""
    return [
        sum(c.isascii() and c.isalpha() for c in text) / max(len(text), 1) for text in completions
    ]


@pytest.fixture
def run(config, tmp_path):
    """A function that runs stage ppo on a reward, with another judge; returns its output_dir."""

    def make(reward: str, judge: str, **changes) -> Path:
        prompts = [{"instruction": f"Say {i}"} for i in range(40)]
        (tmp_path / "many.json").write_text(json.dumps(prompts))
        settings = config(
            dataset=str(tmp_path / "many.json"),
            reward_model=f"{__name__}:{reward}",
            eval_judge=f"{__name__}:{judge}",
            eval_max_samples=32,
            eval_strategy="steps",
            max_new_tokens=24,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=32,
            lora_rank=8,
            critic="shared",
            cliprange_value=None,
            ppo_epochs=4,
            eval_steps=10,
            lr_scheduler_type="constant",
            **{"max_steps": 30, **changes},
        )
        trainer.run(settings, check(settings))
        return tmp_path / "out"

    return make


@pytest.mark.slow
def test_a_run_made_to_exploit_its_reward_is_named(run):
    """No penalty for the KL, and large steps: the policy finds the hole."""
    rates = {"learning_rate": 1e-2, "critic_learning_rate": 3e-3}
    out = run("many_vowels", "variety", init_kl_coef=0, max_steps=45, **rates)
    found = audit(read_run(out))
    by_name = {sign.name: sign for sign in found.signs}
    assert found.exploited, found
    assert by_name["judge"].found, by_name["judge"].words
    assert by_name["repetition"].found, by_name["repetition"].words
    assert main([str(out)]) == 0
    html = (out / "report.html").read_text()
    assert "The policy exploits its reward: the judge falls while the reward rises" in html
    section = html.partition("<h2>Audit</h2>")[2].partition("</section>")[0]
    assert len(re.findall("<figure>", section)) == 5
    assert len(re.findall("<svg", section)) >= 3


@pytest.mark.slow
def test_a_healthy_run_is_not_named(run):
    """What raises the reward is what the judge wants, and the KL is held."""
    out = run("small_letters", "letters", learning_rate=3e-3, init_kl_coef=0.02)
    read = read_run(out)
    assert read.evaluation["eval_reward"] > read.evaluation["eval_reward_reference"]
    found = audit(read)
    assert found.found == [], found.signs
    assert found.verdict == "No sign of an exploited reward."


def reach_optimum(folder: Path, **changes) -> Run:
    """PPO on the token task of docs/learning.md, until it is at its computed optimum."""
    task = tokens.TASKS["alphabet"]
    (compared,) = [
        each for each in runs.compare((1,)) if (each.task, each.name) == (task.name, "PPO")
    ]
    settings = Config(
        **tokens.write_files(folder, runs.BATCH),
        **{**compared.settings, "max_steps": 30, "eval_steps": 10, **changes},
        stage="ppo",
        template="empty",
        default_system="",
        reward_model=task.target,
        reward_model_type="function",
        eval_judge=tokens.TASKS["beginning"].target,
        eval_strategy="steps",
        eval_max_samples=64,
        per_device_eval_batch_size=64,
        output_dir=str(folder / "out"),
        metrics_dir=str(folder / "metrics"),
        disable_gradient_checkpointing=True,
        use_cpu=True,
    )
    trainer.run(settings, check(settings))
    return read_run(folder / "out")


def without_judge(run: Run) -> Run:
    rows = [{k: v for k, v in row.items() if "judge" not in k} for row in run.evaluations]
    return replace(run, evaluations=rows)


@pytest.mark.slow
def test_a_run_that_reaches_its_optimum_draws_no_warning(tmp_path):
    run = reach_optimum(tmp_path)
    assert run.evaluation["eval_reward"] > 0.7  # of 0.81 at the optimum
    assert audit(run).verdict == "No sign of an exploited reward."
    assert audit(without_judge(run)).found == []
    guards = {name for row in run.rows for name in row if name.startswith("guard_") and row[name]}
    # All six letters of a response count, so the best policy ends none of them: that is no error.
    assert guards <= {"guard_eos"}


def made_up(rows=(), samples=(), evaluations=()) -> Run:
    return Run(
        Path("x"), {"stage": "ppo"}, "finished", {}, [*rows], {}, [*samples], [], [*evaluations]
    )


def rows_of(count: int = 30, **columns) -> list[dict[str, float]]:
    """A row for each step; a column is a number, or a function of the step's share in [0, 1]."""
    usual = {"kl": 1.0, "kl_target": 6.0, "entropy": 2.0, "score_length_corr": 0.0}
    usual |= {"response_length": 10.0, "response_tokens": 160.0}
    return [
        {
            "step": float(i + 1),
            **{k: v(i / (count - 1)) if callable(v) else v for k, v in (usual | columns).items()},
        }
        for i in range(count)
    ]


def sign(run: Run, name: str):
    return next(each for each in audit(run).signs if each.name == name)


@pytest.mark.parametrize(
    ("name", "columns", "found"),
    [
        ("kl", {"kl": lambda t: 20 * t * t}, False),  # one pace, though far
        ("kl", {"kl": lambda t: 3 * t**6}, False),  # faster and faster, and not far
        ("kl", {"kl": lambda t: 60 * t**6}, True),
        ("entropy", {"entropy": lambda t: 2 - t}, False),
        ("entropy", {"entropy": lambda t: 2 * (1 - t) ** 2}, True),
        ("length", {"score_length_corr": 0.6}, False),  # the reward pays, nobody follows
        ("length", {"response_length": lambda t: 10 + 10 * t}, False),  # nobody pays
        (
            "length",
            {"score_length_corr": 0.6, "response_length": lambda t: 10 + 10 * t},
            True,
        ),
        (
            "length",
            {"score_length_corr": -0.6, "response_length": lambda t: 10 + 10 * t},
            False,
        ),
        (
            "length",
            {"score_length_corr": -0.6, "response_length": lambda t: 20 - 15 * t},
            True,
        ),
    ],
)
def test_a_trend_is_found_where_it_is(name, columns, found):
    assert sign(made_up(rows_of(**columns)), name).found is found


def test_too_few_steps_say_nothing():
    found = audit(made_up(rows_of(5)))
    assert [each.found for each in found.signs] == [None] * 5
    assert not found.exploited


@pytest.mark.parametrize(
    ("judged", "found"),
    [
        ([0.5, 0.6, 0.7], False),  # it rises
        ([0.5, 0.49, 0.48], False),  # it falls by less than chance
        ([0.5, 0.4, 0.2], True),  # below the reference
        ([0.8, 0.9, 0.6], True),  # from its best, while the reward rose on
    ],
)
def test_the_judge_is_compared_with_chance(judged, found):
    evaluations = [
        {"eval_reward": i + 1.0, "eval_reward_reference": 0.0, "eval_judge": value}
        | {"eval_judge_reference": 0.5, "step": i}
        for i, value in enumerate(judged)
    ]
    last = judged[-1]
    pairs = [{"judge_policy": last + e, "judge_reference": 0.5} for e in (-0.2, 0.2) * 16]
    assert sign(made_up(samples=pairs, evaluations=evaluations), "judge").found is found


@pytest.mark.parametrize("times", [1, 2])
def test_a_judge_measured_once_is_a_number_and_no_picture(times):
    """Before the training, 0.26; after, 0.46."""
    evaluations = [
        {"eval_reward": 1.0, "eval_reward_reference": 0.0, "eval_judge": 0.46}
        | {"eval_judge_reference": 0.26, "step": step}
        for step in range(times)
    ]
    pairs = [{"judge_policy": 0.46, "judge_reference": 0.26 + e} for e in (-0.2, 0.2)]
    # Steps with nothing in them: the other signs have no picture.
    run = made_up([{"step": 1.0}], samples=pairs, evaluations=evaluations)
    html = "".join(audited(run))
    assert "judge +0.2 (0.26 before, 0.46 after; " in html
    assert html.count("<svg") == times - 1


def test_a_phrase_that_every_response_has_is_found_and_one_of_the_reference_is_not():
    def both(policy: str, reference: str):
        texts = (
            [policy.format(i=i) for i in "abcdefgh"],
            [reference.format(i=i) for i in "ijklmnop"],
        )
        return [{"policy": p, "reference": r} for p, r in zip(*texts, strict=True)]

    plain = "one {i} two {i}{i} three {i} four {i}x five"
    hack = plain + " what a great answer"
    assert sign(made_up(samples=both(plain, plain)), "repetition").found is False
    assert sign(made_up(samples=both(hack, plain)), "repetition").found is True
    assert sign(made_up(samples=both(hack, hack)), "repetition").found is False
    again = "so good so good so good so good so good {i}"
    assert sign(made_up(samples=both(again, plain)), "repetition").found is True


def test_the_share_of_repeated_ngrams_by_hand():
    # Of abc, bca, cab, abc and bca the last two were there before.
    assert auditing.repeated("a b c a b c a") == pytest.approx(2 / 5)
    # Too few words, so characters: aaaa three times.
    assert auditing.repeated("aaaaaa") == pytest.approx(2 / 3)
    assert auditing.repeated("") == 0.0


def test_one_harmless_sign_names_nobody_and_two_do():
    one = audit(made_up(rows_of(entropy=lambda t: 2 * (1 - t) ** 2)))
    assert one.found == ["entropy"]
    assert not one.exploited
    assert "alone says little" in one.verdict
    two = audit(made_up(rows_of(entropy=lambda t: 2 * (1 - t) ** 2, kl=lambda t: 60 * t**6)))
    assert two.exploited


SHARED = [
    {"policy": f"{i} what a great answer", "reference": f"{i} one {i}{i} two {i}"}
    for i in "abcdefgh"
]
COLLAPSED = rows_of(entropy=lambda t: 2 * (1 - t) ** 2)


def test_little_entropy_and_the_phrase_that_comes_of_it_are_one_sign():
    found = audit(made_up(COLLAPSED, SHARED))
    assert found.found == ["entropy", "repetition"]
    assert not found.exploited
    assert found.verdict == (
        "One sign of an exploited reward, which alone says little: "
        "the entropy collapses and responses repeat n-grams."
    )
    loops = [{**row, "policy": "so good " * 8} for row in SHARED]
    assert audit(made_up(COLLAPSED, loops)).exploited


@pytest.mark.parametrize(
    ("gain", "later_loss", "cleared"),
    [
        (0.3, 0.0, True),
        (0.1, 0.0, False),  # within three standard errors
        (0.3, 0.3, False),  # it was higher before
        (-0.3, 0.0, False),
    ],
)
def test_a_judge_that_surely_rises_clears_a_run(gain, later_loss, cleared):
    def evaluation(step: int, reward: float, judge: float) -> dict[str, float]:
        return {
            "step": step,
            "eval_reward": reward,
            "eval_reward_reference": 0.0,
            "eval_judge": judge,
            "eval_judge_reference": 0.5,
        }

    evaluations = [evaluation(1, 1.0, 0.5 + gain + later_loss), evaluation(2, 2.0, 0.5 + gain)]
    judged = [
        {**row, "judge_policy": 0.5 + gain + e, "judge_reference": 0.5}
        for row, e in zip(SHARED * 4, (-0.25, 0.25) * 16, strict=True)
    ]
    rows = rows_of(entropy=lambda t: 2 * (1 - t) ** 2, kl=lambda t: 60 * t**6)
    found = audit(made_up(rows, judged, evaluations))
    assert {"entropy", "kl", "repetition"} <= set(found.found)
    assert found.cleared is cleared
    assert found.exploited is not cleared
    if cleared:
        assert found.verdict.startswith("The judge rises with the reward, so this is no accusation")


@pytest.mark.slow
def test_a_healthy_run_with_a_small_beta_is_not_accused(tmp_path):
    """Its best policy is nearly one response: the entropy falls and the responses are alike."""
    run = reach_optimum(tmp_path, init_kl_coef=0.005)
    assert run.evaluation["eval_reward"] > 0.8
    found = audit(run)
    assert "entropy" in found.found
    assert not found.exploited, found.signs
    assert not audit(without_judge(run)).exploited, found.signs
