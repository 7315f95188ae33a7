"""Evaluation: compare the policy with its reference on the same prompts and seeds; predictions."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.data import encode_prompts
from fastppo.errors import Interrupted, UserError
from fastppo.ppo import lines, log
from fastppo.ppo.answers import answer
from fastppo.ppo.metrics import SAMPLES, SUMMARY
from fastppo.ppo.observer import Due
from fastppo.rewards.reward import mean_score
from fastppo.run import card, plots, results, samples
from fastppo.seeds import random_state
from fastppo.types import Answers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fastppo.data import Records
    from fastppo.ppo.observer import Observer
    from fastppo.ppo.state import State
    from fastppo.types import Prompt

SAMPLES_KEPT = 64
DRAWING_SHARE = 0.05  # the largest share of a run's time that may be spent on drawing curves


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean of numbers or booleans."""
    return sum(values) / len(values)


@dataclass(frozen=True)
class Comparison:
    """Responses of the reference (`before`) and of the actor (`after`) to the same prompts."""

    prompts: list[Prompt]
    before: Answers
    after: Answers
    seconds: float


def compare(state: State) -> Comparison:
    """Sample reference and actor on the evaluation prompts; the reference only once per run."""
    began, prompts, before = time.monotonic(), state.eval_prompts, state.before
    with state.stop.at_once():
        if before is None:
            before = answer(state, "reference", prompts)
        after = answer(state, "actor", prompts)
    state.before = before  # set last, so that an interrupted evaluation changes nothing
    return Comparison(prompts, before, after, time.monotonic() - began)


def summarise(state: State, compared: Comparison) -> dict[str, Any]:
    """The numbers of summary.json."""
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
    if state.best_step is not None:
        summary["best_step"] = state.best_step
    for name in state.reward.extra_names:
        for when, answers in (("before", before), ("after", after)):
            summary[f"reward/{name}_{when}"] = mean_score(answers.reward_parts[name])
    return summary


def evaluate(state: State) -> dict[str, Any]:
    """Compare the actor with the policy that it started from; returns the numbers of summary.json.

    Writes summary.json, samples and curves into metrics_dir, and the files of `report` into
    output_dir.
    """
    compared = compare(state)
    summary = summarise(state, compared)
    state.metrics.ensure_open()
    state.metrics.write_json(SUMMARY, summary)
    both = samples_json(compared.prompts, compared.before, compared.after)
    state.metrics.write_json(SAMPLES, both)
    draw(state)
    report(state, compared, summary)
    return summary


def evaluate_between_steps(state: State, observer: Observer) -> None:
    """Evaluate during training: print a line, and send the metrics to the trackers."""
    summary = evaluate(state)
    lines.evaluation_line(summary)
    if state.tracker is not None:
        state.tracker.log(eval_metrics(summary), state.step)
    state.random = random_state()  # rewards and judges may have used the generators
    observer.evaluated(state)


def is_due(state: State) -> bool:
    """Whether to evaluate before the next step: at the run's start, or if a signal prevented it."""
    if state.step == 0:
        return state.config.eval_on_start
    done = any(each["step"] == state.step for each in state.evaluations)
    return Due.by_config(state).evaluate and not done


def close_trackers(state: State, summary: dict[str, Any]) -> None:
    """Send the last evaluation to the trackers, and finish them."""
    if state.tracker is not None:
        state.tracker.log(eval_metrics(summary), state.step)
        state.tracker.close()


