"""Experiment trackers by `report_to`, through accelerate's classes for them."""

from __future__ import annotations

import json
import os
import secrets
import string
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from fastppo.errors import UserError, one_line
from fastppo.run.console import console
from fastppo.run.durable import NUMBERED, RUN
from fastppo.run.launch import hide_launcher_variables

if TYPE_CHECKING:
    from fastppo.config import Config

PROJECT = "fastppo"
TABLE = "eval/samples"
SAMPLE_COLUMNS = ("prompt", "policy", "reward_policy", "reference", "reward_reference", "outcome")
SAMPLES_SENT = 32


class Trackers:
    """All trackers of a run, as one.

    accelerate's classes without its Accelerator: that one's state is shared by every Accelerator of
    a process, and stage rm's loop has its own.
    """

    def __init__(
        self, config: Config, runs: Mapping[str, str] | None = None, step: int = 0
    ) -> None:
        """Start every tracker of `report_to` and give it the configuration.

        Args:
            config: the run's.
            runs: tracker -> what it calls the run that goes on (`self.runs` of the one before).
            step: the last step that is kept of that run; TensorBoard drops what it has after it.

        Raises:
            UserError: a tracker does not start, for want of a login for example.
        """
        project = config.project or os.environ.get("WANDB_PROJECT") or PROJECT
        folder = Path(config.logging_dir or Path(config.output_dir) / "runs")
        self.trackers, self.runs = [], dict[str, str]()
        self.without_tables = set[str]()  # trackers whose table failed
        if config.trackers:
            with hide_launcher_variables():
                # accelerate's classes log, and its logger asks for it.
                PartialState(cpu=config.use_cpu)
        for name in config.trackers:
            make, run = LOGGER_TYPE_TO_CLASS[name], (runs or {}).get(name)
            shown = config.run_name or config.output_dir
            try:
                if make.requires_logging_directory:
                    drop = {} if run is None else {"purge_step": step + 1}
                    run = run or config.run_name or time.strftime("%Y%m%d-%H%M%S")
                    tracker = make(run, str(folder), **drop)
                elif name == "wandb":
                    run = run or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
                    tracker = make(project, name=shown, id=run, resume="allow")
                elif name == "swanlab":
                    run = run or swanlab_id()
                    tracker = make(config.swanlab_project or project, **swanlab_run(config, run))
                else:  # trackio knows a run by its name
                    goes_on = {} if run is None else {"resume": "allow"}
                    tracker = make(project, name=run or shown, **goes_on)
                if hasattr(tracker, "start"):  # earlier releases start as they are made
                    tracker.start()
                # trackio gives a name that is taken already a number.
                given = getattr(getattr(tracker, "run", None), "name", None)
                self.runs[name] = run or (given if isinstance(given, str) else shown)
                tracker.store_init_configuration(settings(config))
            except Exception as error:  # whatever a tracker and its network raise
                raise UserError(
                    f"report_to: {name} does not start ({type(error).__name__}: {error}); mend "
                    "that, or leave it out"
                ) from None
            self.trackers.append(tracker)

    @classmethod
    def of(cls, config: Config, resumed: Path | None = None) -> Trackers | None:
        """The trackers of a run; None if `report_to` names none.

        A run that resumes from the checkpoint `resumed` (or starts again in the folder of a run
        that was killed before its first checkpoint) continues the trackers' own runs.
        """
        if not config.trackers:
            return None
        if not config.resume_from_checkpoint:
            return cls(config)
        numbered = None if resumed is None else NUMBERED.fullmatch(resumed.name)
        step = int(numbered[1]) if numbered else 0
        return cls(config, earlier_runs(resumed or Path(config.output_dir)), step)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send the metrics of a step to all trackers."""
        numbers = {
            name: value
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for name, tracker in zip(self.runs, self.trackers, strict=True):
            # trackio keeps the name for its own and warns at every step.
            without = {"step"} if name == "trackio" else set()
            tracker.log({k: x for k, x in numbers.items() if k not in without}, step=step)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Send the evaluation's first responses to all trackers, as a table (TensorBoard: as text).

        A tracker that takes no table is named on the terminal, and the run continues.
        """
        data = [[row.get(name, "") for name in SAMPLE_COLUMNS] for row in rows[:SAMPLES_SENT]]
        for name, tracker in zip(self.runs, self.trackers, strict=True):
            if name in self.without_tables:
                continue
            try:
                send_table(name, tracker, data, step)
            except Exception as error:  # whatever a tracker and its network raise
                self.without_tables.add(name)
                reason = one_line(f"{type(error).__name__}: {error}")
                console.print(
                    f"note: report_to: {name} gets no table of samples ({reason})", markup=False
                )

    def close(self) -> None:
        """Finish all trackers, which write what they have buffered."""
        for tracker in self.trackers:
            tracker.finish()


def swanlab_id() -> str:
    """A new id for a run: SwanLab's earlier releases take 21 letters and digits, no fewer."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(21))


def swanlab_run(config: Config, run: str) -> dict[str, Any]:
    """The arguments of SwanLab's `init` for the run of this id, which goes on if it is there."""
    found: dict[str, Any] = {
        "name": config.swanlab_run_name or config.run_name or config.output_dir,
        "workspace": config.swanlab_workspace,
        "logdir": config.swanlab_logdir,
        # Runs that stay on this machine have no id, and none goes on.
        **({"mode": "local"} if config.swanlab_mode == "local" else {"id": run, "resume": "allow"}),
    }
    return {name: value for name, value in found.items() if value is not None}


def send_table(name: str, tracker: Any, data: list[list[Any]], step: int) -> None:
    """Send rows of SAMPLE_COLUMNS as the table eval/samples, as the tracker `name` takes one."""
    if name == "wandb":
        tracker.log_table(TABLE, columns=[*SAMPLE_COLUMNS], data=data, step=step)
    elif name == "trackio":
        import pandas
        import trackio

        frame = pandas.DataFrame(data, columns=[*SAMPLE_COLUMNS])
        tracker.log({TABLE: trackio.Table(dataframe=frame)}, step=step)
    elif name == "swanlab":
        import swanlab

        tracker.log({TABLE: swanlab.Text(markdown_table(data))}, step=step)
    else:
        tracker.log({TABLE: markdown_table(data)}, step=step)


def markdown_table(data: Sequence[Sequence[Any]]) -> str:
    """Rows of SAMPLE_COLUMNS as a table in Markdown, which TensorBoard's text tab draws."""

    def cell(value: Any) -> str:
        shown = f"{value:+.3f}" if isinstance(value, float) else " ".join(str(value).split())
        return escape(shown, quote=False).replace("|", "&#124;")

    lines = [
        SAMPLE_COLUMNS,
        ["---"] * len(SAMPLE_COLUMNS),
        *([cell(x) for x in row] for row in data),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def earlier_runs(folder: Path) -> dict[str, str]:
    """Read the run ids by tracker from a run's folder; empty if it has none."""
    try:
        runs = json.loads((folder / RUN).read_text(encoding="utf-8"))["trackers"]
        return {str(name): str(run) for name, run in runs.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def settings(config: Config) -> dict[str, bool | str | float | int]:
    """The configuration in types that every tracker takes, without what is secret."""
    plain = config.model_dump(exclude={"hf_hub_token", "swanlab_api_key"})
    return {
        name: value if isinstance(value, bool | str | float | int) else str(value)
        for name, value in plain.items()
    }
