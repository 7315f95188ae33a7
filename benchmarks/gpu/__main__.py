"""python -m benchmarks.gpu: what only a GPU can show, in at most six minutes; or a rehearsal.

Sections run one after the other, each in a process of its own under a time limit; the JSON of each
is written when it ends, and the tables are drawn from all that are there.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import markdown
from benchmarks.gpu.runner import DONE, INTERRUPTED, Options, read_results, run_sections, unpack
from benchmarks.gpu.sections import BY_NAME, RESULTS, SECTIONS

REPORT = "README.md"


# What three processes that compile take beside the oracle's, on the device.
ROOM_TO_WARM_UP = 80 << 30
ASK_TORCH = """
import torch
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    print(gpu.total_memory, gpu.name)
"""


def find_device() -> tuple[str, int] | None:
    """The first GPU's name and memory in bytes; None without one.

    The driver is asked, since importing torch takes seconds of the six minutes; and torch where
    that driver is not there, since it may be built for another.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        name, device, size = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_size_t()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
            driver.cuDeviceGetName(name, len(name), device)
            driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
            return name.value.decode(), size.value
    except OSError:
        pass
    command = [sys.executable, "-c", ASK_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    size_and_name = done.stdout.strip().split(maxsplit=1)
    return (size_and_name[1], int(size_and_name[0])) if size_and_name else None


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    sections = list(BY_NAME)
    parser.add_argument("--only", nargs="+", choices=sections, metavar="SECTION", default=sections)
    parser.add_argument("--skip-done", action="store_true", help="leave out what has a result")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU, not kept")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of what is not installed")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--tokens", type=int, help="of a sequence in trainer (2048)")
    parser.add_argument("--limit", type=float, help="seconds for each section, not its own limit")
    parser.add_argument(
        "--warm-up",
        nargs="*",
        choices=sections,
        metavar="SECTION",
        help="sections whose kernels compile beside launch and oracle; default: those that need it",
    )
    # To show that a section that fails or hangs leaves the results of the others.
    parser.add_argument("--fault", nargs="+", default=[], help=argparse.SUPPRESS)
    parser.epilog = f"sections: {', '.join(f'{s.name} ({s.limit:g} s)' for s in SECTIONS)}"
    return parser


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does, so that no process of a section is left."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: list[str] | None = None) -> int:
    asked = arguments().parse_args(argv)
    with ExitStack() as stack:
        if asked.rehearse:
            out = asked.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if RESULTS in [out.resolve(), *out.resolve().parents]:
                return refuse("a rehearsal measures nothing; --out must not be in the results")
        else:
            device = find_device()
            if device is None:
                return refuse("no GPU here; --rehearse walks through without one")
            name, memory = device
            slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
            out = asked.out or RESULTS / f"gpu-{slug}"
        done = [
            name
            for name, result in read_results(out, list(BY_NAME)).items()
            if result["state"] == DONE and result["rehearsal"] == asked.rehearse
        ]
        wanted = [s for s in SECTIONS if s.name in asked.only]
        wanted = [s for s in wanted if not (asked.skip_done and s.name in done)]
        warm_up = asked.warm_up
        if warm_up is None:
            room = not asked.rehearse and memory >= ROOM_TO_WARM_UP
            warm_up = [s.name for s in wanted if s.warm_up and room]
        options = Options(
            out=out,
            rehearse=asked.rehearse,
            tokens=asked.tokens,
            limit=asked.limit,
            warm_up=warm_up,
            faults=dict(fault.split("=") for fault in asked.fault),
        )
        if asked.wheels is not None:
            options.site = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            try:
                unpack(asked.wheels, options.site)
            except ValueError as error:
                return refuse(str(error))
        with stopped_by_signals():
            try:
                ran = run_sections(wanted, options)
            except KeyboardInterrupt:
                ran = {"interrupted": {"state": INTERRUPTED}}
            finally:
                text = markdown(read_results(out, list(BY_NAME)))
                out.mkdir(parents=True, exist_ok=True)
                (out / REPORT).write_text(text, encoding="utf-8")
        print(f"\n{text}" if asked.rehearse else out / REPORT)
    return int(any(result["state"] != DONE for result in ran.values()))


def refuse(why: str) -> int:
    """A line on stderr; the exit code of what was asked for wrongly."""
    print(f"benchmarks.gpu: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
