"""How Triton programs go over rows of logits: a static model, measured tables, and candidates.

What decides, in this order: a configuration that is forced; the table of this device, where one was
measured; the model in `row_config`. With FASTPPO_AUTOTUNE=1 the first call for a vocabulary and
dtype times candidates instead; results of two runs then differ by rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, Literal

import torch

AUTOTUNE: Final = os.environ.get("FASTPPO_AUTOTUNE") == "1"
VECTOR_BYTES: Final = 16  # of a thread's load

# How a row of logits is read for its loss and its gradient: a tile at a time, twice; the same with
# the next tile on its way while one is computed; once, and held in registers until the gradient is
# written; by two launches, of which the first leaves the row's statistics in memory.
Method = Literal["tiles", "ahead", "held", "two launches"]
# The longest row that is held: in float32 it takes half of a multiprocessor's registers. Twice as
# many logits of 16 bits would take no more, but for what they are unpacked to: they spill
# (docs/kernels.md).
HELD_LOGITS: Final = 32768


@dataclass(frozen=True)
class RowConfig:
    """How a program goes over a row of logits, and which rows it gets.

    Args:
        warps: how many share a row, of 32 threads.
        tiles: vectors of 16 bytes that a thread loads before it computes.
        programs: per multiprocessor; together they go over all rows. 0 is a program for each row.
        method: how a row is read; a held row is no longer than one tile.
    """

    warps: int
    tiles: int
    programs: int = 0
    method: Method = "tiles"

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def __str__(self) -> str:
        grid = f", {self.programs} a multiprocessor" if self.programs else ""
        method = "" if self.method == "tiles" else f", {self.method}"
        return f"{self.warps} warps x {self.tiles}{grid}{method}"

    def holds(self, itemsize: int, vocab: int) -> bool:
        """Whether a tile is at least as long as a row."""
        return vocab * itemsize <= VECTOR_BYTES * self.threads * self.tiles


@dataclass(frozen=True)
class Device:
    """What a launch depends on."""

    name: str
    multiprocessors: int
    l2_bytes: int


# Data sheets' numbers, for tables without a GPU; at run time the driver is asked.
DEVICES: Final = {
    "sm_80": Device("A100", 108, 40 << 20),
    "sm_90": Device("H100, H200", 132, 50 << 20),
    "sm_100": Device("B200", 148, 126 << 20),
    "sm_120": Device("RTX 5090", 170, 96 << 20),
}
# Of the L2 cache, what rows that are read again may fill; the rest passes through.
L2_SHARE: Final = 0.85

_SMALL: Final = RowConfig(4, 1)
# Three of these fit a multiprocessor's registers: 48 KiB of logits are loaded at once.
_MANY: Final = RowConfig(8, 4)
# Two rows at once take twice the registers for sums, so a thread loads half as much of each.
_PAIR: Final = RowConfig(8, 2)
_FEW: Final = RowConfig(8, 4, 2)
_ONE: Final = RowConfig(16, 4, 1)


@dataclass(frozen=True)
class Measured:
    """The fastest configurations on one device, as `make gpu` found them."""

    date: str
    # (bytes a logit, largest vocabulary, whether rows are read twice), configuration; ascending.
    entries: tuple[tuple[int, int, bool, RowConfig], ...]


# By the device's name. Empty: nothing has been measured yet, and the model decides.
MEASURED: Final[dict[str, Measured]] = {}

_forced: ContextVar[RowConfig | None] = ContextVar("forced row configuration", default=None)


@contextmanager
def forced(config: RowConfig) -> Iterator[None]:
    """Inside the block every kernel over logits runs with this configuration."""
    token = _forced.set(config)
    try:
        yield
    finally:
        _forced.reset(token)


@cache
def device_of(device: torch.device) -> Device | None:
    """What the driver says of a device; None without one, as for Triton's interpreter."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return Device(found.name, found.multi_processor_count, found.L2_cache_size)


def rows_in_l2(row_bytes: int, device: Device) -> int:
    """How many rows per multiprocessor the L2 cache holds until they are read again."""
    return int(L2_SHARE * device.l2_bytes) // (device.multiprocessors * row_bytes)


