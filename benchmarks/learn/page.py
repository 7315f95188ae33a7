"""docs/learning.md and its picture, from the committed JSON: no number is written by hand."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.learn import problems, runs
from benchmarks.learn.tokens import TASKS

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, PICTURE = DOCS / "learning.md", DOCS / "learning.png"
ENOUGH = 0.95  # of the way from the start to the optimum
NEAR = 0.25  # of the controller's target
Found = dict[str, Any]


def read(folder: Path = runs.RESULTS) -> dict[str, list[Found]]:
    """The JSON of every run that is there, by section."""
    by_section: dict[str, list[Found]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        by_section[found["section"]].append(found)
    return by_section


def of(rows: Iterable[Found], **keys: Any) -> list[Found]:
    """Rows with these values, by seed."""
    chosen = [row for row in rows if all(row[k] == v for k, v in keys.items())]
    return sorted(chosen, key=lambda row: row["seed"])


def mean(rows: Sequence[Found], *keys: str) -> float:
    """Mean of an entry over runs."""
    values = []
    for row in rows:
        value: Any = row
        for key in keys:
            value = value[key]
        values.append(value)
    return statistics.mean(values)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def shares(rows: Sequence[Found]) -> str:
    """Each seed's share of the way, in percent."""
    return ", ".join(f"{row['seed']}: {100 * row['share']:.1f}" for row in rows)


def compare_lines(rows: Sequence[Found]) -> list[str]:
    """A task a table: the three estimators."""
    lines = []
    for task in TASKS:
        same = of(rows, task=task)
        if not same:
            continue
        first = same[0]
        start, best = first["start"], first["optimum"]
        lines += [
            "",
            f"**{task}.** {' '.join((TASKS[task].reward.__doc__ or '').split())} J is "
            f"{start['objective']:.3f} at the start and {best['objective']:.3f} at the optimum, "
            f"whose reward is {best['reward']:.3f} at a KL of {best['kl']:.2f} nats.",
            "",
            *table(
                ("", "learning rate", "% of the way, by seed", "mean", "reward", "KL"),
                (
                    (
                        name,
                        f"{own[0]['settings']['learning_rate']:g}",
                        shares(own),
                        f"{100 * mean(own, 'share'):.1f}",
                        f"{mean(own, 'end', 'reward'):.3f}",
                        f"{mean(own, 'end', 'kl'):.2f}",
                    )
                    for name in runs.ESTIMATORS
                    if (own := of(same, name=name))
                ),
            ),
        ]
    return lines


def samples_to(own: Sequence[Found], share: float) -> str:
    """Samples after which the mean objective over the seeds first is this share of the way."""
    if not own:
        return ""
    start, best = mean(own, "start", "objective"), mean(own, "optimum", "objective")
    for points in zip(*(row["curve"] for row in own), strict=True):
        objective = statistics.mean(point["objective"] for point in points)
        if objective >= start + share * (best - start):
            return f"{points[0]['samples']:,}"
    return "not reached"


def speed_lines(rows: Sequence[Found]) -> list[str]:
    """Samples that each estimator needs to come half and 95% of the way."""
    return table(
        ("responses to", *(f"{task}, {s:.0%}" for task in TASKS for s in (0.5, 0.9, ENOUGH))),
        (
            (
                name,
                *(
                    samples_to(of(rows, task=task, name=name), s)
                    for task in TASKS
                    for s in (0.5, 0.9, ENOUGH)
                ),
            )
            for name in runs.ESTIMATORS
        ),
    )


def controller_lines(rows: Sequence[Found]) -> list[str]:
    """The controller's runs: KL over the last steps beside the target."""

    def line(name: str, own: Sequence[Found]) -> tuple[str, ...]:
        off = [row["kl_last"] / row["target"] - 1 for row in own]
        return (
            f"`{name}`",
            ", ".join(f"{row['seed']}: {row['kl_last']:.2f}" for row in own),
            ", ".join(f"{100 * x:+.0f}%" for x in off),
            ", ".join(f"{row['kl_coef_by_step'][-1]:.3f}" for row in own),
            f"{sum(abs(x) <= NEAR for x in off)} of {len(off)}",
        )

    return table(
        ("", "KL, by seed", "off the target", "beta at the end", "within 25%"),
        (line(name, own) for name in runs.CONTROLLERS if (own := of(rows, name=name))),
    )


