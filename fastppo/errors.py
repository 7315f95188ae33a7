"""What the program says when it cannot go on, or goes on with less than it was given."""

from __future__ import annotations

import sys


class UserError(Exception):
    """Something the user can mend: one line that names the thing and the cure. Exit code 2."""


class TrainingStopped(Exception):
    """A run that would only learn nonsense from here on: one line, and the likeliest cause.

    Exit code 1: the input was fine, the run was not.
    """


def note(text: str) -> None:
    """One line on stderr: something was left out, and the run goes on."""
    print(f"fastppo-train: note: {' '.join(text.split())}", file=sys.stderr)
