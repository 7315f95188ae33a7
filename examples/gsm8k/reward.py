"""GSM8K's reward: 1 if the number after the last `####` is the answer, else 0; verl's rule.

Only the last 300 characters are searched, as there. A right number without `####` earns nothing:
the format is a part of the task.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

TAIL = 300  # characters of a response that are searched
ANSWER = re.compile(r"#### (-?[0-9.,]+)")


def last_answer(text: str) -> str | None:
    """The number after the last `####` of a text, without its commas; None if there is none."""
    found = ANSWER.findall(text[-TAIL:])
    return found[-1].replace(",", "") if found else None


def exact(completions: Sequence[str], answer: Sequence[str], **_: object) -> list[float]:
    """1 for each response whose number is the `answer` of its record, else 0."""
    pairs = zip(completions, answer, strict=True)
    return [float(last_answer(text) == right) for text, right in pairs]
