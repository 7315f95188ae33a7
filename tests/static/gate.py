"""Every kernel compiled ahead of time, in every size that the launch table chooses, and read.

    TRITON_INTERPRET=0 python -m tests.static.gate TARGET ...    (one JSON line a compilation)

Without targets it takes them from its input, one a line, and ends each with an empty line.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.static.gate_cases import GREEDY, Case, candidate_cases, cases, one_of_each_method

# A target takes long to compile for: the fast suite has the one whose limits are tested, with what
# is launched by default; the slow one every target, and of the candidates all for that one, which
# the page shows, and one of each method for AMD's.
FAST = ("sm_90",)
CANDIDATES = "sm_90, candidates"
SLOW = (CANDIDATES, "gfx942", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120")
# sm_80's instructions and less shared memory: of these two the kernels of one dtype.
LIKE_SM_80 = ("sm_86", "sm_89")


# The interpreter is chosen when a kernel is defined; here the compiler is wanted.
COMPILED = {**os.environ, "TRITON_INTERPRET": "0"}


# Vocabularies that a whole row is counted for: one that 8 divides, one that nothing does, and the
# longest that is held in registers.
VOCABULARIES = (151936, 50257, 32768)

# Bytes of the stack in which scalars of a held row may wait; more would be logits.
FEW_SCALARS = 64


@dataclass(frozen=True)
class Reading:
    """What the machine code says."""

    case: str
    kernel: str
    variant: str
    logits: str
    target: str
    warps: int
    tiles: int
    registers: int
    stack: int  # bytes; scalars that wait for a sweep to end
    spills: int  # loads and stores of it in the loops over a row, or anywhere in other kernels
    wide_loads: bool
    wide_stores: bool
    hints: bool
    instructions: float  # a logit, of all sweeps' loops and reductions; 0 where not counted
    specials: float
    whole: tuple[float, ...]  # instructions a logit of a whole row, for each of VOCABULARIES
    bytes_a_logit: int

    @property
    def softcap(self) -> bool:
        return "softcap" in self.variant


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
    "total",
    "n_rows",
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
    """Through Triton's own compiler; of the pointers only those are aligned that it asks about."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = all_kernels()[case.kernel]
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    given = {**case.constants, **dict.fromkeys(case.absent)}
    if case.tiles:
        given |= {"TILES": case.tiles, "THREADS": 32 * case.warps}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        # An integer argument of 1 is a constant too, unless the kernel forbids it.
        if parameter.is_constexpr or name in given:
            signature[name], constants[(i,)] = "constexpr", given.pop(name)
            continue
        aligned = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        if name in ("x_ptr", "dx_ptr") or (name == "ref_ptr" and "score" in case.kernel):
            of_gradient = case.gradient if name == "dx_ptr" else ""
            signature[name] = f"*{of_gradient or case.logits}"
        elif name in ("token_ptr", "offsets_ptr"):
            signature[name] = "*i64" if name == "token_ptr" else "*i32"
        elif name.endswith("_ptr") or given.get(SCALARS.get(name, ""), False):
            signature[name] = "*fp32"
        elif name in INTEGERS or name.endswith("_stride"):
            signature[name] = "i32"
        else:
            signature[name], aligned = "fp32", False
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    assert not given, f"{case.kernel} has no {', '.join(given)}"
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


@dataclass(frozen=True)
class Loop:
    """An innermost loop over a row: its instructions, and the vectors of 16 bytes that it loads."""

    instructions: int
    specials: int
    vectors: int
    masked: bool  # of a row's last vectors
    local: int  # loads and stores of the stack


@dataclass(frozen=True)
class Code:
    """A kernel's loops over a row in the order of the code, and the instructions outside of them.

    Outside, everything up to the kernel's end counts once, also what a branch would skip.
    """

    loops: list[Loop]
    outside: int
    shared: int  # of these, shuffles, barriers, loads and stores of shared memory
    all: int
    local: int  # loads and stores of the stack, in loops and outside of them


def read_code(sass: str) -> Code:
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    code = [(int(address, 16), text) for address, text in found]
    ends = [address for address, text in code if re.match(r"EXIT\b", text)]
    loops, inside, counted = [], 0, 0
    for address, text in code:
        jump = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text)
        if not jump or int(jump[1], 16) >= address:
            continue
        first = int(jump[1], 16)
        body = [t for a, t in code if first <= a <= address]
        if first <= counted:
            continue  # around a loop that is already counted
        counted = address
        vectors = [t for t in body if "LDG" in t and ".128" in t]
        specials = sum("MUFU" in t for t in body)
        inside += len(body)
        if specials and vectors:
            masked = any(t.lstrip().startswith("@") for t in vectors)
            local = sum(re.search(r"\b(LDL|STL)\b", t) is not None for t in body)
            loops.append(Loop(len(body), specials, len(vectors), masked, local))
    before_end = [text for address, text in code if not ends or address <= max(ends)]
    shared = sum(re.search(r"\b(LDS|STS|SHFL|BAR)\b", text) is not None for text in before_end)
    local = sum(re.search(r"\b(LDL|STL)\b", text) is not None for text in before_end)
    return Code(loops, len(before_end) - inside, shared, len(before_end), local)


