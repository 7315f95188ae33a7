"""python -m benchmarks NAME [--quick] [--out FILE]; --help lists the names."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    before_after,
    demo_seeds,
    host,
    integrations,
    linear,
    mixed_adapters,
    ops,
    report,
    rollout,
    seven_b_head,
    shared_prompts,
    step,
)
from benchmarks.harness import ROUNDS, Case, measure
from tests.ops.registry import OPS

# A round of the large head, or of long prompts, is a minute.
FEWER_ROUNDS = 3


def run(cases: Iterable[Case], rounds: int, load: report.Load) -> list[dict[str, Any]]:
    """All rows, each case's contenders among themselves."""
    rows = []
    for case in cases:
        began = time.perf_counter()
        found = measure(case, rounds, load)
        rows += found
        title = ", ".join(str(value) for value in case.fields.values())
        print(f"{title}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        torch._dynamo.reset()  # a case's compilations are no other's
    return rows


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = made.add_subparsers(dest="name", required=True)
    tables = (host, linear, mixed_adapters, ops, seven_b_head, shared_prompts)
    for module in tables:
        name = module.__name__.removeprefix("benchmarks.")
        one = commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        one.add_argument("--quick", action="store_true", help="toy sizes: a walk, no measurement")
        one.add_argument("--out", type=Path, metavar="FILE", help="the JSON; a .md goes beside it")
        rounds = FEWER_ROUNDS if name in ("seven_b_head", "shared_prompts") else ROUNDS
        one.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
        if name == "ops":
            one.add_argument("--only", nargs="+", choices=list(OPS), metavar="OP")
        if name == "linear":
            sizes = [shape.n for shape in linear.SHAPES]
            one.add_argument(
                "--tokens", type=int, nargs="+", choices=sizes, default=sizes, help="of which sizes"
            )
            one.add_argument(
                "--dtype", choices=list(linear.BY_NAME), default="float32", help="of the operands"
            )
            one.add_argument("--ours", action="store_true", help="the bare GEMMs and fastppo alone")
        if name == "seven_b_head":
            one.add_argument("--n", type=int, default=seven_b_head.HEAD.n, help="tokens")
    rollout.add_arguments(
        commands.add_parser("rollout", help=(rollout.__doc__ or "").splitlines()[0])
    )
    integrations.add_arguments(
        commands.add_parser("integrations", help=(integrations.__doc__ or "").splitlines()[0])
    )
    before_after.add_arguments(
        commands.add_parser("before_after", help=(before_after.__doc__ or "").splitlines()[0])
    )
    demo_seeds.add_arguments(
        commands.add_parser("demo_seeds", help=(demo_seeds.__doc__ or "").splitlines()[0])
    )
    one = commands.add_parser("step", help=(step.__doc__ or "").splitlines()[0])
    one.add_argument("--quick", action="store_true", help="4 tokens and 1 epoch: no measurement")
    one.add_argument("--out", type=Path, metavar="FILE", help="the JSON; a .md goes beside it")
    one.add_argument("--steps", type=int, default=3, help="PPO steps of each contender (3)")
    one.add_argument("--model", type=Path, default=step.MODEL, help=f"default {step.MODEL}")
    one.add_argument("--prompts", type=int, nargs="+", choices=(4, 8), default=[4, 8])
    one.add_argument("--checkpointing", nargs="+", choices=("on", "off"), default=["on", "off"])
    one.add_argument("--peer", nargs="+", choices=("llamafactory", "trl"), help="only against it")
    one.add_argument("--ours", action="store_true", help="fastppo alone")
    one.add_argument("--add", action="store_true", help="to the rows that the JSON has already")
    return made


def main(argv: list[str] | None = None) -> int:
    """0, or 1 where an operator of ours gave a wrong answer, failed, or took too much memory."""
    argv = sys.argv[1:] if argv is None else argv
    asked = parser().parse_args(argv)
    if asked.name == "step":
        return step.main(asked, argv)
    if asked.name == "rollout":
        return rollout.main(asked, argv)
    if asked.name == "demo_seeds":
        return demo_seeds.main(asked, argv)
    if asked.name == "before_after":
        return before_after.main(asked, argv)
    if asked.name == "integrations":
        return integrations.main(asked, argv)
    before, load = report.Load(), report.Load()
    with before:
        time.sleep(0.1 if asked.quick else 1.0)
    if not asked.quick and (said := report.warning(before.others())):
        print(f"benchmarks: {said}", file=sys.stderr)
    notes, within = [], True
    if asked.name == "host":
        rows = run(host.cases(), asked.rounds, load)
        notes = host.ratios(rows)
    elif asked.name == "linear":
        cases = linear.cases(asked.quick, asked.tokens, linear.BY_NAME[asked.dtype])
        rows = run(linear.ours(cases) if asked.ours else cases, asked.rounds, load)
        notes = linear.ratios(rows)
    elif asked.name == "mixed_adapters":
        rows = run(mixed_adapters.cases(asked.quick), asked.rounds, load)
    elif asked.name == "shared_prompts":
        rows = run(shared_prompts.cases(asked.quick), asked.rounds, load)
        notes = shared_prompts.ratios(rows)
    elif asked.name == "ops":
        rows = run(ops.cases(asked.quick, asked.only), asked.rounds, load)
    else:
        rows = run(seven_b_head.cases(asked.quick, asked.n), asked.rounds, load)
        notes, within = seven_b_head.memory_note(rows)
    if asked.quick:
        notes.append("toy sizes: a walk through the code, no measurement")
    found = report.result(asked.name, rows, before, load, notes, argv)
    print(report.markdown(found))
    for path in report.save(found, asked.out, keep=not asked.quick):
        print(path)
    ours = [row for row in rows if row.get("ours")]
    return 0 if within and all(row["status"] == "timed" for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
