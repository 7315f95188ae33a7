"""The reward of GSM8K by verl's rule: the number after the last `####` has to be the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

ASK = 'Let\'s think step by step and output the final answer after "####".'
ANSWER = re.compile(r"#### (-?[0-9.,]+)")
END = 300  # verl looks at the last 300 characters alone


def final_answer(text: str) -> str | None:
    """The number after the last `####`, without thousands separators; None if there is none."""
    found = ANSWER.findall(text[-END:])
    return found[-1].replace(",", "") if found else None


def score(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """1 for the right answer, else 0; `answer` is the records' column."""
    return [float(final_answer(c) == a) for c, a in zip(completions, answer, strict=True)]