def of_whole_row(case: Case, code: Code, vocab: int) -> float:
    """Instructions a logit of a row from its first to its last, reductions included."""
    rows = 2 if "score" in case.kernel else 1
    threads = 32 * case.warps
    vector = 16 // case.itemsize
    if case.method == "held":
        return code.all * threads / vocab if vocab <= threads * vector * case.tiles else 0.0
    rounds = -(-vocab // (threads * vector))
    whole = rounds // case.tiles * case.tiles if vocab >= threads * vector * case.tiles else 0
    total = float(code.outside)
    for loop in code.loops:
        trips = (rounds - whole if loop.masked else whole) * rows / loop.vectors
        total += trips * loop.instructions
    return total * threads / vocab


def read(wanted: list[Case], target: str) -> list[Reading]:
    """All of them compiled, and their machine code looked at."""
    compiled = [compile_case(case, target) for case in wanted]
    if target.startswith("gfx"):
        texts = [x.asm["amdgcn"] for x in compiled]
        return [read_amd(case, target, x) for case, x in zip(wanted, texts, strict=True)]
    listings = disassembled([x.asm["cubin"] for x in compiled], target)
    return [read_nvidia(case, target, *x) for case, x in zip(wanted, listings, strict=True)]


def reading(case: Case, target: str, **found: Any) -> Reading:
    return Reading(
        case.name,
        case.kernel,
        case.variant,
        case.logits,
        target,
        case.warps,
        case.tiles,
        bytes_a_logit=case.bytes_a_logit,
        **found,
    )


def read_amd(case: Case, target: str, text: str) -> Reading:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]

    # A scalar that has no register waits in a lane of a vector register, and not in memory.
    return reading(
        case,
        target,
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        spills=number("vgpr_spill_count"),
        wide_loads="load_dwordx4" in text,
        wide_stores="store_dwordx4" in text,
        hints=True,  # it has no such hint to look for
        instructions=0.0,
        specials=0.0,
        whole=(),
    )


def read_nvidia(case: Case, target: str, usage: str, sass: str) -> Reading:
    instructions = specials = 0.0
    stack = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    whole: tuple[float, ...] = ()
    # Read and wanted again, read for the last time, written and not read again.
    first = r"LDG\S*\.EF" if "score" in case.kernel else r"LDG\S*\.EL"
    wanted = [r"LDG\S*\.EF"] if "backward" in case.kernel else [first]
    if case.method in ("held", "second launch"):  # a row is read once by this launch
        wanted = []
    if case.writes:
        wanted += [r"LDG\S*\.EF", r"STG\S*\.EF"]
    if case.bytes_a_logit:
        code = read_code(sass)
        # The two rows of a scored token are one logit each.
        share = (2 if "score" in case.kernel else 1) * case.itemsize / 16
        full = [loop for loop in code.loops if not loop.masked]
        spills = sum(loop.local for loop in code.loops)
        instructions = share * sum(loop.instructions / loop.vectors for loop in full)
        instructions += code.shared * 32 * case.warps / VOCABULARIES[0]
        specials = share * sum(loop.specials / loop.vectors for loop in full)
        if case.method == "held":  # no loop: all there is, at the longest row
            instructions = code.all * case.itemsize / (16 * case.tiles)
            spills = code.local if stack > FEW_SCALARS else 0
            specials = len(re.findall(r"\bMUFU", sass)) * case.itemsize / (16 * case.tiles)
        whole = tuple(round(of_whole_row(case, code, v), 1) for v in VOCABULARIES)
    stored = "64" if case.gradient else "128"
    return reading(
        case,
        target,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        stack=stack,
        spills=spills,
        wide_loads=re.search(r"LDG\S*\.E[LF]\.128", sass) is not None,
        wide_stores=re.search(rf"STG\S*\.EF\.{stored}", sass) is not None,
        hints=all(re.search(pattern, sass) for pattern in wanted),
        instructions=round(instructions, 1),
        specials=round(specials, 2),
        whole=whole,
    )


def table(readings: list[Reading]) -> str:
    """Markdown, the kernels over logits: size, registers, instructions."""
    lines = [
        "| kernel | warps x vectors | registers | stack | instructions a logit, sweeps "
        "| whole row, V 151936 | V 50257 | V 32768 | special functions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in readings:
        if not r.bytes_a_logit:
            continue
        counted = ("",) * 5
        if r.target.startswith("sm_"):
            whole = (f"{x}" if x else "" for x in r.whole)
            counted = (f"{r.instructions}", *whole, f"{r.specials}")
        cells = (r.case, f"{r.warps} x {r.tiles}", f"{r.registers}", f"{r.stack}", *counted)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


class Compiler:
    """A process that compiles for one target after the other: this one may have the interpreter.

    It starts with the first target, and all of them share what starting takes: torch and Triton.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def readings(self, target: str) -> list[Reading]:
        if self.process is None:
            command = [sys.executable, "-m", "tests.static.gate"]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, text=True, env=COMPILED
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(target, file=self.process.stdin, flush=True)
        found = []
        while (line := self.process.stdout.readline()) != "\n":
            assert line, f"the process that compiles for {target} ended; its error is on stderr"
            one = json.loads(line)
            found.append(Reading(**{**one, "whole": tuple(one["whole"])}))
        return found

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()  # the end of its input
            self.process = None


def wanted(target: str) -> list[Case]:
    """What is compiled: the launches of the table, and candidates where their code is looked at."""
    if target == CANDIDATES:
        return candidate_cases()
    if target in LIKE_SM_80:
        return [case for case in cases() if case.logits == "bf16"]
    extra = {"sm_90": [GREEDY], "gfx942": one_of_each_method()}
    return [*cases(), *extra.get(target, [])]


if __name__ == "__main__":
    for name in sys.argv[1:] or map(str.strip, sys.stdin):
        for found in read(wanted(name), name.partition(",")[0]):
            print(json.dumps(asdict(found)))
        print(flush=True)
