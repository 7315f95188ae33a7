"""What a run says on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from fastppo.memory.units import GIB

if TYPE_CHECKING:
    from fastppo.memory.plan import Plan

console = Console(highlight=False, soft_wrap=True)


def precision_name(autocast: torch.dtype | None) -> str:
    """The name that the configuration has for the autocast dtype of a run; None is float32."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}
    return names[autocast]


def format_duration(seconds: float) -> str:
    """Format a duration as 1:02:03, or as 2:03 below an hour."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted(count: int, thing: str) -> str:
    """`1 step`, `2 steps`: a count with its noun."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def format_score(value: float | None) -> str:
    """Format a score with its sign; a dash stands for None."""
    return "-" if value is None else f"{value:+.3f}"


def memory_line(plan: Plan | None, device: torch.device, **lengths: int) -> str:
    """After the first step, print and return the most that it took, beside what was planned.

    On a GPU the allocator has counted tensors. On a CPU nobody has: what the process took at most
    is its code and libraries too. `lengths` are the longest that there were, by the keys that limit
    them.
    """
    if device.type == "cuda":
        taken = torch.cuda.max_memory_allocated(device) / GIB
        said = f"memory: {taken:.2f} GiB of tensors at the highest"
    else:
        taken = highest_rss() / GIB
        said = f"memory: {taken:.2f} GiB at the highest, the whole process (resident)"
    if plan is None:
        line = f"{said}; not planned"
        console.print(line)
        return line
    config = plan.inputs.config
    allowed = {name: getattr(config, name) for name in lengths}
    here = plan.for_lengths(**lengths).step_peak
    line = f"{said}; planned {here / GIB:.2f} of tensors for lengths as here ({named(lengths)})"
    if allowed != lengths:
        line += (
            f", and {plan.step_peak / GIB:.2f} for the longest that the keys allow "
            f"({named(allowed)}), which none has reached"
        )
    console.print(line)
    return line


def named(keys: dict[str, int]) -> str:
    """Keys with their values, as YAML says them."""
    return ", ".join(f"{name}: {value}" for name, value in keys.items())


def highest_rss() -> int:
    """Peak resident memory of the process, in bytes."""
    import resource  # not on Windows

    count = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return count if sys.platform == "darwin" else 1024 * count
