"""Experiment trackers by `report_to`, through accelerate's classes for them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from fastppo.errors import UserError

if TYPE_CHECKING:
    from fastppo.config import Config

PROJECT = "fastppo"


class Trackers:
    """All trackers of a run, as one.

    accelerate's classes without its Accelerator: that one's state is shared by every Accelerator of
    a process, and stage rm's loop has its own.
    """

    def __init__(self, config: Config) -> None:
        """Start every tracker of `report_to` and give it the configuration.

        Raises:
            UserError: a tracker does not start, for want of a login for example.
        """
        project = config.project or os.environ.get("WANDB_PROJECT") or PROJECT
        folder = Path(config.logging_dir or Path(config.output_dir) / "runs")
        self.trackers = []
        for name in config.trackers:
            make = LOGGER_TYPE_TO_CLASS[name]
            try:
                if make.requires_logging_directory:
                    run = config.run_name or time.strftime("%Y%m%d-%H%M%S")
                    tracker = make(run, str(folder))
                else:
                    tracker = make(project, name=config.run_name or config.output_dir)
                if hasattr(tracker, "start"):  # earlier releases start as they are made
                    tracker.start()
                tracker.store_init_configuration(settings(config))
            except Exception as error:  # whatever a tracker and its network raise
                raise UserError(
                    f"report_to: {name} does not start ({type(error).__name__}: {error}); mend "
                    "that, or leave it out"
                ) from None
            self.trackers.append(tracker)

    @classmethod
    def of(cls, config: Config) -> Trackers | None:
        """The trackers of a run; None where there is nothing to report to."""
        return cls(config) if config.trackers else None

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Numbers of a step, to all of them."""
        numbers = {
            name: value
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for tracker in self.trackers:
            tracker.log(numbers, step=step)

    def close(self) -> None:
        """Write what is still to be written."""
        for tracker in self.trackers:
            tracker.finish()


def settings(config: Config) -> dict[str, bool | str | float | int]:
    """The configuration in types that every tracker takes, without what is secret."""
    plain = config.model_dump(exclude={"hf_hub_token"})
    return {
        name: value if isinstance(value, bool | str | float | int) else str(value)
        for name, value in plain.items()
    }
