"""`fastppo-train CONFIG --plan [--gpu 24GiB]`: how much memory a run needs, and where."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastppo import __version__
from fastppo.config import Config
from fastppo.errors import UserError
from fastppo.memory.advice import Change, advise, choose_auto
from fastppo.memory.inputs import PlanInputs
from fastppo.memory.peaks import PHASES, ROWS
from fastppo.memory.plan import Plan, make_plan, uncounted
from fastppo.memory.shapes import ModelShape, find_shape_and_source
from fastppo.memory.units import GIB, KIB, MIB
from fastppo.memory.weights import Shapes

if TYPE_CHECKING:
    from collections.abc import Sequence

UNITS = {"KIB": KIB, "MIB": MIB, "GIB": GIB, "KB": 10**3, "MB": 10**6, "GB": 10**9}
NO_FIT = 3


def parse_size(text: str) -> int:
    """Bytes of `24GiB`, `24GB` (decimal) or `24576MiB`."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]i?B)\s*", text, flags=re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise UserError(f"--gpu: '{text}' is no size; write for example 24GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def present_gpu() -> tuple[int, str] | None:
    """Bytes and name of the first visible GPU, asked of its driver; torch is not imported."""
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


def plan_of(config: Config, device: Literal["gpu", "cpu"]) -> tuple[Plan, list[str]]:
    """The plan of a configuration, and what it took for granted."""
    if (key := uncounted(config)) is not None:
        raise UserError(
            f"{config.source}: {key}: the plan does not count single modules that train whole; "
            "plan without this key"
        )
    base, source = find_shape_and_source(
        config.model_name_or_path, config.cache_dir, config.model_revision
    )
    inputs = PlanInputs.of(config, base, device=device)
    notes = [f"shape of the base from {source}"]
    others: dict[str, ModelShape] = {}
    for role, name in other_models(inputs, config).items():
        others[role], source = find_shape_and_source(name, config.cache_dir)
        notes.append(f"shape of the {role} ({name}) from {source}")
    if "lora" in inputs.rewards:
        where = inputs.reward_source
        notes.append(f"reward adapter of rank {inputs.reward_rank} ({where})")
    own = "the checkpoint's own on a GPU" if device == "gpu" else "float32 on a CPU"
    why = "bf16: true" if inputs.bf16 else f"bf16 is not set: {own}"
    notes.append(f"base in {inputs.dtype} ({why})")
    if config.stage == "ppo":
        notes.append(
            f"prompts of cutoff_len {inputs.cutoff_len} tokens, responses of max_new_tokens "
            f"{inputs.max_new_tokens}, all of them; shorter ones need less"
        )
    else:
        notes.append(f"prompt and answer together cutoff_len {inputs.cutoff_len} tokens, always")
    return make_plan(inputs, Shapes(base, **others)), notes


def other_models(inputs: PlanInputs, config: Config) -> dict[str, str]:
    """Models beside the base that are named: role -> name."""
    found = {}
    for spec in config.rewards:
        if spec.kind == "full":
            found["reward"] = spec.target
    if inputs.ref_model is not None:
        found["reference"] = inputs.ref_model
    if inputs.critic == "model" and inputs.critic_model is not None:
        found["critic"] = inputs.critic_model
    return found


def run(config: Config, gpu: str | None) -> int:
    """Print the plan; 0 if it fits or there is nothing to fit into, 3 if it does not."""
    size, name = parse_size(gpu) if gpu is not None else None, gpu or ""
    if size is None and (found := present_gpu()) is not None:
        size, name = found[0], f"the {found[1]} here, {found[0] / GIB:.1f} GiB"
    plan, notes = plan_of(config, "cpu" if size is None else "gpu")
    if plan.inputs.auto:
        if size is None:
            notes.append(f"{', '.join(plan.inputs.auto)}: auto, which a run decides by its memory")
        else:
            chosen = choose_auto(plan, size)
            plan = plan.with_changes(**chosen)
            notes.append(f"auto: {spell(chosen)}")
    print("\n".join(head_lines(config, plan, notes)))
    print()
    print("\n".join(table(plan)))
    print()
    print("\n".join(verdict(plan, size, name)))
    return 0 if size is None or plan.fits(size) else NO_FIT


def head_lines(config: Config, plan: Plan, notes: Sequence[str]) -> list[str]:
    """What is planned, and what was assumed."""
    shape = plan.shapes.base
    return [
        f"fastppo {__version__}: memory plan of {config.source}, stage {config.stage}",
        f"  {config.model_name_or_path}: {shape.parameters:,} parameters, {shape.layers} layers, "
        f"hidden {shape.hidden}, vocabulary {shape.vocab}",
        *(f"  {note}" for note in notes),
    ]


def unit_of(plan: Plan) -> tuple[int, str]:
    """GiB, or MiB for a small run."""
    return (GIB, "GiB") if plan.peak.total >= 4 * GIB else (MIB, "MiB")


def table(plan: Plan) -> list[str]:
    """Rows by role, columns by phase: what is alive at each phase's highest peak."""
    unit, name = unit_of(plan)
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
    """The peak, whether it fits, and if not what to change."""
    unit, label = unit_of(plan)
    peak = plan.peak
    lines = [f"peak {peak.total / unit:.2f} {label}, in {peak.phase}: {peak.name}"]
    for what, count in plan.host.items():
        if count:
            lines.append(f"host memory for {what}: {count / unit:.2f} {label}")
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
    lines += [f"  {spell(step.change):60} {step.peak / unit:8.2f} {label}" for step in advice.steps]
    return lines


def spell(change: Change) -> str:
    """As the YAML, or the command line, would have it."""
    words = {True: "true", False: "false"}
    return " ".join(
        f"{key}={words[value] if isinstance(value, bool) else value}"
        for key, value in change.items()
    )