def choices_lines(rows: Sequence[Found], compared: Sequence[Found]) -> list[str]:
    """One setting changed at a time, the best first."""
    base = of(compared, task="alphabet", name="PPO")
    every = {"as in the first table": base} if base else {}
    every |= {f"`{name}`": own for name in runs.CHOICES if (own := of(rows, name=name))}
    ordered = sorted(every.items(), key=lambda item: -mean(item[1], "share"))
    return table(
        ("", "% of the way, by seed", "mean", "seconds a run"),
        (
            (name, shares(own), f"{100 * mean(own, 'share'):.1f}", f"{mean(own, 'seconds'):.0f}")
            for name, own in ordered
        ),
    )


def rates_lines(rows: Sequence[Found]) -> list[str]:
    """Each estimator at each learning rate, on the seed that no other table has."""
    return table(
        ("learning rate", *(f"{rate:g}" for rate in runs.RATES)),
        (
            (
                name,
                *(
                    shares(of(rows, task="alphabet", name=f"{name} {rate:g}"))
                    for rate in runs.RATES
                ),
            )
            for name in runs.ESTIMATORS
        ),
    )


def problems_lines(rows: Sequence[Found]) -> list[str]:
    """Exact match on held-out problems, with intervals."""

    def cell(row: Found, when: str) -> str:
        low, high = row[f"interval_{when}"]
        return f"{100 * row[f'accuracy_{when}']:.1f} ({100 * low:.1f} to {100 * high:.1f})"

    return table(
        ("", "seed", "untrained, %", "trained, %", "by chance, %", "KL", "responses", "minutes"),
        (
            (
                row["name"],
                str(row["seed"]),
                cell(row, "before"),
                cell(row, "after"),
                f"{100 * row['accuracy_by_chance']:.1f}",
                f"{row['kl']:.2f}",
                f"{row['samples']:,}",
                f"{row['seconds'] / 60:.0f}",
            )
            for row in rows
        ),
    )


def machines(found: dict[str, list[Found]]) -> str:
    """Where and when."""
    every = [row for rows in found.values() for row in rows]
    where = sorted({f"{r['machine']['cores']} cores of {r['machine']['cpu']}" for r in every})
    days = sorted({row["date"] for row in every})
    torch = sorted({row["machine"]["torch"] for row in every})
    threads = sorted({str(row["machine"]["threads"]) for row in every})
    backend = sorted({f"FASTPPO_BACKEND={row['machine']['backend']}" for row in every})
    return (
        f"{', '.join(days)}, {' and '.join(where)}, torch {', '.join(torch)}, "
        f"threads of a run: {', '.join(threads)}, {', '.join(backend)}"
    )


def verdict(compared: Sequence[Found]) -> str:
    """How many runs of each estimator came near enough."""
    counts = []
    for name in runs.ESTIMATORS:
        own = of(compared, name=name)
        near = sum(row["share"] >= ENOUGH for row in own)
        counts.append(f"{name} in {near} of {len(own)} runs")
    seeds = len({row["seed"] for row in compared})
    few = " With one seed, who is ahead may be chance." if seeds == 1 else ""
    return f"Within 5% of (optimum - start) end {', '.join(counts)}.{few}"


def paragraph(*sentences: str) -> str:
    """Sentences as lines of the page."""
    return textwrap.fill(" ".join(sentences), 118, break_long_words=False, break_on_hyphens=False)


HEAD = """# Does it learn

```
make learn        # all but the tables of settings and learning rates; into output/learn
make learn-full   # all of it; what was cut off goes on where it was
```
"""
NOT_RUN = "This has not been run yet: a test walks through it with a random model only."


