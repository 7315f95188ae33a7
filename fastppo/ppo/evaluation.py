"""Before and after, on the same prompts with the same random numbers; and predictions."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastppo.errors import UserError
from fastppo.ppo import log
from fastppo.ppo.metrics import SAMPLES, SUMMARY
from fastppo.ppo.phases import sampled, scored
from fastppo.rewards.function import call_scores, load_function
from fastppo.rewards.reward import mean_score
from fastppo.run import results, samples
from fastppo.seeds import seed_of
from fastppo.types import Answers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastppo.models.build import Role
    from fastppo.ppo.state import State
    from fastppo.types import Prompt

SAMPLES_KEPT = 64


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
    for start in range(0, len(prompts), size):
        with roles.use(role):
            seed = seed_of(config.seed, "evaluation", start)
            rollout = sampled(state, prompts[start : start + size], seed=seed)
        texts += rollout.texts
        lengths += rollout.response_lengths
        terminated += rollout.terminated
        if role == "reference":
            score_B, reward_parts = state.reward(rollout)
            rewards += score_B.tolist()
            parts.append(reward_parts)
        else:
            found = scored(state, rollout)
            rewards += found.score_B.tolist()
            parts.append(found.reward_parts)
            kl += (found.logprob_N - found.ref_logprob_N).sum().item()
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


@dataclass(frozen=True)
class Comparison:
    """The actor beside the policy that it started from, on the same prompts."""

    prompts: list[Prompt]
    before: Answers
    after: Answers
    seconds: float


def compare(state: State) -> Comparison:
    """`before` is the reference, where the actor started; it is sampled once and kept."""
    began, prompts, before = time.monotonic(), state.eval_prompts, state.before
    with state.stop.at_once():
        if before is None:
            before = answer(state, "reference", prompts)
        after = answer(state, "actor", prompts)
    state.before = before  # of an evaluation that was cut off nothing is kept
    return Comparison(prompts, before, after, time.monotonic() - began)


def summarise(state: State, compared: Comparison) -> dict[str, Any]:
    """The comparison in numbers, as summary.json has them."""
    before, after = compared.before, compared.after
    summary: dict[str, Any] = {
        "steps": state.step,
        "seconds": round(state.seconds(), 1),
        "reward_before": mean(before.rewards),
        "reward_after": mean(after.rewards),
        "win_rate": samples.win_rate(after.rewards, before.rewards),
        "kl": after.kl,
        "kl_coef": state.controller.kl_coef,
        "length_before": mean(before.lengths),
        "length_after": mean(after.lengths),
        "eos_share_before": mean(before.terminated),
        "eos_share_after": mean(after.terminated),
        "eval_prompts": len(compared.prompts),
        "eval_prompts_held_out": state.eval_is_held_out,
    }
    if before.judged is not None and after.judged is not None:
        summary["judge_before"] = mean(before.judged)
        summary["judge_after"] = mean(after.judged)
    for name in state.reward.extra_names:
        for when, answers in (("before", before), ("after", after)):
            summary[f"reward/{name}_{when}"] = mean_score(answers.reward_parts[name])
    return summary


def evaluate(state: State) -> dict[str, Any]:
    """Compare the actor with the policy it started from; files in metrics_dir and output_dir.

    metrics_dir gets summary.json, samples and curves; output_dir what `report` writes.
    """
    compared = compare(state)
    summary = summarise(state, compared)
    state.metrics.ensure_open()
    state.metrics.write_json(SUMMARY, summary)
    both = side_by_side(compared.prompts, compared.before, compared.after)
    state.metrics.write_json(SAMPLES, both)
    draw(state)
    report(state, compared, summary)
    return summary


def draw(state: State, *, share: float = math.inf) -> None:
    """training_curves.png; `share` of the run's time that pictures may take."""
    title = f"fastppo: {state.config.model_name_or_path}, {state.step} PPO steps"
    state.metrics.draw(title, share=share)


def report(state: State, compared: Comparison, summary: dict[str, Any]) -> dict[str, Any]:
    """LLaMA-Factory's eval_results.json and the table and page of samples, into output_dir.

    Returns:
        The metrics under their names there, `eval_...`; those of the reference end in _reference.
    """
    metrics: dict[str, Any] = {}
    for name, value in summary.items():
        if name.startswith(("steps", "seconds", "kl_coef", "eval_")):
            continue
        stem, _, when = name.rpartition("_")
        plain = stem if when in ("before", "after") else name
        metrics[f"eval_{plain}" + ("_reference" if when == "before" else "")] = value
    count = len(compared.prompts)
    metrics |= {
        "eval_samples": count,
        "eval_runtime": round(compared.seconds, 2),
        "eval_samples_per_second": round(count / max(compared.seconds, 1e-9), 3),
    }
    if state.metrics.rows:
        metrics["epoch"] = state.metrics.rows[-1]["epoch"]
    earlier = [each for each in state.evaluations if each["step"] != state.step]
    state.evaluations = [*earlier, {**metrics, "step": state.step}]
    folder = Path(state.config.output_dir)
    results.save_metrics(folder, "eval", metrics)
    if state.config.trains:
        log.log_entry(state, metrics)
    title = f"Samples after {state.step} PPO steps" if state.step else "Samples"
    samples.write(folder, title, metrics, list(sample_rows(compared)))
    return metrics


def sample_rows(compared: Comparison) -> Iterator[dict[str, Any]]:
    """Prompt by prompt: both policies' answers, their rewards, and who won."""
    before, after = compared.before, compared.after
    for i, prompt in enumerate(compared.prompts):
        row: dict[str, Any] = {"prompt": prompt.text}
        for name, answers in (("policy", after), ("reference", before)):
            row[name] = answers.texts[i]
            row[f"reward_{name}"] = answers.rewards[i]
            row[f"length_{name}"] = answers.lengths[i]
            row[f"terminated_{name}"] = answers.terminated[i]
        row["outcome"] = samples.outcome(after.rewards[i], before.rewards[i])
        if prompt.reference is not None:
            row["label"] = prompt.reference
        yield row


def predict(state: State, prompts: list[Prompt]) -> dict[str, Any]:
    """`do_predict`: the actor's response to every prompt; LLaMA-Factory's two files of it.

    generated_predictions.jsonl has its keys prompt, predict and label, and the reward.
    """
    began = time.monotonic()
    with state.stop.at_once():
        answers = answer(state, "actor", prompts)
    seconds, count = time.monotonic() - began, len(prompts)
    metrics = {
        "predict_reward": mean(answers.rewards),
        "predict_kl": answers.kl,
        "predict_length": mean(answers.lengths),
        "predict_eos_share": mean(answers.terminated),
        "predict_samples": count,
        "predict_runtime": round(seconds, 2),
        "predict_samples_per_second": round(count / max(seconds, 1e-9), 3),
    }
    folder = Path(state.config.output_dir)
    results.save_metrics(folder, "predict", metrics)
    rows = [
        {"prompt": prompt.text, "predict": text, "label": prompt.reference or "", "reward": reward}
        for prompt, text, reward in zip(prompts, answers.texts, answers.rewards, strict=True)
    ]
    results.write_jsonl(folder / results.PREDICTIONS, rows)
    return metrics


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
                row[f"reward/{part}_{name}"] = mean_score(part_B[i])
            if answers.judged is not None:
                row[f"judge_{name}"] = answers.judged[i]
        rows.append(row)
    return rows
