"""Exceptions that end a run with one line and an exit code, and notes on stderr."""

from __future__ import annotations

import os
import sys

LONGEST = 1000  # characters of a message; the middle of a longer one is left out


class UserError(Exception):
    """An error that the user can correct: one line that names cause and cure. Exit code 2."""

    told = False  # whether another process of the run has printed it


class TrainingStopped(Exception):
    """The run cannot usefully continue: one line that names the likeliest cause.

    Exit code 1: the input was valid, but the run failed.
    """

    told = False  # whether another process of the run has printed it


class Interrupted(BaseException):
    """A signal asked the run to stop, and the run has saved its state. Exit code 128 + signal.

    Like KeyboardInterrupt this is no Exception, so code that catches failures does not catch it.
    """

    def __init__(self, signal: int, saved: str = "nothing was saved") -> None:
        super().__init__(saved)
        self.signal = signal


def one_line(message: object) -> str:
    """A message as one line, without control characters, shortened to LONGEST characters."""
    text = " ".join(str(message).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LONGEST else f"{text[:600]} ... {text[-300:]}"


def note(text: str, *, every_process: bool = False) -> None:
    """Print one line on stderr: something was ignored or dropped, and the run continues.

    Of several processes (torchrun sets RANK) the first alone prints it, unless `every_process`.
    """
    if not every_process and os.environ.get("RANK", "0").strip() not in ("", "0"):
        return
    print(f"fastppo-train: note: {one_line(text)}", file=sys.stderr)
