"""The live view of a run on a terminal: progress, small curves, a sample, the last warnings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.text import Text

from fastppo.errors import one_line
from fastppo.run import console as terminal

if TYPE_CHECKING:
    from fastppo.config import Config

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 48  # characters of a sparkline at most
WARNINGS_SHOWN = 2


def sparkline(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """Values as a line of blocks from the lowest to the highest, at most `width` characters.

    More values than characters are averaged; a value that is not finite is a blank.
    """
    if len(values) > width:
        ends = [round(i * len(values) / width) for i in range(width + 1)]
        parts = [values[a:b] for a, b in pairwise(ends)]
        values = [sum(part) / len(part) for part in parts]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low, span = min(finite), max(finite) - min(finite)
    top = len(BLOCKS) - 1
    return "".join(
        " "
        if not math.isfinite(value)
        else BLOCKS[round((value - low) / span * top) if span else 0]
        for value in values
    )


class LiveView(Progress):
    """rich's progress bar with lines below it; what is printed meanwhile appears above.

    Attributes:
        curves: name -> the values so far, a step each.
        sample: prompt, response and score of a response of the last step, or None.
        warnings: lines of guards; the last WARNINGS_SHOWN are shown.
    """

    def __init__(self, config: Config, steps: int, done: int) -> None:
        self.curves: dict[str, Sequence[float]] = {}
        self.sample: tuple[str, str, float] | None = None
        self.warnings: list[str] = []
        super().__init__(
            "[progress.description]{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=terminal.console,
            refresh_per_second=2,
            speed_estimate_period=3600,  # steps may take minutes
            disable=not is_shown(config),
        )
        self.add_task(f"stage {config.stage}", total=steps, completed=done)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, the curves, the sample and the warnings, a line each."""
        yield from super().get_renderables()
        width = max(20, terminal.console.width - 1)
        for name, values in list(self.curves.items()):
            if values:
                curve = sparkline(list(values), min(CURVE_WIDTH, width - 20))
                yield fitting(f"{name:>9} {curve} {values[-1]:.3f}", width, "cyan")
        if self.sample is not None:
            prompt, response, score = self.sample
            yield fitting(f"   prompt {one_line(prompt)}", width, "dim")
            yield fitting(f"   sample {score:+.3f} {one_line(response)}", width)
        for line in self.warnings[-WARNINGS_SHOWN:]:
            yield fitting(f"  warning {line}", width, "yellow")


def is_shown(config: Config) -> bool:
    """Whether the view is drawn: on a terminal unless `disable_tqdm: true`; with false always."""
    if terminal.console.quiet:
        return False
    if config.disable_tqdm is not None:
        return not config.disable_tqdm
    return terminal.console.is_terminal and not terminal.console.is_dumb_terminal


def fitting(line: str, width: int, style: str = "") -> Text:
    """One line of at most `width` columns, without markup."""
    text = Text(line, style=style, no_wrap=True, overflow="ellipsis")
    text.truncate(width, overflow="ellipsis")
    return text
