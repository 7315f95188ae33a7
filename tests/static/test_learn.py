"""Learning, held against the best policy: the optimum is one, and the runs are repeatable."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from itertools import product

import pytest
import torch

from benchmarks.learn import __main__ as command
from benchmarks.learn import exact, page, problems, runs
from benchmarks.learn.tokens import LETTERS, TASKS, alphabet, beginning


def policy_of(tree: exact.Tree, letters: int, seed: int) -> list[torch.Tensor]:
    """A random policy on a tree."""
    generator = torch.Generator().manual_seed(seed)
    prompts = len(tree.full_PL)
    return [
        torch.randn(
            prompts, letters**depth, letters + 1, generator=generator, dtype=torch.float64
        ).log_softmax(-1)
        for depth in range(tree.length)
    ]


def letters_a(prompts, completions):
    pairs = zip(prompts, completions, strict=True)
    return [text.count("a") / 3 + (text == prompt) for prompt, text in pairs]


def responses(policy: list[torch.Tensor], letters: str, prompt: int) -> dict[str, float]:
    """Every response to a prompt with its log-probability, one by one."""
    found = {}
    for depth in range(len(policy) + 1):
        for chosen in product(range(len(letters)), repeat=depth):
            total, prefix = 0.0, 0
            for place, letter in enumerate(chosen):
                total += policy[place][prompt, prefix, letter + 1].item()
                prefix = prefix * len(letters) + letter
            if depth < len(policy):
                total += policy[depth][prompt, prefix, 0].item()
            found["".join(letters[i] for i in chosen)] = total
    return found


def test_the_optimum_of_one_letter_by_hand():
    # EOS, a and b are equally likely and only a is paid: Z = (e^2 + 2) / 3 at beta 1/2.
    tree = exact.make_tree("a", "ab", 1, lambda prompts, texts: [float(t == "a") for t in texts])
    reference = [torch.full((1, 1, 3), 1 / 3, dtype=torch.float64).log()]
    best, policy = exact.best_policy(tree, reference, 0.5)
    assert best == pytest.approx(0.5 * math.log((math.e**2 + 2) / 3))
    chance = math.e**2 / (math.e**2 + 2)
    rest = (1 - chance) / 2
    assert policy[0][0, 0].exp().tolist() == pytest.approx([rest, chance, rest])


def test_no_policy_is_above_the_optimum_and_each_is_as_far_below_as_its_kl_to_the_best():
    beta, letters = 0.3, "abc"
    tree = exact.make_tree("abc", letters, 3, letters_a)
    reference = policy_of(tree, 3, 0)
    best, policy = exact.best_policy(tree, reference, beta)
    assert exact.value(tree, policy, reference, beta).objective == pytest.approx(best, abs=1e-12)
    for seed in range(1, 6):
        other = policy_of(tree, 3, seed)
        found = exact.value(tree, other, reference, beta).objective
        to_best = exact.value(tree, other, policy, beta).kl
        assert best - found == pytest.approx(beta * to_best, abs=1e-12)
        assert to_best > 0.1


def test_the_value_is_the_sum_over_responses_listed_one_by_one():
    letters = "abc"
    tree = exact.make_tree("cb", letters, 3, letters_a)
    # prompts "c" and "b" of an alphabet of three
    reference, policy = policy_of(tree, 3, 0), policy_of(tree, 3, 1)
    reward = kl = 0.0
    for number, prompt in enumerate("cb"):
        p, q = (responses(x, letters, number) for x in (reference, policy))
        assert sum(map(math.exp, q.values())) == pytest.approx(1.0)
        reward += sum(math.exp(q[y]) * letters_a([prompt], [y])[0] for y in q) / 2
        kl += sum(math.exp(q[y]) * (q[y] - p[y]) for y in q) / 2
    found = exact.value(tree, policy, reference, 0.2)
    assert found == pytest.approx((reward - 0.2 * kl, reward, kl))


def test_the_rewards_pay_for_the_letters_that_they_name():
    assert alphabet(["a", "a", "c"], ["bcdabc", "bbcdab", ""]) == pytest.approx([1.0, 5 / 6, 0.0])
    assert alphabet(["d"], ["abcd"]) == pytest.approx([4 / 6])  # it ended early
    assert beginning(["a", "a", "a"], ["bcxx", "bcaaaaaa", "bd"]) == [1.0, 1.0, 0.5]


def test_every_run_has_a_file_of_its_own():
    every = [run for section in runs.SECTIONS.values() for run in section(runs.SEEDS)]
    assert len({run.file for run in every}) == len(every) > 50
    assert {run.task for run in every} == {*TASKS, problems.TASK, "sentiment"}
    assert len(LETTERS) == 4


@pytest.mark.slow
def test_a_quick_walk_leaves_a_json_a_run_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    """What the JSON calls the optimum is above the policy, and done runs are not repeated."""
    asked = ["--quick", "--only", "compare", "controller", "--seeds", "1", "--out", str(tmp_path)]
    assert command.main(asked) == 0
    files = sorted(tmp_path.glob("*.json"))
    wanted = [*runs.compare((1,)), *runs.controller((1,))]
    assert {path.name for path in files} == {run.file for run in wanted}
    for path in files:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["machine"]["cores"] > 0
        assert found["settings"]["max_steps"] == 2
        if found["section"] == "compare":
            assert found["start"]["kl"] == pytest.approx(0.0, abs=1e-6)
            assert found["start"]["objective"] < found["optimum"]["objective"]
            assert found["end"]["objective"] < found["optimum"]["objective"]
            assert found["curve"][-1]["samples"] == 64
    files[0].unlink()
    monkeypatch.setattr(runs, "EVERY", 1)
    capsys.readouterr()
    assert command.main(asked) == 0
    said = capsys.readouterr().out
    assert f"{len(files)} runs, {len(files) - 1} of them done" in said
    assert files[0].is_file()


def test_a_whole_response_is_the_answer_or_it_is_not():
    """reasoning-gym pays for "12." and for a sentence with the answer in it."""
    texts = ["12", " 12\n", "12.", "It is 12", "13", "-4", "", "1 2", "\u0661\u0662"]
    paid = [1.0, 1.0, 0.0, 0.0, 0.1, 0.1, 0.0, 0.0, 0.0]
    assert problems.reward(texts, ["12"] * len(texts)) == paid


def test_the_interval_is_wilsons():
    # Worked out by hand for 10 of 100: (0.1 + 0.01921) / 1.03841, plus or minus 0.05957.
    assert problems.interval(10, 100) == pytest.approx((0.0552, 0.1744), abs=1e-4)
    assert problems.interval(0, 10)[0] == pytest.approx(0.0, abs=1e-12)


def test_the_baselines_without_a_model_by_hand():
    assert problems.by_chance(["1", "1", "2", "3"]) == pytest.approx((4 + 1 + 1) / 16)
    assert problems.by_constant(["2", "1", "1", "3"]) == 0.5


@pytest.mark.slow
def test_the_problems_are_walked_through_with_a_random_model(tmp_path, monkeypatch):
    def sums(task):
        made = [
            {"instruction": f"{a} + {b} =", "answer": str(a + b)}
            for a in range(8)
            for b in range(4)
        ]
        return {"training": made[:16], "held_out": made[16:]}

    monkeypatch.setattr(problems, "make_records", sums)
    asked = ["--quick", "--only", "problems", "--seeds", "1", "--out", str(tmp_path)]
    assert command.main(asked) == 0
    found = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("*.json")]
    assert {row["name"] for row in found} == {"PPO", "GRPO"}
    for row in found:
        assert row["held_out"] == 16
        assert row["interval_after"][0] <= row["accuracy_after"] <= row["interval_after"][1]
        assert len(row["scores"]) == 2


@pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None,
    reason=f"pip install --no-deps reasoning-gym=={problems.VERSION}",
)
def test_problems_are_reasoning_gyms():
    for task in problems.PROBLEMS:
        records = problems.make_records(task, 64)
        assert len(records["held_out"]) == 64
        questions = {
            part: {row["messages"][-1]["content"] for row in rows} for part, rows in records.items()
        }
        assert not questions["training"] & questions["held_out"]
        every = [*records["training"], *records["held_out"]]
        assert len(questions["training"]) == len(records["training"])
        example = every[0]["messages"][:2]
        assert all(row["messages"][:2] == example for row in every)
        assert example[0]["content"] not in questions["training"]
        answers = [row["answer"] for row in every]
        assert problems.reward(answers, answers) == [1.0] * len(every)


FOUND = page.read()


def test_the_page_is_made_of_the_committed_runs():
    assert page.PAGE.read_text(encoding="utf-8") == page.markdown(FOUND)


def test_a_committed_run_is_of_the_settings_in_the_code_and_adds_up():
    every = {run.file: run for section in runs.SECTIONS.values() for run in section(runs.SEEDS)}
    for path in runs.RESULTS.glob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["settings"] == every[path.name].settings, path.name
        assert found["date"].startswith("20")
        assert found["command"].startswith("python -m benchmarks.learn")
        if "share" in found:
            start, best, end = (found[x]["objective"] for x in ("start", "optimum", "end"))
            assert found["share"] == pytest.approx((end - start) / (best - start))
            assert end < best
            assert end == pytest.approx(found["end"]["reward"] - runs.BETA * found["end"]["kl"])
        if "kl_last" in found:
            last = found["kl_by_step"][-runs.WITHIN :]
            assert found["kl_last"] == pytest.approx(statistics.mean(last), abs=1e-3)


def test_samples_are_equal_and_the_seed_of_the_learning_rates_is_no_other():
    samples = {row["curve"][-1]["samples"] for row in FOUND["compare"]}
    assert len(samples) == 1
    assert {row["seed"] for row in FOUND["rates"]} == {runs.TUNING_SEED}
    assert runs.TUNING_SEED not in {row["seed"] for row in FOUND["compare"]}
