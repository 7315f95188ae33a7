"""The HTML of a report: one file, readable on a phone, in light and dark."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from fastppo import __version__
from fastppo.ppo.columns import COLUMNS, WHAT_TO_LOOK_FOR
from fastppo.report import panels
from fastppo.report.audit import audit
from fastppo.report.charts import COLOURS, Line, chart
from fastppo.report.read import Run
from fastppo.report.style import STYLE

SAMPLES_SHOWN = 8
OUTCOMES = {"win": "better", "tie": "a tie", "loss": "worse"}
WORDS_RM = {
    "eval_loss": "mean of -log sigmoid(margin)",
    "eval_accuracy": "share of pairs with the better answer's score above the other's",
    "eval_margin": "mean score of the better answer minus the other's",
    "eval_calibration_error": "0 if, among pairs of one probability, that share is right",
}


def page(run: Run) -> str:
    """The whole HTML text of a run's report."""
    name = text(run.info.get("model") or run.folder.resolve().name)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{name}: fastppo {text(run.stage)}</title>",
        f"<style>{STYLE}</style></head><body><main>",
        *head(run, name),
        *section("Warnings", warnings(run)),
        *section("Audit", audited(run)),
        *section("Curves", curves(run)),
        *section(before_title(run), evaluation(run)),
        *section("Samples", samples(run)),
        *section("Memory", memory(run)),
        *section("Settings that are not at their default", settings(run)),
        *section("Notes", notes(run)),
        f"<footer>Written by fastppo {__version__}.</footer>",
        "</main></body></html>",
    ]
    return "\n".join(parts) + "\n"


def text(value: Any) -> str:
    """Any value as text that is safe in HTML."""
    return escape(str(value), quote=True)


def number(value: Any) -> str:
    """A number in four significant digits; anything else as it is."""
    if isinstance(value, float):
        return text(f"{value:.4g}")
    return text("-" if value is None else value)


def prose(sentence: str) -> str:
    """A sentence of Markdown: code in backticks, and links as their text alone."""
    plain = re.sub(r"\s*\(\[[^\]]*\]\([^)]*\)\)", "", sentence)
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", text(plain))


def section(title: str, body: Iterator[str]) -> list[str]:
    """A section with a heading; nothing if its body is empty."""
    inner = list(body)
    return [f"<section><h2>{text(title)}</h2>", *inner, "</section>"] if inner else []


def table(rows: Mapping[str, str], names: tuple[str, ...] = ()) -> Iterator[str]:
    """A table of two columns that scrolls sideways; the values are HTML already."""
    yield '<div class="scroll"><table>'
    if names:
        yield "<tr>" + "".join(f"<th>{text(name)}</th>" for name in names) + "</tr>"
    for name, value in rows.items():
        yield f"<tr><th>{text(name)}</th><td>{value}</td></tr>"
    yield "</table></div>"


def head(run: Run, name: str) -> Iterator[str]:
    """What ran, how it ended, and its three or four numbers."""
    info, ended = run.info, run.status
    kind = "good" if ended == "finished" else "plain" if ended == "running" else "bad"
    yield f'<header><p class="kicker">fastppo, stage {text(run.stage)}</p><h1>{name}</h1>'
    yield f'<p><span class="status {kind}">{text(ended)}</span> {text(progress_of(run))}</p>'
    yield '<div class="tiles">' + "".join(tiles(run)) + "</div></header>"
    facts = {
        "model": info.get("model"),
        "data": info.get("dataset"),
        "reward": ", ".join(map(str, info.get("rewards") or [])),
        "started": info.get("started"),
        "ended": info.get("ended_at"),
        "machine": info.get("machine"),
        "output_dir": run.folder,
    }
    versions = {"fastppo": info.get("fastppo"), "Python": info.get("python")}
    versions |= info.get("packages") or {}
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in versions.items() if v)
    yield from table({key: text(value) for key, value in facts.items() if value})