def markdown(found: dict[str, list[Found]]) -> str:
    """The page."""
    controlled = runs.CONTROLLED
    settings = ", ".join(f"`{k}: {v}`" for k, v in problems.PROBLEMS[problems.TASK][1].items())
    low, high = problems.QUALIFIES
    lines = [
        HEAD,
        paragraph(
            "Every run is fastppo's own loop (`init_state`, `step_update`) and leaves a JSON. The",
            f"numbers here are those in `benchmarks/results/learn`: {machines(found)}.",
            "`python -m benchmarks.learn --page` writes this page and its picture from them.",
        ),
        "",
        *(["![objective over samples](learning.png)", ""] if PICTURE.is_file() else []),
        "## Against the best policy there is",
        "",
        paragraph(
            "A language of four letters, a random Llama of one layer (LoRA on its linear layers),",
            "a prompt of one letter. There are so few responses that the best policy can be",
            "computed: at a fixed beta, J = E[reward] - beta KL is at most beta log Z with",
            "Z = E[exp(reward / beta)] over the reference's responses. J of the trained policy is",
            "computed in the same way, over all responses, so no number below has the noise of",
            f"sampling. beta is {runs.BETA:g}; a run is {runs.STEPS} steps of {runs.BATCH}",
            f"responses, {runs.STEPS * runs.BATCH:,} in all, the same for each estimator; GRPO and",
            f"RLOO have {runs.GROUP} responses to a prompt. The % of the way is",
            "(J - J at the start) / (optimum - J at the start). Reward and KL are means of seeds.",
        ),
        "",
        verdict(found["compare"]),
        *compare_lines(found["compare"]),
        "",
        "Responses until the mean of the seeds is that far:",
        "",
        *speed_lines(found["compare"]),
        "",
        paragraph(
            "The learning rate is the best of these, on a seed that is in no other table (% of the",
            "way); an estimator without runs here has PPO's:",
        ),
        "",
        *rates_lines(found["rates"]),
        "",
        "## The KL controller",
        "",
        paragraph(
            f"`alphabet` with `ppo_target: {controlled['ppo_target']:g}` (nats), from",
            f"`init_kl_coef: {controlled['init_kl_coef']}`, {controlled['max_steps']} steps of",
            f"{controlled['per_device_train_batch_size']} responses. KL is the mean over the last",
            f"{runs.WITHIN} steps.",
        ),
        "",
        *(
            controller_lines(found["controller"])
            if found["controller"]
            else ["Not run yet: `make learn` does."]
        ),
        "",
        "## Settings, one changed at a time",
        "",
        *(
            choices_lines(found["choices"], found["compare"])
            if found["choices"]
            else ["Not run yet: `make learn-full` does."]
        ),
        "",
        "## Problems that can be checked",
        "",
        paragraph(
            f"`{problems.TASK}` of reasoning-gym {problems.VERSION} ({settings}) with",
            "SmolLM2-135M-Instruct. The reward is 1 if the whole response is the answer,",
            f"{problems.FORMAT_SHARE} if it is another whole number, else 0; reasoning-gym's own",
            "score also pays for answers that are nearly right. Accuracy is exact match on",
            f"{problems.HELD_OUT} problems of another seed, with Wilson's 95% interval; by chance",
            "is an answer drawn from those of the training problems. A task qualifies if the",
            f"untrained model solves {low:.0%} to {high:.0%}.",
        ),
        "",
        *(problems_lines(found["problems"]) if found["problems"] else [NOT_RUN]),
    ]
    return "\n".join(lines) + "\n"


def draw(found: dict[str, list[Found]], path: Path) -> None:
    """Objective over samples of each task, and KL over steps of the controller's runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = [task for task in TASKS if of(found["compare"], task=task)]
    panels = len(tasks) + bool(found["controller"])
    figure, grid = pyplot.subplots(
        1, panels, figsize=(4.6 * panels, 3.8), squeeze=False, layout="constrained"
    )
    axes = list(grid[0])
    for axis, task in zip(axes, tasks, strict=False):
        of_task = of(found["compare"], task=task)
        for name in runs.ESTIMATORS:
            own = of(of_task, name=name)
            if not own:
                continue
            x = [point["samples"] for point in own[0]["curve"]]
            y = [[point["objective"] for point in row["curve"]] for row in own]
            (line,) = axis.plot(x, [statistics.mean(p) for p in zip(*y, strict=True)], label=name)
            low, high = ([f(p) for p in zip(*y, strict=True)] for f in (min, max))
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2)
        best = of_task[0]["optimum"]["objective"]
        axis.axhline(best, color="black", linewidth=1, linestyle="--", label="optimum")
        axis.set(title=f"{task}: J = reward - beta KL", xlabel="responses")
        axis.locator_params("x", nbins=5)
        axis.legend()
    for name in runs.CONTROLLERS:
        own = of(found["controller"], name=name)
        if not own:
            continue
        steps = range(1, len(own[0]["kl_by_step"]) + 1)
        middle = [statistics.mean(p) for p in zip(*(r["kl_by_step"] for r in own), strict=True)]
        axes[-1].plot(steps, middle, label=name, linewidth=1)
        axes[-1].axhline(own[0]["target"], color="black", linewidth=0.8, linestyle=":")
        axes[-1].set(title="KL under the controller (nats)", xlabel="step")
        axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def write() -> None:
    """Write page and picture."""
    found = read()
    draw(found, PICTURE)
    PAGE.write_text(markdown(found), encoding="utf-8")
