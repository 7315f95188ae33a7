"""SIGTERM and Ctrl-C: a step that can be discarded ends at once; other work is finished first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fastppo.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Inside `with`, the first signal ends an `at_once` block; a second signal acts as usual.

    Work outside `at_once` (writing a checkpoint, adding a step to the metrics) is finished first.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.raises = False
        self.active = False  # whether the first signal is, or was, handled here
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            # A shell's background job is started with Ctrl-C ignored, and goes on ignoring it.
            heard = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
            self.before = {number: signal.signal(number, self.note) for number in heard}
            self.active = True
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
        self.active = False

    @property
    def listens(self) -> bool:
        """Whether the handlers are installed."""
        return bool(self.before)

    def restore(self) -> None:
        """Restore the handlers that were installed before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: remember it, and print a line without a lock (which print would need).

        Raises:
            Interrupted: inside `at_once`, from any code that runs there: a forward, a blocked
                socket, a sleep. It is no Exception, so that reward functions do not catch it.
        """
        del frame
        self.signal = number
        self.restore()
        name = signal.Signals(number).name
        os.write(2, f"fastppo-train: {name}: saves and stops soon; again stops at once\n".encode())
        if self.raises:
            self.check()

    def check(self) -> None:
        """Raise Interrupted if there was a signal; called where it is safe to stop.

        Raises:
            Interrupted: a signal came since the run began.
        """
        if self.signal is not None:
            raise Interrupted(self.signal)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside the block a signal raises Interrupted at any point; the caller restores the state.

        The block also checks at its beginning and end for a signal that came before, or whose
        exception was lost (in a destructor, or in a function that catches everything).
        """
        outer, self.raises = self.raises, True
        try:
            self.check()
            yield
            self.check()
        finally:
            self.raises = outer
