"""The tables of docs/migrate-trl.md:  python -m tests.trainer.migrate_page > FILE

The page's text stands in the page itself; FILE then replaces it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastppo.config import Config
from fastppo.config.elsewhere import IGNORED
from fastppo.config.elsewhere import REFUSED as NOT_SUPPORTED
from fastppo.trainer.arguments import HERE, INHERITED, class_of
from fastppo.trainer.names import ARGUMENTS, COMPUTED, HARMLESS, REFUSED, RENAMED, SAME, TrlName

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migrate-trl.md"
TABLES = "\n## TRL's names, one by one\n"  # what follows this heading is made
METRICS = """
## Metrics

| TRL 0.12 to 1.12 | TRL 0.9.6 | here ([metrics.md](metrics.md)) |
|---|---|---|
| `objective/scores` | `ppo/mean_scores` | `score`, `reward` |
| `objective/kl` | `objective/kl` | `kl` |
| | `objective/kl_coef` | `kl_coef` |
| `policy/entropy_avg` | `objective/entropy` | `entropy` |
| `policy/clipfrac_avg` | `ppo/policy/clipfrac` | `clipfrac` |
| `policy/approxkl_avg` | `ppo/policy/approxkl` | `approxkl` |
| `loss/policy_avg` | `ppo/loss/policy` | `policy_loss` |
| `loss/value_avg` | `ppo/loss/value` | `value_loss` |
| `val/clipfrac_avg` | `ppo/val/clipfrac` | `value_clipfrac` |
| `val/ratio` | `ppo/policy/ratio` | `ratio_mean` |
| `lr` | `ppo/learning_rate` | `learning_rate` |
| | `ppo/val/var_explained` | `explained_variance` |
| | `tokens/responses_len_mean` | `response_length` |
"""


def value(default: Any) -> str:
    """A default as the page has it."""
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[default] if default is None or isinstance(default, bool) else default}`"


def default_here(key: str) -> str:
    """The default of a key; empty for what is no key."""
    field = Config.model_fields.get(key)
    return "" if field is None else value(field.default)


def names() -> str:
    """The tables of TRL's names."""
    text = f"""{TABLES}
Names that are the same here:

| name | TRL | default there | default here |
|---|---|---|---|
"""
    for name, (versions, default) in SAME.items():
        by_plan = name == "gradient_checkpointing"
        here = "by the memory plan" if by_plan else default_here(name)
        text += f"| `{name}` | {versions} | {value(default)} | {here} |\n"
    text += """
Names that became others:

| name | TRL | default there | here | default here | what differs |
|---|---|---|---|---|---|
"""
    for name, entry in {**RENAMED, **COMPUTED, **ARGUMENTS}.items():
        text += row(name, entry)
    text += """
Names that do nothing here:

| name | TRL | why |
|---|---|---|
"""
    for name, entry in HARMLESS.items():
        text += f"| `{name}` | {entry.versions} | {entry.here} |\n"
    text += """
Names that are refused unless they are empty:

| name | TRL | instead |
|---|---|---|
"""
    for name, entry in REFUSED.items():
        text += f"| `{name}` | {entry.versions} | {entry.here} |\n"
    return text


def row(name: str, entry: TrlName) -> str:
    """A row of the table of names that became others."""
    default = "" if entry.default is None else value(entry.default)
    return (
        f"| `{name}` | {entry.versions} | {default} | `{entry.here}` | "
        f"{default_here(entry.here)} | {entry.does} |\n"
    )


def training_arguments() -> str:
    """The tables of the fields of transformers' TrainingArguments."""
    by_class: dict[str, list[str]] = {"mapped": [], "harmless": [], "refused": []}
    for name in sorted(INHERITED):
        by_class[str(class_of(name))].append(name)
    mapped = ", ".join(f"`{name}`" for name in by_class["mapped"])
    text = f"""
## TrainingArguments, one by one

Used, with their meaning in transformers: {mapped}.

Refused, as they would change a run:

| field | instead |
|---|---|
"""
    for name in by_class["refused"]:
        text += f"| `{name}` | {NOT_SUPPORTED[name][1]} |\n"
    text += "\nWithout effect; a run says so where one is set:\n\n| field | why |\n|---|---|\n"
    for name in by_class["harmless"]:
        why = HERE[name][1] if name in HERE else IGNORED[name]
        text += f"| `{name}` | {why} |\n"
    return text


def page() -> str:
    """The whole page."""
    words = PAGE.read_text(encoding="utf-8").partition(TABLES)[0]
    return words + names() + training_arguments() + METRICS


if __name__ == "__main__":
    print(page(), end="")
