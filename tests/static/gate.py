"""Every kernel compiled ahead of time, in every size that the launch table chooses, and read.

    TRITON_INTERPRET=0 python -m tests.static.gate TARGET ...    (one JSON line a compilation)

No GPU is asked. A kernel's numbers are the interpreter's business; here is what only the machine
code shows: spills, the width of loads and stores, eviction hints, registers, and how much
arithmetic a logit costs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# A target takes half a minute to compile for: the fast suite has the one whose limits are below,
# the slow one every target.
FAST = ("sm_90",)
SLOW = ("gfx942", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120")

# What limits a logit on an H100 SXM: 3.35e12 bytes/s of memory against 132 multiprocessors at
# 1.755 GHz that each issue 4 instructions of 32 lanes a cycle, 16 lanes of them special functions.
BYTES_A_SECOND = 3.35e12
INSTRUCTIONS_A_SECOND = 132 * 1.755e9 * 4 * 32
SPECIALS_A_SECOND = 132 * 1.755e9 * 16
REGISTERS = 65536

# The interpreter is chosen when a kernel is defined; here the compiler is wanted.
COMPILED = {**os.environ, "TRITON_INTERPRET": "0"}


@dataclass(frozen=True)
class Case:
    """A kernel, the types of its pointers, its constants, and its size."""

    kernel: str
    logits: str
    constants: dict[str, Any]
    block: int
    warps: int
    bytes_a_logit: int  # of memory traffic, all sweeps together; 0 for kernels over tokens

    @property
    def name(self) -> str:
        softcap = ", softcap" if self.constants.get("HAS_SOFTCAP") else ""
        return f"{self.kernel} {self.logits}{softcap}"


@dataclass(frozen=True)
class Reading:
    """What the machine code says."""

    case: str
    target: str
    block: int
    warps: int
    registers: int
    spills: int
    wide_loads: bool
    wide_stores: bool
    hints: bool
    instructions: float  # a logit, all sweeps together; 0 where not counted
    specials: float
    bytes_a_logit: int
    softcap: bool


# A size far beyond the table's, which does not fit the registers: the gate must say so.
GREEDY = Case(
    "token_logprobs_kernel", "fp32", {"TEMPERATURE_KIND": 0, "HAS_SOFTCAP": False}, 32768, 4, 4
)


def cases() -> Iterator[Case]:
    from fastppo.ops.backends.sizes import (
        ADVANTAGES_SCAN,
        BLOCK,
        GAE_SCAN,
        PAIR_CONFIGS,
        ROW_CONFIGS,
    )
    from fastppo.ops.surrogate import TERMS

    row = {"TEMPERATURE_KIND": 2}
    loss = {
        "KL_KIND": "k3",
        "KL_COEF_ON_DEVICE": True,
        "ENTROPY_COEF_ON_DEVICE": True,
        "GRAD_SCALE_ON_DEVICE": True,
        "HAS_ENTROPY": True,
        "HAS_DUAL_CLIP": True,
        "TERMS": TERMS,
    }
    for logits, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for configs, pair in ((ROW_CONFIGS, False), (PAIR_CONFIGS, True)):
            for vocab, config in configs[size]:
                shape = (config.block, config.warps)
                largest = vocab == configs[size][-1][0]
                if not largest and logits == "fp16":
                    continue  # as bf16, but for the conversions
                for softcap in (False, True) if largest else (False,):
                    common = {**row, "HAS_SOFTCAP": softcap}
                    if pair:
                        yield Case("score_tokens_kernel", logits, common, *shape, 2 * size)
                        continue
                    yield Case("token_logprobs_kernel", logits, common, *shape, size)
                    yield Case("token_logprobs_backward_kernel", logits, common, *shape, 2 * size)
                    yield Case("policy_loss_kernel", logits, {**common, **loss}, *shape, 2 * size)
    yield Case("sum_rows_kernel", "fp32", {"MAXIMUM": 2, "LAST": TERMS - 1}, 1024, 4, 0)
    scale = {"DIVISOR_ON_DEVICE": True, "column_stride": 1}
    yield Case("scale_unless_one_kernel", "bf16", scale, 4096, 8, 0)
    yield Case("token_kl_kernel", "fp32", {"KIND": "k3"}, BLOCK, 4, 0)
    yield Case("value_loss_kernel", "fp32", {"HAS_CLIP": True}, BLOCK, 4, 0)
    yield Case("moments_kernel", "fp32", {}, BLOCK, 4, 0)
    yield Case("merge_moments_kernel", "fp32", {}, BLOCK, 4, 0)
    yield Case("whiten_kernel", "fp32", {"SHIFT_MEAN": True}, BLOCK, 4, 0)
    yield Case("gae_kernel", "fp32", {}, *GAE_SCAN.values(), 0)
    scan = {"KL_KIND": "k3", "KL_COEF_ON_DEVICE": True, "REWARDS_ONLY": False}
    yield Case("advantages_kernel", "fp32", scan, *ADVANTAGES_SCAN.values(), 0)


def all_kernels() -> dict[str, Any]:
    from fastppo.kernels import (
        advantages,
        gae,
        policy_loss,
        score_tokens,
        sums,
        token_kl,
        token_logprobs,
        value_loss,
        whiten,
    )

    modules = (
        advantages,
        gae,
        policy_loss,
        score_tokens,
        sums,
        token_kl,
        token_logprobs,
        value_loss,
        whiten,
    )
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and value.fn.__module__ == module.__name__
    }


INTEGERS = {
    "V",
    "n",
    "parts",
    "reward_parts",
    "stride",
    "ignore_index",
    "first_row",
    "columns",
    "blocks",
}
# The parameters that a kernel may find behind a pointer.
SCALARS = {
    "kl_coef": "KL_COEF_ON_DEVICE",
    "entropy_coef": "ENTROPY_COEF_ON_DEVICE",
    "grad_scale": "GRAD_SCALE_ON_DEVICE",
    "divisor": "DIVISOR_ON_DEVICE",
    "temperature": "TEMPERATURE_KIND",
}


def compile_case(case: Case, target: str) -> Any:
    """Through Triton's own compiler, arguments aligned as those of a usual vocabulary are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = all_kernels()[case.kernel]
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    given = {**case.constants, "BLOCK": case.block}
    fixed = {
        kernel.params[i].name
        for i in range(len(kernel.params))
        if kernel.params[i].do_not_specialize
    }
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        # An integer argument of 1 is a constant too, unless the kernel forbids it.
        if parameter.is_constexpr or name in given:
            signature[name], constants[(i,)] = "constexpr", given.pop(name)
            continue
        aligned = True
        if name in ("x_ptr", "dx_ptr") or (name == "ref_ptr" and "score" in case.kernel):
            signature[name] = f"*{case.logits}"
        elif name in ("token_ptr", "offsets_ptr"):
            signature[name] = "*i64" if name == "token_ptr" else "*i32"
        elif name.endswith("_ptr") or given.get(SCALARS.get(name, ""), False):
            signature[name] = "*fp32"
        elif name in INTEGERS or name.endswith("_stride"):
            signature[name], aligned = "i32", name not in fixed
        else:
            signature[name], aligned = "fp32", False
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    assert not given, f"{case.kernel} has no constant {', '.join(given)}"
    where = (
        GPUTarget("hip", target, 64)
        if target.startswith("gfx")
        else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    )
    source = ASTSource(kernel, signature, constants, attributes)
    warps = case.warps // 2 if where.warp_size == 64 else case.warps
    return triton.compile(source, target=where, options={"num_warps": warps})


