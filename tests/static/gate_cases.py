"""What the static gate compiles: every kernel, in the variants and sizes that a launch chooses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """A kernel, the types of its pointers, its constants, and its size."""

    kernel: str
    logits: str
    constants: dict[str, Any]
    warps: int
    tiles: int = 0
    bytes_a_logit: int = 0  # of memory traffic, all sweeps together; 0 for kernels over tokens
    absent: tuple[str, ...] = ()  # pointers that are None
    variant: str = ""
    gradient: str = ""  # type of the gradient where it is not the logits'

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.logits}" + (f", {self.variant}" if self.variant else "")

    @property
    def itemsize(self) -> int:
        return 4 if self.logits == "fp32" else 2

    @property
    def method(self) -> str:
        """How a row is read: METHOD, or by the second of two launches."""
        if self.kernel == "policy_loss_kernel" and "row_max_ptr" not in self.absent:
            return "second launch"
        return str(self.constants.get("METHOD", "tiles"))

    @property
    def writes(self) -> bool:
        """Whether it writes a gradient in the vectors in which it reads the logits."""
        writers = ("policy_loss_kernel", "token_logprobs_backward_kernel")
        return self.kernel in writers and "dx_ptr" not in self.absent


PAIR = {"TEMPERATURE_KIND": 0, "HAS_SOFTCAP": False, "ALIGNED": True, "TOGETHER": True}
ROW = {**PAIR, "METHOD": "tiles"}
FORWARD = {name: value for name, value in ROW.items() if name != "TOGETHER"}
# A size far beyond the table's, which does not fit the registers: the gate must say so.
GREEDY = Case(
    "token_logprobs_kernel", "fp32", FORWARD, 8, 64, 4, absent=("live_ptr",), variant="greedy"
)

# Every option at once, and those of a call that says nothing.
HEAVIEST = {
    "TEMPERATURE_KIND": 2,
    "KL_KIND": "k3",
    "KL_COEF_ON_DEVICE": True,
    "ENTROPY_COEF_ON_DEVICE": True,
    "GRAD_SCALE_ON_DEVICE": True,
    "HAS_ENTROPY": True,
    "HAS_DUAL_CLIP": True,
}
DEFAULT = {
    "KL_KIND": "k3",
    "KL_COEF_ON_DEVICE": False,
    "ENTROPY_COEF_ON_DEVICE": False,
    "GRAD_SCALE_ON_DEVICE": False,
    "HAS_ENTROPY": False,
    "HAS_DUAL_CLIP": False,
}
ONE_LAUNCH = ("row_max_ptr", "sum_exp_ptr")
PLAIN = ("ref_ptr", "importance_ptr")
ODD = {"ALIGNED": False}
APART = {"ALIGNED": False, "TOGETHER": False}
SOFTCAP = {"HAS_SOFTCAP": True, "TEMPERATURE_KIND": 2}


def loss_cases(logits: str, size: int) -> Iterator[Case]:
    from fastppo.ops.backends.sizes import _MANY, _ONE, _SMALL
    from fastppo.ops.surrogate import TERMS

    full = logits != "fp16"  # as bf16, but for the conversions
    listed: list[tuple[str, dict[str, Any], tuple[str, ...], Any, bool]] = [
        ("heaviest", HEAVIEST, (), _MANY, True),
        ("heaviest", HEAVIEST, (), _ONE, full),
        ("heaviest", HEAVIEST, (), _SMALL, full),
        ("heaviest, odd V", HEAVIEST | ODD, (), _MANY, logits == "bf16"),
        ("heaviest, softcap", HEAVIEST | SOFTCAP, (), _MANY, True),
        ("default", DEFAULT, PLAIN, _MANY, full),
        ("default", DEFAULT, PLAIN, _ONE, full),
        ("default, odd V", DEFAULT | ODD, PLAIN, _MANY, True),
        ("default, odd V", DEFAULT | ODD, PLAIN, _ONE, logits == "bf16"),
        ("default, no gradient", DEFAULT, (*PLAIN, "dx_ptr"), _MANY, full),
        ("default, gradient apart", DEFAULT | APART, PLAIN, _MANY, logits == "bf16"),
    ]
    for variant, constants, absent, config, wanted in listed:
        if wanted:
            moved = size if "dx_ptr" in absent else 2 * size
            given = {**ROW, **constants, "TERMS": TERMS}
            sizes = (config.warps, config.tiles, moved)
            absent = (*absent, *ONE_LAUNCH)
            yield Case("policy_loss_kernel", logits, given, *sizes, absent, variant)


def method_cases(logits: str, size: int) -> Iterator[Case]:
    """The candidates that are no size: what no model chooses, and a measurement may."""
    from fastppo.ops.backends.sizes import _MANY, _ONE, HELD_LOGITS, RowConfig, held

    default, heaviest = ("default", DEFAULT, PLAIN), ("heaviest", HEAVIEST, ())
    aligned: dict[str, Any] = {}
    few, half, all_of_it = held(size, HELD_LOGITS)
    listed: list[tuple[str, RowConfig, tuple[Any, ...], dict[str, Any]]] = [
        ("ahead", _MANY, heaviest, aligned),
        ("ahead", _ONE, heaviest, aligned),
        ("held", few, default, aligned),
        ("held", half, heaviest, aligned),
        ("held", all_of_it, default, aligned),
        ("second launch", _MANY, heaviest, aligned),
    ]
    if logits == "bf16":
        listed += [
            ("ahead", _MANY, default, aligned),
            ("ahead", _ONE, default, ODD),
            ("held", few, heaviest, aligned),
            ("held", half, default, ODD),
            ("held", all_of_it, heaviest, aligned),
        ]
    for variant, config, (name, constants, absent), where in listed:
        yield loss_by_method(logits, variant, config, name, constants | where, absent)
    given = FORWARD | {"METHOD": "ahead"}
    sizes = (_MANY.warps, _MANY.tiles, size)
    yield Case("token_logprobs_kernel", logits, given, *sizes, ("live_ptr",), "ahead")


def loss_by_method(
    logits: str,
    variant: str,
    config: Any,
    name: str,
    constants: dict[str, Any],
    absent: tuple[str, ...],
) -> Case:
    from fastppo.ops.surrogate import TERMS

    method = "tiles" if variant == "second launch" else variant
    without = () if variant == "second launch" else ONE_LAUNCH
    place = "" if constants.get("ALIGNED", True) else "odd V, "
    return Case(
        "policy_loss_kernel",
        logits,
        {**ROW, **constants, "TERMS": TERMS, "METHOD": method},
        config.warps,
        config.tiles,
        2 * (4 if logits == "fp32" else 2),
        (*absent, *without),
        f"{name}, {place}{variant}",
    )


def token_cases(logits: str, size: int) -> Iterator[Case]:
    from fastppo.ops.backends.sizes import _MANY, _PAIR, _SMALL

    name, full = "token_logprobs_kernel", logits != "fp16"
    for variant, constants, config, wanted in (
        ("", {}, _MANY, True),
        ("", {}, _SMALL, full),
        ("odd V", ODD, _MANY, full),
        ("softcap", SOFTCAP, _MANY, True),
    ):
        if wanted:
            sizes = (config.warps, config.tiles, size)
            yield Case(name, logits, FORWARD | constants, *sizes, ("live_ptr",), variant)
    name = "token_logprobs_backward_kernel"
    for variant, constants, config, absent, gradient in (
        ("", {}, _MANY, ("live_ptr", "h_ptr"), ""),
        ("entropy, a weight a row", {}, _MANY, (), ""),
        ("odd V", ODD, _MANY, ("live_ptr", "h_ptr"), ""),
        ("softcap", SOFTCAP, _MANY, (), ""),
        ("small", {}, _SMALL, ("live_ptr", "h_ptr"), ""),
        ("bf16 gradient", {}, _MANY, ("live_ptr", "h_ptr"), "bf16"),
    ):
        if (gradient and logits != "fp32") or (not full and variant not in ("", "softcap")):
            continue
        moved = size + (2 if gradient else size)
        sizes = (config.warps, config.tiles, moved)
        yield Case(name, logits, ROW | constants, *sizes, absent, variant, gradient)
    name = "score_tokens_kernel"
    for variant, constants, config in (
        ("", {}, _PAIR),
        ("small", {}, _SMALL),
        ("odd V", ODD, _PAIR),
        ("softcap", SOFTCAP, _PAIR),
    ):
        if full or not variant:
            yield Case(
                name, logits, PAIR | constants, config.warps, config.tiles, 2 * size, (), variant
            )


def candidate_cases() -> list[Case]:
    """By every method that `sizes.candidates` has besides sizes."""
    sizes = (("bf16", 2), ("fp16", 2), ("fp32", 4))
    return [case for logits, size in sizes for case in method_cases(logits, size)]


def one_of_each_method() -> list[Case]:
    """In bf16, for a target whose table is not on the page."""
    found: dict[str, Case] = {}
    for case in method_cases("bf16", 2):
        found.setdefault(case.method, case)
    return list(found.values())


def cases() -> Iterator[Case]:
    """What a launch chooses without a measurement."""
    from fastppo.ops.backends.sizes import ADVANTAGES_SCAN, BLOCK, GAE_SCAN
    from fastppo.ops.surrogate import TERMS

    for logits, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        yield from loss_cases(logits, size)
        yield from token_cases(logits, size)
    block = {"BLOCK": BLOCK}
    sums = {"MAXIMUM": 2, "LAST": TERMS - 1, "BLOCK": 1024}
    yield Case("sum_rows_kernel", "fp32", sums, 4)
    scale = {"DIVISOR_ON_DEVICE": True, "column_stride": 1, "BLOCK": 4096}
    yield Case("scale_unless_one_kernel", "bf16", scale, 8)
    yield Case("token_kl_kernel", "fp32", {"KIND": "k3", **block}, 4)
    yield Case("value_loss_kernel", "fp32", {"HAS_CLIP": True, **block}, 4)
    yield Case("moments_kernel", "fp32", block, 4)
    yield Case("moments_kernel", "fp32", block, 4, absent=("weight_ptr",), variant="no weight")
    yield Case("merge_moments_kernel", "fp32", block, 4)
    yield Case("whiten_kernel", "fp32", {"SHIFT_MEAN": True, **block}, 4)
    blocks, warps = GAE_SCAN.values()
    optional = ("reward_part_ptr", "bootstrap_ptr", "part_ptr")
    yield Case("gae_kernel", "fp32", {"BLOCK": blocks}, warps)
    yield Case("gae_kernel", "fp32", {"BLOCK": blocks}, warps, absent=optional, variant="plain")
    blocks, warps = ADVANTAGES_SCAN.values()
    scan = {"KL_KIND": "k3", "KL_COEF_ON_DEVICE": True, "REWARDS_ONLY": False, "BLOCK": blocks}
    yield Case("advantages_kernel", "fp32", scan, warps)
    scan |= {"KL_COEF_ON_DEVICE": False}
    optional = ("exact_kl_ptr", "extra_ptr", "bootstrap_ptr")
    yield Case("advantages_kernel", "fp32", scan, warps, absent=optional, variant="plain")