def progress_of(run: Run) -> str:
    """The steps done of all, with the time left of a run that goes on."""
    last = run.progress
    if not last:
        return ""
    done = f"{last.get('current_steps')} of {last.get('total_steps')} steps"
    took = f" in {last['elapsed_time']}" if last.get("elapsed_time") else ""
    left = f", {last.get('remaining_time')} left" if run.status == "running" else ""
    return done + took + left


def tiles(run: Run) -> Iterator[str]:
    """The numbers to look at first."""
    found: dict[str, Any] = {}
    if run.stage == "rm":
        names = {"eval_accuracy": "accuracy", "eval_loss": "loss", "eval_margin": "margin"}
        found = {label: run.evaluation.get(name) for name, label in names.items()}
    else:
        ours, theirs = (run.evaluation.get(f"eval_reward{end}") for end in ("", "_reference"))
        if ours is not None and theirs is not None:
            found["reward before"], found["reward after"] = theirs, ours
        found["win rate"] = run.evaluation.get("eval_win_rate")
        found["KL (nats)"] = run.evaluation.get("eval_kl")
        if not run.evaluation and run.rows:
            last = run.rows[-1]
            found = {"score, last step": last.get("score"), "KL (nats)": last.get("kl")}
    for label, value in found.items():
        if value is not None:
            yield f'<div class="tile"><b>{number(value)}</b><span>{text(label)}</span></div>'


def warnings(run: Run) -> Iterator[str]:
    """Each guard that fired: when first, how often, and its cure."""
    fired = {
        name: [row for row in run.rows if row.get(name)]
        for name in sorted({name for row in run.rows for name in row if name.startswith("guard_")})
    }
    fired = {name: rows for name, rows in fired.items() if rows}
    if not fired:
        if run.stage == "ppo" and run.rows:
            yield f"<p>No guard fired in {len(run.rows)} steps.</p>"
        return
    from fastppo.ppo.guards import GUARDS  # imports torch

    yield "<ul>"
    for name, rows in fired.items():
        line = GUARDS[name].line(name, rows[0]) if name in GUARDS else name
        steps = f"{len(rows)} step" + "s" * (len(rows) > 1)
        yield f"<li>step {rows[0]['step']:.0f} ({steps} in all): {text(line)}</li>"
    yield "</ul>"


def curves(run: Run) -> Iterator[str]:
    """A chart for each panel that has values, with what it should look like."""
    figures = []
    for panel in panels.RM if run.stage == "rm" else panels.PPO:
        lines = panels.lines(panel, run.rows)
        drawn = chart(panel.title, lines)
        if drawn:  # of a single point the legend has the number
            curve = drawn if is_curve(lines) else ""
            figures.append("".join(figure(panel, lines, curve)))
    for remark in run.remarks:
        yield f"<p>{text(remark)}</p>"
    if figures:
        yield '<div class="figures">'
        yield from figures
        yield "</div>"
    else:
        yield "<p>No step has been logged yet.</p>"


def is_curve(lines: Sequence[Line]) -> bool:
    """Whether a line has more than one point."""
    return any(len(line.x) > 1 for line in lines)


def figure(panel: panels.Panel, lines: list[Line], drawn: str) -> Iterator[str]:
    """A chart with its title, last values, the meaning of its columns and what to do."""
    yield f"<figure><figcaption>{text(panel.title)}</figcaption>{drawn}{legend(lines)}"
    meanings = [
        f"<code>{name}</code>: {text(COLUMNS[name])}"
        for name in panel.columns
        if name in COLUMNS and panel in panels.PPO  # stage rm has a learning_rate of its own
    ]
    advice = [prose(WHAT_TO_LOOK_FOR[name]) for name in panel.advice]
    if below := [*meanings, *advice]:
        items = "".join(f"<li>{line}</li>" for line in below)
        title = "what it means, what to look for"
        yield f"<details><summary>{title}</summary><ul>{items}</ul></details>"
    yield "</figure>"


