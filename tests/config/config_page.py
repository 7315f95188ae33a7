"""docs/config.md, made from the code:  python tests/config/config_page.py > docs/config.md"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

from fastppo.config import Config
from fastppo.config.elsewhere import IGNORED, NOT_HERE, OLD_NAMES, REFUSED
from fastppo.config.engine import TRL_IMPORTANCE
from fastppo.config.old_names import RENAMED
from fastppo.config.ppo import ALIASES, ELSEWHERE
from fastppo.config.schema import FIRST, GROUPS
from fastppo.run.commandline import WIDTH

INTRODUCTION = """# Keys

A run is described by one YAML (or JSON) file with LLaMA-Factory's keys. Settings that
LLaMA-Factory does not have are named as in TRL 0.9.6, or as in the trainer that introduced them;
the remaining ones are fastppo's own. Any key can be overridden on the command line as
`key=value`. A key that is not on this page is an error that suggests the nearest one;
`ALLOW_EXTRA_ARGS=1` ignores it. Relative paths are relative to the working directory. *needed*
marks keys without a default.
"""


def value(default: object) -> str:
    """A default as YAML would have it."""
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[default] if default is None or isinstance(default, bool) else default}`"


def keys_in_help() -> str:
    """The keys that most runs set as `fastppo-train --help` has them: cli.KEYS."""
    text = "keys that most runs set:\n"
    for name in FIRST:
        field = Config.model_fields[name]
        default = "" if field.is_required() else f" {value(field.default).strip('`')}"
        # The first clause: the page has the rest.
        meaning = re.split(r"; |\. | \(", (field.description or "").removesuffix("."))[0]
        lines = textwrap.wrap(meaning, WIDTH - 33)
        text += f"  {name + ':' + default:30} {lines[0]}\n"
        text += "".join(f"{'':33}{line}\n" for line in lines[1:])
    return text


def table(title: str, names: Iterable[str]) -> str:
    """A heading, and a row a key."""
    text = f"\n## {title}\n\n| key | default | from | meaning |\n|---|---|---|---|\n"
    for name in names:
        field = Config.model_fields[name]
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        default = "*needed*" if field.is_required() else value(field.default)
        meaning = (field.description or "").replace("|", "\\|")
        text += f"| `{name}` | {default} | {extra['owner']} | {meaning} |\n"
    return text


def page() -> str:
    """The whole page."""
    text = INTRODUCTION + table("The dozen that matter", FIRST)
    for group in GROUPS:
        text += table(group.title, group.model_fields)
    text += "\n## Names in other trainers\n\n| name there | key here |\n|---|---|\n"
    every = {**ALIASES, **OLD_NAMES, **RENAMED, **TRL_IMPORTANCE, **ELSEWHERE}
    for name, ours in sorted(every.items()):
        also = "" if name in ELSEWHERE else "; accepted"
        also = "; accepted, the opposite" if name == "resume_lora_training" else also
        text += f"| `{name}` | {ours}{also} |\n"
    text += "\n## Accepted keys without effect\n\n| key | because |\n|---|---|\n"
    text += "".join(f"| `{name}` | {why} |\n" for name, why in IGNORED.items())
    text += (
        "\n## Refused keys\n\n| key | unless its value is | what to do instead |\n|---|---|---|\n"
    )
    for name, (harmless, cure) in REFUSED.items():
        allowed = ", ".join(value(x) for x in harmless)
        text += f"| `{name}` | {allowed} | {cure} |\n"
    for (name, wrong), cure in NOT_HERE.items():
        text += f"| `{name}: {wrong}` | | {cure} |\n"
    return text


if __name__ == "__main__":
    print(page(), end="")
