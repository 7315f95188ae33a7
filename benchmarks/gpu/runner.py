"""Run sections as child processes, each under its time limit; one that fails costs no other.

A child appends a line of JSON for every row to a file; when it ends, or is cut off, the rows that
are there become the section's JSON, with a state that says which of the two it was.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.sections import HIDDEN, HIDDEN_WITHOUT_TRAINER, ROOT, TOTAL, Section

# The state of a section's JSON. Only the first is one that --skip-done leaves out.
DONE, FAILED, CUT_OFF, NOT_RUN = "done", "failed", "cut off", "not run"
INTERRUPTED = "interrupted"
# With less time than this left a section is not begun: its process would only just have started.
LEAST = 5.0
POLL = 0.05


@dataclass
class Options:
    """What was asked for on the command line.

    Args:
        out: folder of the JSON files.
        rehearse: toy sizes on the CPU.
        site: folder of unpacked wheels that the trainer's sections import from.
        tokens: length of a sequence in the trainer's section; None is its default.
        limit: seconds for every section in place of its own; None leaves them.
        warm_up: names of the sections whose kernels are compiled in the background.
        faults: section -> "fail" or "hang", to show that others keep their results.
        module: what a child runs; tests have one of their own.
    """

    out: Path
    rehearse: bool = False
    site: Path | None = None
    tokens: int | None = None
    limit: float | None = None
    warm_up: Sequence[str] = ()
    faults: dict[str, str] = field(default_factory=dict)
    module: str = "benchmarks.gpu.child"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file under another name and rename it, so that there is never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a child; a line that was cut off with the process is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def read_results(out: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The JSON of every section that has one."""
    paths = {name: out / f"{name}.json" for name in names}
    return {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.exists()
    }