def tool(name: str, *arguments: str, cwd: Path | None = None) -> str:
    """What one of the disassemblers that Triton brings prints."""
    import triton

    command = [Path(triton.__file__).parent / "backends/nvidia/bin" / name, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def disassembled(cubins: list[bytes], target: str) -> list[tuple[str, str]]:
    """Resource usage and SASS of each, their addresses counted on from one to the next.

    A start of the disassembler takes half a second and a kernel next to nothing: it is started
    once, for the instructions of all of them in one file.
    """
    usages, texts = [], []
    for cubin in cubins:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "kernel.cubin").write_bytes(cubin)
            usages.append(tool("cuobjdump", "--dump-resource-usage", "kernel.cubin", cwd=folder))
            tool("cuobjdump", "--extract-text", "all", "kernel.cubin", cwd=folder)
            (text,) = folder.glob("*.elf.bin")
            texts.append(text.read_bytes())
    capability = int(target.removeprefix("sm_"))
    family = f"SM{capability}a" if capability >= 90 else f"SM{capability}"
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "all.bin").write_bytes(b"".join(texts))
        lines = tool("nvdisasm", "--binary", family, "all.bin", cwd=Path(name)).splitlines()
    code = [
        (int(found[1], 16), x) for x in lines if (found := re.match(r"\s*/\*([0-9a-f]{4,})", x))
    ]
    start, listings = 0, []
    for text in texts:
        end = start + len(text)
        listings.append("\n".join(x for address, x in code if start <= address < end))
        start = end
    return list(zip(usages, listings, strict=True))


