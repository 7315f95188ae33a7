"""Numbers of pages that are counted, not measured."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "step.md"
HIDDEN, RESPONSES, NEW = 576, 8, 40


def products(rows: int, length: int, *, masked: bool) -> int:
    """Of a layer's forward: linear parts, and the pairs of tokens that attention computes."""
    tokens, width = rows * length, HIDDEN
    pairs = tokens * length if masked else tokens * length // 2
    return tokens * 12 * width**2 + 2 * width * pairs


def test_what_a_prompt_that_is_run_once_saves_is_as_counted():
    page = PAGE.read_text(encoding="utf-8")
    for prompt in (30, 512):
        length, joined = prompt + NEW, prompt + RESPONSES * NEW
        before = products(RESPONSES, length, masked=False)
        after = products(1, joined, masked=True)
        assert (
            f"| {prompt} tokens | {RESPONSES * length} tokens, {before / 1e9:.2f} G "
            f"| {joined} tokens, {after / 1e9:.2f} G | {after / before:.2f} |"
        ) in page