def unpack(wheels: Path, folder: Path) -> None:
    """Unpack the wheels of a folder, so that their packages can be imported from another.

    Raises:
        ValueError: the folder has no wheel, or one for another Python.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise ValueError(f"--wheels {wheels}: there is no wheel in it")
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for wheel in found:
        tag, abi, _ = wheel.stem.split("-")[-3:]
        if tag.startswith("cp") and abi != "abi3" and own not in tag.split("."):
            raise ValueError(f"--wheels: {wheel.name} is for {tag}, and this Python is {own}")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


class Child:
    """A process of a section, and the files that it writes."""

    def __init__(
        self,
        section: Section,
        part: str,
        options: Options,
        scratch: Path,
        threads: int | None = None,
    ) -> None:
        kind = f"{section.name}-{part.replace('/', '-')}"
        self.rows, self.log = scratch / f"{kind}.jsonl", scratch / f"{kind}.log"
        installed = section.trainer and options.site is None  # else from the wheels alone
        hidden = HIDDEN if installed else HIDDEN_WITHOUT_TRAINER
        command = [sys.executable, "-m", options.module, section.name, "--part", part]
        command += ["--rows", str(self.rows)] if part != "warm" else []
        command += ["--rehearse", "--hide", *hidden] if options.rehearse else []
        command += ["--tokens", str(options.tokens)] if options.tokens else []
        if section.trainer and options.site is not None:
            command += ["--site", str(options.site)]
        if part != "warm" and section.name in options.faults:
            command += ["--fault", options.faults[section.name]]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        if options.rehearse:
            environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
            environment |= {"CUDA_VISIBLE_DEVICES": "", "FASTPPO_REHEARSE": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        """Kill the process and those that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def last_line(self) -> str:
        """The last line of its output: of a traceback, the error."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1][:300] if lines else "no output"


def wait(children: Sequence[Child], deadline: float) -> bool:
    """Wait until all have ended; False if the deadline came first. None of them is left."""
    try:
        while any(child.process.poll() is None for child in children):
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL)
        return True
    finally:
        for child in children:
            child.stop()


def run_section(
    section: Section, options: Options, scratch: Path, deadline: float
) -> dict[str, Any]:
    """Run a section until it ends or its time is up; returns its JSON."""
    began = time.monotonic()
    limit = min(options.limit or section.limit, deadline - began)
    cores = os.cpu_count() or 1
    count = 1 if options.rehearse else min(section.processes, cores)
    threads = cores // count if count > 1 else None  # of PyTorch in each
    parts = [f"{i + 1}/{count}" for i in range(count)]
    children = [Child(section, part, options, scratch, threads) for part in parts]
    ended = interrupted = False
    try:
        ended = wait(children, began + limit)
    except KeyboardInterrupt:
        interrupted = True
    failed = [child for child in children if child.process.returncode != 0]
    if interrupted:
        state, note = CUT_OFF, INTERRUPTED
    elif not ended:
        state, note = CUT_OFF, f"cut off at its limit of {limit:.0f} s"
    elif failed:
        state, note = FAILED, failed[0].last_line()
    else:
        state, note = DONE, ""
    lines = [line for child in children for line in read_lines(child.rows)]
    machines = [line["machine"] for line in lines if "machine" in line]
    return {
        "section": section.name,
        "state": state,
        "note": note,
        "rehearsal": options.rehearse,
        "date": time.strftime("%Y-%m-%d"),
        "command": command_of(section, options),
        "seconds": round(time.monotonic() - began, 1),
        "limit": round(limit, 1),
        "machine": machines[0] if machines else {},
        "rows": [line for line in lines if "machine" not in line],
    }


def command_of(section: Section, options: Options) -> str:
    """The command that runs a section again."""
    flags = [f"--only {section.name}"]
    flags += ["--rehearse"] if options.rehearse else []
    flags += [f"--tokens {options.tokens}"] if options.tokens else []
    flags += [f"--limit {options.limit:g}"] if options.limit else []
    return f"python -m benchmarks.gpu {' '.join(flags)}"


def not_run(section: Section, options: Options, why: str) -> dict[str, Any]:
    """The JSON of a section that was not begun."""
    found = {"section": section.name, "state": NOT_RUN, "note": why, "rehearsal": options.rehearse}
    return {**found, "date": time.strftime("%Y-%m-%d"), "machine": {}, "rows": []}


@contextmanager
def warming_up(
    sections: Sequence[Section], options: Options, scratch: Path
) -> Iterator[list[Child]]:
    """Compile the kernels of later sections in the background; nothing of it is left at the end.

    They compile into the same caches on disk. It pays only while sections run that time nothing.
    """
    wanted = [section for section in sections if section.name in options.warm_up]
    useful = bool(sections) and not sections[0].timed
    children = [Child(s, "warm", options, scratch) for s in wanted] if useful else []
    try:
        yield children
    finally:
        for child in children:
            child.stop()


def run_sections(sections: Sequence[Section], options: Options) -> dict[str, dict[str, Any]]:
    """Run the sections one after the other; their JSON files are written as they end.

    Raises:
        KeyboardInterrupt: a section was interrupted; its JSON is written like another's.
    """
    total = TOTAL if options.limit is None else len(sections) * options.limit
    deadline = time.monotonic() + total
    found: dict[str, dict[str, Any]] = {}
    scratch = Path(tempfile.mkdtemp(prefix="fastppo-gpu-"))
    try:
        with warming_up(sections, options, scratch) as others:
            for section in sections:
                if section.timed:
                    for child in others:
                        child.stop()
                if deadline - time.monotonic() < LEAST:
                    result = not_run(section, options, "no time was left for it")
                else:
                    print(f"{section.name} ...", flush=True)
                    result = run_section(section, options, scratch, deadline)
                found[section.name] = result
                write_json(options.out / f"{section.name}.json", result)
                print(summary(result), flush=True)
                if result["note"] == INTERRUPTED:
                    raise KeyboardInterrupt
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def summary(result: dict[str, Any]) -> str:
    """A line that says how a section ended."""
    line = f"{result['section']}: {result['state']}, {len(result['rows'])} rows"
    line += f" in {result['seconds']} s" if "seconds" in result else ""
    return f"{line}; {result['note']}" if result["note"] else line