@cache
def row_config(
    itemsize: int,
    vocab: int,
    *,
    pair: bool = False,
    twice: bool = False,
    device: Device | None = None,
) -> RowConfig:
    """The configuration for logits of `itemsize` bytes, by the table or by the model.

    The model: a row that is read `twice` should still be in the L2 cache the second time, so only
    as many rows may be in flight as it holds. Where it does not hold one per multiprocessor, and
    where a row is read once, what counts is how many bytes are being loaded.

    Args:
        pair: whether two rows are read at once (`score_tokens`).
        twice: whether a row is read again for its gradient (`policy_loss`).
        device: None if unknown; then a program for each row.
    """
    if device is not None and device.name in MEASURED:
        for size, most, again, config in MEASURED[device.name].entries:
            if size == itemsize and vocab <= most and again == twice:
                return config
    if vocab * itemsize <= 2 * VECTOR_BYTES * _SMALL.threads * _SMALL.tiles:
        return _SMALL
    if pair:
        return _PAIR
    if not twice or device is None:
        return _MANY
    fit = rows_in_l2(vocab * itemsize, device)
    return _ONE if fit == 1 else _FEW if fit == 2 else _MANY


def chosen(
    itemsize: int, vocab: int, *, pair: bool, twice: bool, device: torch.device
) -> RowConfig:
    """The forced configuration, or that of `row_config`."""
    config = _forced.get()
    if config is not None:
        return config
    return row_config(itemsize, vocab, pair=pair, twice=twice, device=device_of(device))


# The configurations that autotuning and the GPU suite try: a program for each row; and one, two or
# four per multiprocessor that share the rows, of which one of 16 or 32 warps keeps the fewest rows
# in flight.
CANDIDATES: Final = tuple(
    RowConfig(warps, tiles, programs)
    for warps, tiles in ((4, 1), (4, 4), (8, 2), (8, 4), (16, 2), (16, 4), (32, 1), (32, 2))
    for programs in (0, 1, 2, 4)
    if programs * warps <= 32
)
# Of each other method, what the static model has a reason for. Loads ahead are for where few
# programs hide a load's latency from each other; two launches, for rows that no cache holds.
AHEAD: Final = (RowConfig(8, 4), RowConfig(8, 4, 2), RowConfig(16, 4, 1), RowConfig(16, 2, 1))
TWO_LAUNCHES: Final = (RowConfig(4, 4), RowConfig(8, 4), RowConfig(16, 4))


def held(itemsize: int, vocab: int) -> list[RowConfig]:
    """The configurations that hold a row in registers: 8, 16 or 32 warps and the tile they need."""
    if vocab > HELD_LOGITS:
        return []
    found = []
    for warps in (8, 16, 32):
        vectors = -(-vocab * itemsize // (VECTOR_BYTES * 32 * warps))
        found.append(RowConfig(warps, 1 << (vectors - 1).bit_length(), method="held"))
    return found


def candidates(
    itemsize: int, vocab: int, *, pair: bool = False, twice: bool = False
) -> list[RowConfig]:
    """The configurations worth timing for a size: `with forced(candidate): policy_loss(...)`.

    Those of two launches and of a held row only where a row is read `twice`.
    """
    longest = vocab * itemsize // VECTOR_BYTES  # vectors of a row
    found = [c for c in CANDIDATES if not (pair and c.warps * c.tiles > 32)]
    if not pair:
        found += [replace(c, method="ahead") for c in AHEAD]
    if twice:
        found += [replace(c, method="two launches") for c in TWO_LAUNCHES]
    found = [c for c in found if c.threads * c.tiles <= longest] or [_SMALL]
    return [*found, *held(itemsize, vocab)] if twice else found


def for_one_read(config: RowConfig, *, pair: bool) -> RowConfig:
    """The configuration of a launch that reads a row once, or two rows at once."""
    if config.method == "tiles" or (config.method == "ahead" and not pair):
        return config
    most = _PAIR.tiles if pair else _MANY.tiles
    return replace(config, tiles=min(config.tiles, most), method="tiles")


BLOCK: Final = 1024  # tokens
# An associative scan needs more registers the more lanes it has. With 4 warps the kernel of
# advantages spills on sm_100.
GAE_SCAN: Final = {"BLOCK": 1024, "num_warps": 4}
ADVANTAGES_SCAN: Final = {"BLOCK": 1024, "num_warps": 8}


@cache
def warps_of(config: RowConfig) -> int:
    """The number of warps for this many threads; on AMD a warp has 64 threads, not 32."""
    return config.warps // 2 if torch.version.hip else config.warps


@cache
def tuned(kernel: Any) -> Any:
    """The kernel with autotuning: its first call times programs for each row."""
    import triton

    sizes = [c for c in CANDIDATES if not c.programs]
    configs = [
        triton.Config({"TILES": c.tiles, "THREADS": c.threads}, num_warps=warps_of(c))
        for c in sizes
    ]
    # Each trial may overwrite the logits with the gradient, so they are restored.
    return triton.autotune(configs=configs, key=["V"], restore_value=["x_ptr"])(kernel)
