"""What limits a kernel over logits on each chip: issue slots, memory, and the L2 cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What limits a logit: memory, and how many instructions a multiprocessor issues.

    Each of four schedulers issues an instruction of 32 lanes a cycle, and 4 lanes of it special
    functions. Data sheets' numbers, at the boost clock; none is measured here.
    """

    name: str
    target: str
    bytes_a_second: float
    multiprocessors: int
    clock: float
    l2_bytes: int

    def instructions(self, bytes_a_logit: int) -> float:
        """Instructions a logit at which arithmetic takes as long as memory."""
        issued = self.multiprocessors * self.clock * 4 * 32
        return issued * bytes_a_logit / self.bytes_a_second

    def specials(self, bytes_a_logit: int) -> float:
        """Special functions a logit, likewise."""
        return self.instructions(bytes_a_logit) / 8


CHIPS = (
    Chip("A100 80 GB", "sm_80", 2.04e12, 108, 1.41e9, 40 << 20),
    Chip("H100 SXM", "sm_90", 3.35e12, 132, 1.755e9, 50 << 20),
    Chip("H200", "sm_90", 4.8e12, 132, 1.755e9, 50 << 20),
    Chip("B200", "sm_100", 8.0e12, 148, 1.85e9, 126 << 20),
    Chip("RTX 5090", "sm_120", 1.79e12, 170, 2.41e9, 96 << 20),
)
H100 = CHIPS[1]
REGISTERS = 65536


def programs_that_fit(registers: int, warps: int) -> int:
    """Programs of a multiprocessor at once, by registers and by its 64 warps."""
    return min(REGISTERS // (32 * warps * -(-registers // 8) * 8), 64 // warps)


def limits_table() -> str:
    """Markdown: how many instructions a logit each chip allows before memory waits for them."""
    lines = [
        "| | instructions a logit at 2 bytes of traffic | 4 | 6 | 8 | 12 |",
        "|---|---|---|---|---|---|",
    ]
    for chip in CHIPS:
        allowed = " | ".join(f"{chip.instructions(n):.1f}" for n in (2, 4, 6, 8, 12))
        lines.append(f"| {chip.name} ({chip.target}) | {allowed} |")
    return "\n".join(lines)


def l2_table() -> str:
    """Markdown: MB of logits in flight between a row's two reads, against the L2 cache."""
    from fastppo.ops.backends.sizes import Device, row_config, rows_in_l2

    lines = [
        "| | L2, MB | logits | V | programs a multiprocessor | rows in flight, MB | second read |",
        "|---|---|---|---|---|---|---|",
    ]
    for chip in CHIPS:
        device = Device(chip.name, chip.multiprocessors, chip.l2_bytes)
        for logits, size in (("bf16", 2), ("float32", 4)):
            for vocab in (32000, 50257, 128256, 151936):
                config = row_config(size, vocab, twice=True, device=device)
                # What three programs of 8 warps, the model's usual size, put in flight.
                programs = config.programs or 3
                bytes_in_flight = chip.multiprocessors * programs * vocab * size
                fits = programs <= rows_in_l2(vocab * size, device)
                where = "L2" if fits else "memory: half more traffic"
                grid = f"{programs} x {config.warps} warps"
                cache, flight = f"{chip.l2_bytes / 1e6:.0f}", f"{bytes_in_flight / 1e6:.0f}"
                cells = (chip.name, cache, logits, f"{vocab}", grid, flight, where)
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