def audited(run: Run) -> Iterator[str]:
    """Whether the policy exploits its reward: the verdict, and each sign in words and a picture."""
    if run.stage != "ppo" or not run.rows:
        return
    found = audit(run)
    kind = "bad" if found.exploited else "plain" if found.found else "good"
    yield f'<p class="status {kind}">{text(found.verdict)}</p><div class="figures">'
    for sign in found.signs:
        said = {True: "found", False: "not found", None: "not known"}[sign.found]
        status = "bad" if sign.found else "dim"
        yield f"<figure><figcaption>{text(sign.title)}: "
        yield f'<span class="{status}">{said}</span></figcaption>'
        if is_curve(sign.lines):
            yield chart(sign.title, sign.lines)
            yield legend(sign.lines)
        yield f"<p>{text(sign.words)}</p></figure>"
    yield "</div>"


def legend(lines: Sequence[Line]) -> str:
    """The lines of a chart with their colours and last values."""
    entries = [
        f'<span><i class="c{i % COLOURS}"></i>{text(line.label)} '
        f"<b>{number(float(line.y[-1]))}</b></span>"
        for i, line in enumerate(lines)
    ]
    return f'<p class="legend">{"".join(entries)}</p>'


def before_title(run: Run) -> str:
    """The title of the evaluation's section."""
    return "Evaluation" if run.stage == "rm" else "Before and after"


def evaluation(run: Run) -> Iterator[str]:
    """The evaluation; of a policy beside its reference, which it was before training."""
    found = run.evaluation
    if run.stage == "rm":
        rows = {
            name: number(value)
            + (f' <span class="dim">{text(WORDS_RM[name])}</span>' if name in WORDS_RM else "")
            for name, value in found.items()
            if name.startswith("eval_")
        }
        if rows:
            yield from table(rows)
        return
    pairs = [name for name in found if f"{name}_reference" in found]
    if pairs:
        yield '<div class="scroll"><table><tr><th></th><th>before</th><th>after</th></tr>'
        for name in pairs:
            yield (
                f"<tr><th>{text(name.removeprefix('eval_'))}</th>"
                f"<td>{number(found[f'{name}_reference'])}</td><td>{number(found[name])}</td></tr>"
            )
        yield "</table></div>"
    rest = {
        name.removeprefix("eval_"): number(value)
        for name, value in found.items()
        if name.startswith("eval_") and name not in pairs and not name.endswith("_reference")
    }
    if rest:
        yield from table(rest)


def samples(run: Run) -> Iterator[str]:
    """The first responses of the policy and of its reference, with their scores."""
    shown = run.samples[:SAMPLES_SHOWN]
    if not shown:
        return
    yield (
        f"<p>{len(shown)} of {len(run.samples)} prompts; both responses have the same random "
        "numbers and the same reward.</p>"
    )
    for row in shown:
        outcome = OUTCOMES.get(str(row.get("outcome")), "")
        yield f'<article><p class="prompt">{text(row.get("prompt", ""))}</p><div class="pair">'
        for label, name in (("before", "reference"), ("after", "policy")):
            score = number(row.get(f"reward_{name}"))
            said = f" ({outcome})" if label == "after" and outcome else ""
            yield (
                f"<div><p class='dim'>{label}, score <b>{score}</b>{said}</p>"
                f"<pre>{text(row.get(name, ''))}</pre></div>"
            )
        yield "</div></article>"


def memory(run: Run) -> Iterator[str]:
    """The memory plan, and what the first step took."""
    if run.info.get("memory"):
        yield f"<p>{text(run.info['memory'])}</p>"
    plan = run.info.get("plan")
    if isinstance(plan, list) and plan:
        yield f'<pre class="scroll">{text(chr(10).join(map(str, plan)))}</pre>'


def settings(run: Run) -> Iterator[str]:
    """The keys that were set to another value than their default."""
    found = run.info.get("settings")
    if isinstance(found, dict) and found:
        yield from table({name: f"<code>{text(value)}</code>" for name, value in found.items()})


def notes(run: Run) -> Iterator[str]:
    """What the run printed as notes when it started."""
    found = run.info.get("notes")
    if isinstance(found, list) and found:
        yield "<ul>" + "".join(f"<li>{text(line)}</li>" for line in found) + "</ul>"
