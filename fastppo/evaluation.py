"""Before and after, on the same prompts with the same random numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastppo.batch import Budget
from fastppo.errors import UserError
from fastppo.metrics import SAMPLES, SUMMARY
from fastppo.reward import mean_of_known
from fastppo.reward_function import call_scores, load_function
from fastppo.rollout import sample
from fastppo.sampling import Sampling
from fastppo.score import score

if TYPE_CHECKING:
    from fastppo.roles import Role
    from fastppo.state import State
    from fastppo.types import Prompt

SAMPLES_KEPT = 64


@dataclass(frozen=True)
class Answers:
    """What one policy said to the evaluation prompts, and what was thought of it."""

    texts: list[str]
    rewards: list[float]
    reward_parts: dict[str, Tensor]  # of several rewards each one's scores; NaN: does not apply
    judged: list[float] | None
    lengths: list[int]
    terminated: list[bool]
    kl: float  # to the reference, summed over a response, mean over responses


def answer(state: State, role: Role, prompts: list[Prompt]) -> Answers:
    """Sample `role` on `prompts` with the run's sampling, score and (if there is one) judge."""
    config, roles = state.config, state.roles
    texts: list[str] = []
    rewards: list[float] = []
    parts: list[dict[str, Tensor]] = []
    lengths: list[int] = []
    terminated: list[bool] = []
    kl = 0.0
    size = config.per_device_eval_batch_size
    budget = replace(Budget.of(config), tokens=size * (config.cutoff_len + config.max_new_tokens))
    for start in range(0, len(prompts), size):
        with roles.use(role):
            rollout = sample(
                roles,
                prompts[start : start + size],
                sampling=Sampling.of(config),
                template=state.template,
                tokenizer=state.tokenizer,
                seed=config.seed + start,
            )
        texts += rollout.texts
        lengths += rollout.response_lengths
        terminated += rollout.terminated
        if role == "reference":
            score_B, reward_parts = state.reward(rollout)
            rewards += score_B.tolist()
            parts.append(reward_parts)
        else:
            scored = score(
                roles,
                rollout,
                state.reward,
                temperature=config.temperature,
                budget=budget,
            )
            rewards += scored.score_B.tolist()
            parts.append(scored.reward_parts)
            kl += (scored.logprob_N - scored.ref_logprob_N).sum().item()
    judged = None
    if config.eval_judge is not None:
        judge = load_function(config.eval_judge, "eval_judge")
        scores = call_scores(judge, "eval_judge", [p.text for p in prompts], texts)
        judged = [score for score in scores if score is not None]
        if len(judged) < len(scores):
            raise UserError("eval_judge: gave None for a completion; a judge scores every one")
    joined = {name: torch.cat([part[name] for part in parts]) for name in state.reward.extra_names}
    return Answers(texts, rewards, joined, judged, lengths, terminated, kl / len(prompts))


def mean(values: list[Any]) -> float:
    """Arithmetic mean of numbers or truths."""
    return sum(values) / len(values)


def evaluate(state: State) -> dict[str, Any]:
    """Compare the actor with the policy it started from; write summary.json, samples and curves.

    `before` is the reference, which is where the actor started, so it is sampled once and kept.
    """
    prompts = state.eval_prompts
    if state.before is None:
        state.before = answer(state, "reference", prompts)
    before, after = state.before, answer(state, "actor", prompts)
    summary: dict[str, Any] = {
        "steps": state.step,
        "seconds": round(state.seconds(), 1),
        "reward_before": mean(before.rewards),
        "reward_after": mean(after.rewards),
        "kl": after.kl,
        "kl_coef": state.controller.kl_coef,
        "length_before": mean(before.lengths),
        "length_after": mean(after.lengths),
        "eos_share_before": mean(before.terminated),
        "eos_share_after": mean(after.terminated),
        "eval_prompts": len(prompts),
        "eval_prompts_held_out": state.held_out,
    }
    if before.judged is not None and after.judged is not None:
        summary["judge_before"] = mean(before.judged)
        summary["judge_after"] = mean(after.judged)
    for name in state.reward.extra_names:
        for when, answers in (("before", before), ("after", after)):
            summary[f"reward/{name}_{when}"] = mean_of_known(answers.reward_parts[name])
    state.metrics.ensure_open()
    state.metrics.write_json(SUMMARY, summary)
    state.metrics.write_json(SAMPLES, side_by_side(prompts, before, after))
    if state.metrics.rows:
        state.metrics.draw(f"fastppo: {state.config.model_name_or_path}, {state.step} PPO steps")
    return summary


def side_by_side(prompts: list[Prompt], before: Answers, after: Answers) -> list[dict[str, Any]]:
    """Prompt by prompt: the record's own answer where it has one, and both policies'."""
    rows = []
    for i, prompt in enumerate(prompts[:SAMPLES_KEPT]):
        row: dict[str, Any] = {"prompt": prompt.text}
        if prompt.reference is not None:
            row["reference"] = prompt.reference
        for name, answers in (("before", before), ("after", after)):
            row[name] = answers.texts[i]
            row[f"reward_{name}"] = answers.rewards[i]
            for part, part_B in answers.reward_parts.items():
                row[f"reward/{part}_{name}"] = mean_of_known(part_B[i])
            if answers.judged is not None:
                row[f"judge_{name}"] = answers.judged[i]
        rows.append(row)
    return rows