def eval_metrics(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary's numbers, renamed so that trackers show them in a panel of their own."""
    return {f"eval/{name}": value for name, value in summary.items()}


def draw_between_steps(state: State) -> None:
    """Draw training_curves.png, unless drawing would take over DRAWING_SHARE of the run's time."""
    draw(state, share=DRAWING_SHARE)


def draw(state: State, *, share: float = math.inf) -> None:
    """Draw training_curves.png, unless drawing would take more than `share` of the run's time."""
    title = f"fastppo: {state.config.model_name_or_path}, {state.step} PPO steps"
    state.metrics.draw(title, share=share)


def draw_all(state: State, output_dir: Path) -> None:
    """Draw the curves of all steps so far, and with `plot_loss` LLaMA-Factory's two plots."""
    if not state.world.main:
        return
    draw(state)
    if state.config.plot_loss and state.metrics.rows:
        plots.plot_log(log.log_history(state), ("loss", "reward"), output_dir)


@contextmanager
def draw_at_end(state: State, output_dir: Path) -> Iterator[None]:
    """Draw all curves when the block ends, even if a signal or an error ends it.

    Bad input that ends it in the first step leaves nothing behind, so that the mended run may begin
    in the same folder.
    """
    try:
        yield
    except (Exception, Interrupted) as error:
        if isinstance(error, UserError) and not state.step and not state.evaluations:
            if state.world.main:
                results.withdraw(output_dir)
            raise
        with suppress(Exception):  # the error to report is the one that ended the run
            draw_all(state, output_dir)
        raise
    draw_all(state, output_dir)


def report(state: State, compared: Comparison, summary: dict[str, Any]) -> dict[str, Any]:
    """Write LLaMA-Factory's eval_results.json and the samples into output_dir.

    Returns:
        The metrics by their names in that file, `eval_...`; those of the reference end in
        _reference.
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
    if state.best_step is None:  # the best policy's evaluation is there already
        earlier = [each for each in state.evaluations if each["step"] != state.step]
        state.evaluations = [*earlier, {**metrics, "step": state.step}]
    if not state.world.main:
        return metrics
    folder = Path(state.config.output_dir)
    results.save_metrics(folder, "eval", metrics)
    if state.best_step is None and state.config.trains:
        log.log_entry(state, metrics)
    steps = state.best_step or state.step
    title = f"Samples after {steps} PPO steps" if steps else "Samples"
    rows = list(sample_rows(compared))
    samples.write(folder, title, metrics, rows)
    if state.tracker is not None:
        state.tracker.log_samples(rows, steps)
    return metrics


def sample_rows(compared: Comparison) -> Iterator[dict[str, Any]]:
    """A row for each prompt: both policies' answers, their rewards, and which is better."""
    before, after = compared.before, compared.after
    for i, prompt in enumerate(compared.prompts):
        row: dict[str, Any] = {"prompt": prompt.text}
        for name, answers in (("policy", after), ("reference", before)):
            row[name] = answers.texts[i]
            row[f"reward_{name}"] = answers.rewards[i]
            row[f"length_{name}"] = answers.lengths[i]
            row[f"terminated_{name}"] = answers.terminated[i]
            if answers.judged is not None:
                row[f"judge_{name}"] = answers.judged[i]
        row["outcome"] = samples.outcome(after.rewards[i], before.rewards[i])
        if prompt.reference is not None:
            row["label"] = prompt.reference
        yield row


def predict(state: State, prompts: list[Prompt]) -> dict[str, Any]:
    """`do_predict`: sample the actor on every prompt, and write LLaMA-Factory's two files.

    generated_predictions.jsonl has LLaMA-Factory's keys prompt, predict and label, and the reward.
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
    if not state.world.main:
        return metrics
    folder = Path(state.config.output_dir)
    results.save_metrics(folder, "predict", metrics)
    rows = [
        {"prompt": prompt.text, "predict": text, "label": prompt.reference or "", "reward": reward}
        for prompt, text, reward in zip(prompts, answers.texts, answers.rewards, strict=True)
    ]
    results.write_jsonl(folder / results.PREDICTIONS, rows)
    return metrics


def held_out_prompts(state: State, records: Records) -> list[Prompt]:
    """All held-out prompts; an evaluation takes the first `eval_max_samples` of them."""
    config = state.config
    return encode_prompts(
        records.eval,
        state.template,
        config.cutoff_len,
        config.default_system,
        lf_truncation=config.lf_truncation,
    )


def write_results(state: State, records: Records) -> None:
    """Write train_results.json, predictions (`do_predict`) and the model card at a run's end."""
    folder = Path(state.config.output_dir)
    if state.world.main:
        results.save_metrics(folder, "train", log.train_metrics(state))
    if state.config.do_predict:
        predict(state, held_out_prompts(state, records))
    if not state.world.main:
        return
    steps = state.best_step or state.step
    shown = next(each for each in reversed(state.evaluations) if each["step"] == steps)
    metrics = {k: v for k, v in shown.items() if k.startswith("eval_")}
    origin = "held-out prompts" if state.eval_is_held_out else "prompts of the training set"
    card.write(
        folder,
        state.config,
        steps=steps,
        metrics=metrics,
        held_out=f"{len(state.eval_prompts)} {origin}",
    )


def samples_json(prompts: list[Prompt], before: Answers, after: Answers) -> list[dict[str, Any]]:
    """A row for each prompt: both policies' answers, and the record's own if it has one."""
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
