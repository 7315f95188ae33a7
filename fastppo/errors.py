"""What the program says when it cannot go on, or goes on with less than it was given."""

from __future__ import annotations

import sys

LONGEST = 1000  # characters of a message; past that its middle is left out


class UserError(Exception):
    """Something the user can mend: one line that names the thing and the cure. Exit code 2."""


class TrainingStopped(Exception):
    """A run that would only learn nonsense from here on: one line, and the likeliest cause.

    Exit code 1: the input was fine, the run was not.
    """


class Interrupted(BaseException):
    """A signal asked the run to stop, and it has saved what it could. Exit code 128 + signal.

    Like KeyboardInterrupt no Exception: code that catches failures lets it through.
    """

    def __init__(self, signal: int, saved: str = "nothing was saved") -> None:
        super().__init__(saved)
        self.signal = signal


def one_line(message: object) -> str:
    """A message as one line of text, whatever it quotes: no escape sequence, no book."""
    text = " ".join(str(message).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LONGEST else f"{text[:600]} ... {text[-300:]}"


def note(text: str) -> None:
    """One line on stderr: something was left out, and the run goes on."""
    print(f"fastppo-train: note: {one_line(text)}", file=sys.stderr)
