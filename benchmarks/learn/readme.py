"""What both READMEs say of the runs, from the committed JSON: `--page` writes it between marks.

Only what a run surely shows is said there; docs/learning.md has the others too.
"""

from __future__ import annotations

from benchmarks.learn import runs
from benchmarks.learn.lines import learned
from benchmarks.learn.results import Found, mean, of
from benchmarks.learn.sentiment_lines import one_response
from benchmarks.learn.tokens import TASKS

MARKS = "<!-- learn -->", "<!-- /learn -->"


def ways(found: dict[str, list[Found]], name: str) -> str:
    """Mean shares of an estimator on the token tasks that it has run."""
    every = [own for task in TASKS if (own := of(found["compare"], task=task, name=name))]
    return " / ".join(f"{100 * mean(own, 'share'):.0f}%" for own in every)


def sentences(found: dict[str, list[Found]]) -> dict[str, str]:
    """The two sentences of each README."""
    compared = found["compare"]
    seeds = len({row["seed"] for row in compared})
    samples = f"{runs.STEPS * runs.BATCH:,}"
    ppo, grpo, rloo = (ways(found, name) for name in runs.ESTIMATORS)
    english = (
        f"On two token tasks PPO comes {ppo} of the way to the computed optimum in {samples} "
        f"responses, GRPO {grpo}, RLOO {rloo} (mean of {seeds} seed{'s' * (seeds > 1)})."
    )
    chinese = (
        f"在两个可算出最优策略的 token 任务上，{samples} 条回答后 PPO 走完到最优的 {ppo}，"
        f"GRPO {grpo}，RLOO {rloo}（{seeds} 个种子平均）。"
    )
    solved = of(found["problems"], name="PPO")
    scored = of(found["sentiment"], name="controller on")
    if solved and all(map(learned, solved)):
        before, after = (f"{100 * mean(solved, f'accuracy_{x}'):.0f}%" for x in ("before", "after"))
        english += (
            f"\nPPO takes SmolLM2-135M from {before} to {after} exact match on number sequences "
            "that it has not seen."
        )
        chinese += f"\nPPO 训练前后，SmolLM2-135M 答对未见过的数列题的比例为 {before} 和 {after}。"
    elif scored and not any(map(one_response, scored)):
        before, after = (f"{mean(scored, f'gold_{when}'):+.2f}" for when in ("before", "after"))
        english += f"\nAgainst the demo's reward model its judge goes from {before} to {after}."
        chinese += f"\n按演示的奖励模型训练，评判器得分从 {before} 变为 {after}。"
    return {"README.md": english, "README.zh-CN.md": chinese}


def put(text: str, words: str) -> str:
    """A README with these words between the marks."""
    first, last = MARKS
    before, _, rest = text.partition(first)
    _, _, after = rest.partition(last)
    return f"{before}{first}\n{words}\n{last}{after}"
