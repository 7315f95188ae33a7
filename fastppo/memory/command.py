"""`fastppo-train CONFIG --plan [--gpu 24GiB]`: how much memory a run needs, and what for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from fastppo import __version__
from fastppo.config import Config
from fastppo.config.parallel import check_processes, units_a_step
from fastppo.errors import UserError
from fastppo.memory.advice import advise, choose_auto, choose_offloading, format_settings
from fastppo.memory.peak import PHASES, ROWS
from fastppo.memory.plan import Plan, plan_config
from fastppo.memory.units import GIB, KIB, MIB
from fastppo.memory.weights import sharded_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

UNITS = {"KIB": KIB, "MIB": MIB, "GIB": GIB, "KB": 10**3, "MB": 10**6, "GB": 10**9}
DOES_NOT_FIT = 3  # exit code


def parse_size(text: str) -> int:
    """The number of bytes in a size such as `24GiB`, `24GB` (decimal) or `24576MiB`."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]i?B)\s*", text, flags=re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise UserError(f"--gpu: '{text}' is no size; write for example 24GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def find_gpu() -> tuple[int, str] | None:
    """Bytes and name of the first visible GPU, from its driver; None if there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if visible in ("", "-1"):
        return None
    if (tool := shutil.which("nvidia-smi")) is not None:
        query = ["--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]
        asked = subprocess.run(
            [tool, *query, f"--id={visible}"], capture_output=True, text=True, check=False
        )
        size, _, name = asked.stdout.partition(",")
        if asked.returncode == 0 and size.strip().isdigit():
            return int(size) * MIB, name.strip()
    for path in sorted(Path("/sys/class/drm").glob("card*/device/mem_info_vram_total")):
        return int(path.read_text()), "AMD GPU"
    return None


def parse_count(text: str) -> int:
    """The number of GPUs in `--gpus`."""
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--gpus: '{text}' is no number of GPUs; write for example 4")
    return int(text)


def run(config: Config, gpu: str | None, gpus: str = "1") -> int:
    """Print the plan of a configuration on a GPU of size `gpu`; None is this machine's GPU.

    Of several `gpus`, whose processes share the run, it is the plan of each.

    Returns:
        The exit code: 3 if the run does not fit; 0 if it fits, or if no size is known.
    """
    count = parse_count(gpus)
    check_processes(config, count, "--gpus")
    size, name = parse_size(gpu) if gpu is not None else None, gpu or ""
    if size is None and (found := find_gpu()) is not None:
        size, name = found[0], f"the {found[1]} here, {found[0] / GIB:.1f} GiB"
    plan, notes = plan_config(config, "cpu" if size is None else "gpu", count, size)
    if size is None and plan.inputs.auto:
        notes.append(f"{', '.join(plan.inputs.auto)}: auto, which a run decides by its memory")
    if size is not None:
        if chosen := choose_auto(plan, size):
            notes.append(f"auto: {format_settings(chosen)}")
        plan = plan.with_changes(**chosen)
    if plan.inputs.decides_offloading:
        plan, note = with_activations(plan, size)
        notes.append(note)
    notes += shares(plan)
    print("\n".join(heading(config, plan, notes)))
    print()
    print("\n".join(table(plan)))
    print()
    print("\n".join(verdict(plan, size, name)))
    starts = plan.engine is None or plan.engine.starts
    return 0 if size is None or (plan.fits(size) and starts) else DOES_NOT_FIT


def with_activations(plan: Plan, size: int | None) -> tuple[Plan, str]:
    """The plan with activations kept if no key says so and half of `size` has room, and a note."""
    if size is None:
        note = "a run keeps them if that takes at most half of the memory"
        return plan, f"activations are recomputed; {note}"
    settings = choose_offloading(plan, size)
    keeps = settings["activation_offloading"] == "none"
    note = "kept: the run then takes at most half of the memory"
    if not keeps:
        note = "recomputed: with all of them kept the run would take more than half of the memory"
    return plan.with_changes(**settings), f"activations are {note}"


def heading(config: Config, plan: Plan, notes: Sequence[str]) -> list[str]:
    """Lines that describe the planned run and the plan's assumptions."""
    shape = plan.shapes.base
    return [
        f"fastppo {__version__}: memory plan of {config.source}, stage {config.stage}",
        f"  {config.model_name_or_path}: {shape.parameters:,} parameters, {shape.layers} layers, "
        f"hidden {shape.hidden}, vocabulary {shape.vocab}",
        *(f"  {note}" for note in notes),
    ]


def shares(plan: Plan) -> list[str]:
    """Lines on what each of several processes has of a step, and what they send to each other.

    A ring of n processes sends 2 (n - 1) / n times the bytes of a sum from each of them.
    Source: Patarasu and Yuan 2009, Bandwidth Optimal All-reduce Algorithms, section 3.
    """
    gpus, config = plan.inputs.gpus, plan.inputs.config
    if gpus == 1:
        return []
    count, what = units_a_step(config)
    most, least = -(-count // gpus), count // gpus
    each = f"{most}" if most == least else f"{least} or {most}"
    steps = config.ppo_epochs * config.ppo_buffer_size if config.stage == "ppo" else 1
    summed = plan.gradient_bytes
    sent = summed * 2 * (gpus - 1) / gpus
    return [
        f"each of {gpus} GPUs has {each} of a step's {count} {what}; the table is one GPU's",
        f"an optimiser step adds up {summed / MIB:.1f} MiB of gradients, for which a ring sends "
        f"{sent / MIB:.1f} MiB from each GPU; {steps} a step: {sent * steps / MIB:.1f} MiB",
        *shards(plan),
    ]


def shards(plan: Plan) -> list[str]:
    """A line on what each of several processes has of a base that is sharded over them."""
    inputs, shape = plan.inputs, plan.shapes.base
    if not inputs.shards:
        return []
    item, gpus = inputs.itemsize, inputs.gpus
    layers = shape.layers * shape.layer_parameters * item
    held, whole = sharded_bytes(shape, item, gpus), shape.parameters * item
    return [
        f"fsdp: each GPU holds {held / MIB:.1f} of the base's {whole / MIB:.1f} MiB, two whole "
        f"layers among them; a pass, and a step of decoding is one, receives "
        f"{layers * (gpus - 1) / gpus / MIB:.1f} MiB"
    ]


def choose_unit(plan: Plan) -> tuple[int, str]:
    """Bytes and name of the unit for printing: GiB, or MiB for a small run."""
    return (GIB, "GiB") if plan.peak.total >= 4 * GIB else (MIB, "MiB")


def table(plan: Plan) -> list[str]:
    """Lines of the table: a column for each phase, with what is in memory at its highest peak."""
    unit, name = choose_unit(plan)
    columns = {phase: plan.columns[phase] for phase in PHASES if phase in plan.columns}
    digits = 2 if unit == GIB else 1
    there = {row for peak in columns.values() for row in peak.rows}
    lines = [f"{name:20}" + "".join(f"{phase:>10}" for phase in columns)]
    for row in (row for row in ROWS if row in there):
        cells = (peak.rows.get(row, 0) for peak in columns.values())
        lines.append(
            f"{row:20}" + "".join(f"{c / unit:>10.{digits}f}" if c else f"{'-':>10}" for c in cells)
        )
    totals = (peak.total for peak in columns.values())
    lines.append(f"{'total':20}" + "".join(f"{t / unit:>10.{digits}f}" for t in totals))
    lines += [f"  {phase}: {peak.name}" for phase, peak in columns.items()]
    return lines


def verdict(plan: Plan, size: int | None, name: str) -> list[str]:
    """Lines that say the peak, whether it fits, and if not which settings to change."""
    unit, label = choose_unit(plan)
    peak = plan.peak
    lines = [f"peak {peak.total / unit:.2f} {label}, in {peak.phase}: {peak.name}"]
    for what, count in plan.host.items():
        if count:
            lines.append(f"host memory for {what}: {count / unit:.2f} {label}")
    if plan.engine is not None:
        lines.append(plan.engine.line(size, unit, label))
    if size is None:
        lines.append("no GPU here: this is a run on the CPU; --gpu 24GiB plans one on a GPU")
        return lines
    if plan.fits(size):
        room = (size - peak.total) / unit
        return [*lines, f"fits {name}: {room:.2f} {label} to spare"]
    over = (peak.total - size) / unit
    lines.append(f"does not fit {name}: {over:.2f} {label} too much")
    advice = advise(plan, size, Config.model_fields)
    if not advice.fits:
        lines.append("no change of settings makes it fit; the most that they do:")
    else:
        lines.append("the smallest changes that make it fit, each with the peak after it:")
    lines += [
        f"  {format_settings(step.settings):60} {step.peak / unit:8.2f} {label}"
        for step in advice.steps
    ]
    return lines
