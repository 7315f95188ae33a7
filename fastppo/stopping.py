"""SIGTERM and Ctrl-C: noted at once, obeyed at the next point where a run can be saved."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from fastppo.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Inside `with`, the first signal is kept for `check`; a second one acts as it always does."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            # A shell's background job is started with Ctrl-C ignored, and goes on ignoring it.
            heard = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
            self.before = {number: signal.signal(number, self.note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def restore(self) -> None:
        """The handlers that were there before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: remember it, and say so without any lock that print would take."""
        del frame
        self.signal = number
        self.restore()
        name = signal.Signals(number).name
        os.write(2, f"fastppo-train: {name}: saves and stops soon; again stops at once\n".encode())

    def check(self) -> None:
        """A safe point: weights and optimiser are as the last step left them.

        Raises:
            Interrupted: a signal came since the run began.
        """
        if self.signal is not None:
            raise Interrupted(self.signal)
