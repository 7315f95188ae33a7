"""Whether a change made an operator slower: this checkout beside another one, built before it.

    git worktree add ../before REVISION && (cd ../before && python setup.py build_ext --inplace)
    python -m benchmarks before_after ../before

Each checkout has processes of its own, in turns, because one process can import only one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PROCESSES = 3  # of each checkout
# Of each call; of one over logits fewer.
CALLS, CALLS_OF_LOGITS = 200, 15
TOKENS, SEQUENCE = 65536, 1024
LOGITS = ((512, 49152), (256, 151936))


def calls(quick: bool) -> list[tuple[str, int, Callable[[], Any]]]:
    """Operators that both checkouts have, forward and, where there is one, backward."""
    from fastppo import ops

    torch.manual_seed(0)
    found: list[tuple[str, int, Callable[[], Any]]] = []
    n, sequence = (64, 16) if quick else (TOKENS, SEQUENCE)
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        a_N, b_N, c_N = (torch.randn(n, dtype=dtype) for _ in range(3))
        offsets, score_B = torch.arange(0, n + 1, sequence), torch.randn(n // sequence, dtype=dtype)
        live_N = torch.ones(n)
        found += [
            (f"gae {kind}", CALLS, lambda a=a_N, b=b_N, o=offsets: ops.gae(a, b, o)),
            (
                f"advantages {kind}",
                CALLS,
                lambda s=score_B, a=a_N, b=b_N, c=c_N, o=offsets: ops.advantages(
                    s, a, b, c, o, kl_coef=0.1
                ),
            ),
            (f"whiten {kind}", CALLS, lambda a=a_N, w=live_N: ops.whiten(a, weight_N=w)),
            (
                f"token_kl {kind}",
                CALLS,
                trained(a_N, lambda x, b=b_N: ops.token_kl(x, b).sum()),
            ),
            (
                f"value_loss {kind}",
                CALLS,
                trained(a_N, lambda x, b=b_N, c=c_N, w=live_N: ops.value_loss(x, b, c, w).loss),
            ),
        ]
        for rows, vocab in [(4, 64)] if quick else LOGITS:
            token_N = torch.randint(vocab, (rows,))
            x_NV, other_NV = (torch.randn(rows, vocab, dtype=dtype) for _ in range(2))
            old_N, advantage_N = torch.randn(2, rows)
            weight_N = torch.full((rows,), 1 / rows)
            size = f"{rows} x {vocab} {kind}"
            found += [
                (
                    f"token_logprobs {size}",
                    CALLS_OF_LOGITS,
                    trained(x_NV, lambda x, t=token_N: ops.token_logprobs(x, t).logprob_N.sum()),
                ),
                (
                    f"policy_loss {size}",
                    CALLS_OF_LOGITS,
                    trained(
                        x_NV,
                        lambda x, t=token_N, o=old_N, a=advantage_N, w=weight_N: (
                            ops.policy_loss(x, t, o, a, w).loss
                        ),
                    ),
                ),
                (
                    f"score_tokens {size}",
                    CALLS_OF_LOGITS,
                    lambda x=x_NV, y=other_NV, t=token_N: ops.score_tokens(x, y, t),
                ),
            ]
    return found


def trained(x: torch.Tensor, loss: Callable[..., torch.Tensor]) -> Callable[[], Any]:
    """A forward and a backward with respect to x."""
    leaf = x.clone().requires_grad_()

    def call() -> None:
        leaf.grad = None
        loss(leaf).backward()

    return call


def measure(quick: bool) -> dict[str, float]:
    """Milliseconds of each call, the median; of the checkout that Python finds."""
    found = {}
    for name, number, call in calls(quick):
        call()
        taken = []
        for _ in range(2 if quick else number):
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
        found[name] = statistics.median(taken) * 1e3
    return found


def in_process(checkout: Path, quick: bool) -> dict[str, float]:
    """`measure` in a process that imports fastppo from a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, str(Path(__file__).resolve()), *(["--quick"] if quick else [])]
    ran = subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.PIPE)
    times: dict[str, float] = json.loads(ran.stdout)
    return times


def compare(before: Path, quick: bool) -> list[dict[str, Any]]:
    """A row a call: the median of each process, and the ratio of their medians, now to before."""
    olds: list[dict[str, float]] = []
    news: list[dict[str, float]] = []
    for _ in range(1 if quick else PROCESSES):
        for checkout, found in ((before, olds), (ROOT, news)):
            found.append(in_process(checkout, quick))
    rows = []
    for name in news[0]:
        old, new = ([one[name] for one in found] for found in (olds, news))
        ratio = statistics.median(new) / statistics.median(old)
        rows.append({"call": name, "before_ms": old, "now_ms": new, "ratio": ratio})
    return rows


def revision(checkout: Path) -> str:
    """The commit of a checkout, as a line."""
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%h %cs"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def markdown(found: dict[str, Any]) -> str:
    """The page of a result."""
    machine = found["machine"]
    lines = [
        f"# before_after, {found['date']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores; torch {machine['torch']}, "
        f"{machine['threads']} threads; `{found['command']}`. Milliseconds of a call with its "
        f"backward, if it has one: the median of {PROCESSES} processes, whose medians are least "
        f"and most. Before is commit {found['before']}, now {found['now']}.",
        "",
        *(f"- {note}" for note in found["notes"]),
        *([""] if found["notes"] else []),
        "| call | before | now | ratio |",
        "|---|---|---|---|",
    ]
    for row in found["rows"]:
        cells = (
            f"{statistics.median(times):.3g} ({min(times):.3g} to {max(times):.3g})"
            for times in (row["before_ms"], row["now_ms"])
        )
        lines.append(f"| `{row['call']}` | {' | '.join(cells)} | {row['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


def main(asked: argparse.Namespace, argv: Sequence[str]) -> int:
    """0; the result is a table, which nothing judges: a ratio of 1.1 may be the machine's."""
    # Not at the head: a child has the other checkout's `benchmarks`, if any.
    from benchmarks import report
    from benchmarks.integrations import OthersLoad

    before, load = OthersLoad(), OthersLoad()
    with before:
        time.sleep(0.1 if asked.quick else 1.0)
    with load:
        rows = compare(asked.checkout.resolve(), asked.quick)
    notes = ["toy sizes: a walk through the code, no measurement"] if asked.quick else []
    found = report.result("before_after", rows, before, load, notes, argv)
    found |= {"before": revision(asked.checkout), "now": revision(ROOT)}
    print(markdown(found))
    if out := asked.out or (None if asked.quick else report.RESULTS / "before_after.json"):
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    return 0


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("checkout", type=Path, help="of the commit before, its library built")
    one.add_argument("--quick", action="store_true", help="toy sizes: a walk, no measurement")
    one.add_argument("--out", type=Path, metavar="FILE", help="the JSON; a .md goes beside it")


if __name__ == "__main__":
    print(json.dumps(measure("--quick" in sys.argv)))