def row_loops(sass: str, itemsize: int) -> list[tuple[float, float]]:
    """Instructions and special functions a logit of each loop that goes over a row."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    code = [(int(address, 16), text) for address, text in found]
    loops = []
    for address, text in code:
        jump = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text)
        if not jump or int(jump[1], 16) >= address:
            continue
        body = [t for a, t in code if int(jump[1], 16) <= a <= address]
        specials = sum("MUFU" in t for t in body)
        loaded = sum(16 for t in body if "LDG" in t and ".128" in t)
        if specials and loaded:
            logits = loaded // itemsize
            loops.append((len(body) / logits, specials / logits))
    return loops


def read(wanted: list[Case], target: str) -> list[Reading]:
    """All of them compiled, and their machine code looked at."""
    compiled = [compile_case(case, target) for case in wanted]
    if target.startswith("gfx"):
        texts = [x.asm["amdgcn"] for x in compiled]
        return [read_amd(case, target, x) for case, x in zip(wanted, texts, strict=True)]
    listings = disassembled([x.asm["cubin"] for x in compiled], target)
    return [read_nvidia(case, target, *x) for case, x in zip(wanted, listings, strict=True)]


def read_amd(case: Case, target: str, text: str) -> Reading:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]

    spilled = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    return Reading(
        case.name,
        target,
        case.block,
        case.warps,
        registers=number("vgpr_count"),
        spills=sum(map(number, spilled)),
        wide_loads="load_dwordx4" in text,
        wide_stores="store_dwordx4" in text and not re.search(r"store_(dwordx2|short)", text),
        hints=True,  # it has no such hint to look for
        instructions=0.0,
        specials=0.0,
        bytes_a_logit=case.bytes_a_logit,
        softcap=bool(case.constants.get("HAS_SOFTCAP")),
    )


def read_nvidia(case: Case, target: str, usage: str, sass: str) -> Reading:
    instructions = specials = 0.0
    # Read and wanted again, read for the last time, written and not read again.
    first = r"LDG\S*\.EF" if "score" in case.kernel else r"LDG\S*\.EL"
    wanted = [r"LDG\S*\.EF"] if "backward" in case.kernel else [first]
    if wrote_gradient(case):
        wanted += [r"LDG\S*\.EF", r"STG\S*\.EF"]
    if case.bytes_a_logit:
        loops = row_loops(sass, 4 if case.logits == "fp32" else 2)
        # The two rows of a scored token are one logit each.
        share = 2 if "score" in case.kernel else 1
        instructions = share * sum(count for count, _ in loops)
        specials = share * sum(count for _, count in loops)
    return Reading(
        case.name,
        target,
        case.block,
        case.warps,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        spills=sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        wide_loads=re.search(r"LDG\S*\.E[LF]\.128", sass) is not None,
        wide_stores=re.search(r"STG\S*\.EF\.128", sass) is not None,
        hints=all(re.search(pattern, sass) for pattern in wanted),
        instructions=round(instructions, 1),
        specials=round(specials, 2),
        bytes_a_logit=case.bytes_a_logit,
        softcap=bool(case.constants.get("HAS_SOFTCAP")),
    )


def wrote_gradient(case: Case) -> bool:
    return case.kernel in ("policy_loss_kernel", "token_logprobs_backward_kernel")


def limits(bytes_a_logit: int) -> tuple[float, float]:
    """Instructions and special functions a logit at which arithmetic takes as long as memory."""
    logits_a_second = BYTES_A_SECOND / bytes_a_logit
    return INSTRUCTIONS_A_SECOND / logits_a_second, SPECIALS_A_SECOND / logits_a_second


def most_registers(warps: int) -> int:
    """Two programs share a multiprocessor: one sweeps while the other waits at its reductions."""
    return min(255, REGISTERS // (2 * 32 * warps))


def table(readings: list[Reading]) -> str:
    """Markdown, the kernels over logits."""
    lines = [
        "| kernel | logits a step x warps | registers | spills | instructions a logit (limit) "
        "| special functions (limit) |",
        "|---|---|---|---|---|---|",
    ]
    for r in readings:
        if not r.bytes_a_logit:
            continue
        size = f"{r.block} x {r.warps}"
        if not r.target.startswith("sm_"):
            lines.append(f"| {r.case} | {size} | {r.registers} | {r.spills} | | |")
            continue
        most, special = limits(r.bytes_a_logit)
        lines.append(
            f"| {r.case} | {size} | {r.registers} | {r.spills} | {r.instructions} ({most:.0f}) | "
            f"{r.specials} ({special:.1f}) |"
        )
    return "\n".join(lines)


def readings(target: str) -> list[Reading]:
    """In a process of its own, since this one may have chosen the interpreter."""
    command = [sys.executable, "-m", "tests.static.gate", target]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=COMPILED)
    assert done.returncode == 0, done.stderr[-3000:]
    return [Reading(**json.loads(line)) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        beyond = [GREEDY] if name == FAST[0] else []
        for reading in read([*cases(), *beyond], name):
            print(json.dumps(asdict(reading)), flush=True)
