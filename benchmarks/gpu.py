"""Everything that only a GPU can show, in one call: `make gpu`, or python -m benchmarks.gpu.

Needs torch, triton and pytest, from a checkout without installing; no network; meant for under
eight minutes. Each section writes its JSON when it ends, so that a limit loses nothing; a Markdown
table comes last. With --rehearse it walks through itself at toy sizes on the CPU, under Triton's
interpreter: nothing that it prints then is a measurement, and nothing is kept.

`python -m benchmarks.gpu seven_b` is the trainer itself on a 7B, see benchmarks/seven_b.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROUNDS = 15


@dataclass(frozen=True)
class Plan:
    """Where and how large."""

    device: str
    rows: int
    vocabularies: tuple[int, ...]
    hidden: int
    rounds: int
    # A 7B's head, which has to fit in 1 GB above its weight: tokens, vocabulary, hidden size.
    large: tuple[int, int, int]


REAL = Plan("cuda", 4096, (32000, 128256, 151936), 4096, ROUNDS, (2048, 152064, 3584))
TOY = Plan("cpu", 4, (96,), 8, 2, (3, 64, 8))

Contender = Callable[[], Any]


def milliseconds(contenders: dict[str, Contender], plan: Plan) -> dict[str, float]:
    """Median of each, taken in turns, the L2 cache washed before each."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()  # compiled, and its memory reserved
    if plan.device == "cpu":
        for name, call in contenders.items():
            began = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - began))
        return {name: statistics.median(taken) for name, taken in times.items()}
    wash = torch.empty(256 << 20, dtype=torch.uint8, device=plan.device)
    for _ in range(plan.rounds):
        for name, call in contenders.items():
            wash.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(taken) for name, taken in times.items()}


def peak_bytes(call: Contender, plan: Plan) -> int:
    """The most that is allocated during a call, above what was there."""
    if plan.device == "cpu":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def environment(plan: Plan) -> dict[str, Any]:
    import triton

    gpu = torch.cuda.get_device_properties(0) if plan.device == "cuda" else None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": gpu.name if gpu else platform.processor() or "CPU, interpreted",
        "memory_gib": round(gpu.total_memory / 2**30, 1) if gpu else 0,
        "multiprocessors": gpu.multi_processor_count if gpu else 0,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def tests(plan: Plan) -> dict[str, Any]:
    """The oracle tests on the device, then those of real sizes; a rehearsal only collects them."""
    found = {}
    for folder in ("tests/ops", "tests/gpu"):
        command = [sys.executable, "-m", "pytest", folder, "-q", "-p", "no:cacheprovider"]
        if plan.device == "cpu":
            command += ["--collect-only"]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        found[folder] = {
            "exit": done.returncode,
            "summary": lines[-1] if lines else done.stderr[-500:],
            "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(f"{folder}: {found[folder]['summary']}", flush=True)
    return found


def peers(logits: Tensor, token: Tensor) -> dict[str, Contender]:
    """Log-probs of others, where they are installed; forward alone."""
    found: dict[str, Contender] = {}
    try:
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

        found["flash-attention"] = lambda: cross_entropy_loss(logits, token)[0]
    except ImportError:
        pass
    try:
        from quack import cross_entropy

        found["quack"] = lambda: cross_entropy(logits, token)
    except ImportError:
        pass
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy

        found["Liger"] = lambda: liger_cross_entropy(logits, token, reduction="none")
    except ImportError:
        pass
    return found


def dense_inputs(plan: Plan, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    device, n = plan.device, plan.rows
    generator = torch.Generator(device=device).manual_seed(0)
    logits = torch.randn(n, vocab, device=device, generator=generator).mul_(2).to(dtype)
    vector = torch.randn(4, n, device=device, generator=generator)
    return {
        "logits": logits,
        "token": torch.randint(vocab, (n,), device=device, generator=generator),
        "behaviour": vector[0] * 0.1 - 10,
        "ref": vector[1] * 0.1 - 10,
        "advantage": vector[2],
        "weight": torch.full((n,), 1 / n, device=device),
    }


def eager_loss(given: dict[str, Any]) -> Tensor:
    """As trainers write it: float32, log-softmax, gather, clip, KL, entropy, autograd."""
    log_p = torch.log_softmax(given["logits"].float(), dim=-1)
    logprob = log_p.gather(1, given["token"][:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    ratio = (logprob - given["behaviour"]).exp()
    a = given["advantage"]
    worst = torch.max(-a * ratio, -a * ratio.clamp(0.8, 1.2))
    away = given["ref"] - logprob
    kl = away.exp() - 1 - away
    return (given["weight"] * (worst + 0.1 * kl - 0.01 * entropy)).sum()


def dense(plan: Plan) -> list[dict[str, Any]]:
    """Each op over logits: time, share of a copy of as many bytes, peak memory."""
    dtypes = (torch.bfloat16, torch.float32)
    return [row for v in plan.vocabularies for d in dtypes for row in dense_case(plan, v, d)]


def dense_case(plan: Plan, vocab: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One vocabulary and dtype."""
    from fastppo.ops import policy_loss, score_tokens, token_logprobs

    compiled = torch.compile(eager_loss)
    given = dense_inputs(plan, vocab, dtype)
    logits, token = given["logits"], given["token"]
    other = logits + 0.1
    size = logits.numel() * logits.element_size()
    buffer = torch.empty_like(logits)
    leaf = logits.clone().requires_grad_()
    forced = {"backend": "triton"}

    def loss_of(source: Tensor, inplace: bool = False) -> None:
        policy_loss(
            source,
            token,
            given["behaviour"],
            given["advantage"],
            given["weight"],
            ref_logprob_N=given["ref"],
            kl_coef=0.1,
            entropy_coef=0.01,
            inplace=inplace,
            **forced,
        ).loss.backward()

    def eager(function: Callable[[dict[str, Any]], Tensor]) -> None:
        leaf.grad = None
        function({**given, "logits": leaf}).backward()

    def fused() -> None:
        leaf.grad = None
        loss_of(leaf)

    def logprobs() -> None:
        with torch.no_grad():
            token_logprobs(logits, token, **forced)

    work = leaf * 1  # what in place writes over; its numbers do not matter

    def in_place() -> None:
        loss_of(work.detach().requires_grad_() * 1, inplace=True)

    def multiply() -> None:
        work.detach().requires_grad_() * 1

    contenders: dict[str, Contender] = {
        "copy": lambda: buffer.copy_(logits),
        "token_logprobs": logprobs,
        "score_tokens": lambda: score_tokens(logits, other, token, **forced),
        "policy_loss": fused,
        "policy_loss, in place, after a multiplication": in_place,
        "the multiplication alone": multiply,
        "eager loss": lambda: eager(eager_loss),
    }
    if plan.device == "cuda":
        contenders["torch.compile loss"] = lambda: eager(compiled)
        contenders |= peers(logits, token)
    taken = milliseconds(contenders, plan)
    moved = {"copy": 2, "token_logprobs": 1, "score_tokens": 2, "policy_loss": 2}
    speed = 2 * size / taken["copy"]
    rows = [
        {
            "vocab": vocab,
            "rows": plan.rows,
            "dtype": str(dtype).removeprefix("torch."),
            "what": name,
            "ms": round(took, 4),
            "share_of_copy": round(moved[name] * size / took / speed, 3) if name in moved else None,
            "peak_bytes": peak_bytes(contenders[name], plan),
            "logits_bytes": size,
        }
        for name, took in taken.items()
    ]
    print(f"logits {vocab} {dtype}: {taken}", flush=True)
    return rows


def linear(plan: Plan) -> list[dict[str, Any]]:
    """From hidden states: the loss against its two GEMMs and against eager on all logits."""
    rows = [row for vocab in plan.vocabularies for row in linear_case(plan, vocab)]
    n, vocab, hidden = plan.large
    return rows + linear_case(replace(plan, rows=n, hidden=hidden), vocab)


def linear_case(plan: Plan, vocab: int) -> list[dict[str, Any]]:
    """One vocabulary."""
    from fastppo.ops import linear_policy_loss, linear_token_logprobs

    given = dense_inputs(plan, vocab, torch.bfloat16)
    del given["logits"]
    hidden = torch.randn(plan.rows, plan.hidden, device=plan.device, dtype=torch.bfloat16)
    weight = torch.randn(vocab, plan.hidden, device=plan.device, dtype=torch.bfloat16)
    weight *= 2 / plan.hidden**0.5
    leaf = hidden.clone().requires_grad_()
    forced = {"backend": "triton"}

    def fused() -> None:
        leaf.grad = None
        linear_policy_loss(
            leaf,
            weight,
            given["token"],
            given["behaviour"],
            given["advantage"],
            given["weight"],
            ref_logprob_N=given["ref"],
            kl_coef=0.1,
            entropy_coef=0.01,
            **forced,
        ).loss.backward()

    def eager() -> None:
        leaf.grad = None
        eager_loss({**given, "logits": leaf @ weight.T}).backward()

    def gemms() -> None:
        for chunk in hidden.split(1024):
            (chunk @ weight.T) @ weight

    def logprobs() -> None:
        with torch.no_grad():
            linear_token_logprobs(hidden, weight, given["token"], **forced)

    contenders: dict[str, Contender] = {
        "two GEMMs, by 1024 rows": gemms,
        "linear_policy_loss": fused,
        "linear_token_logprobs": logprobs,
        "eager, all logits": eager,
    }
    taken = milliseconds(contenders, plan)
    rows = [
        {
            "vocab": vocab,
            "rows": plan.rows,
            "hidden": plan.hidden,
            "dtype": "bfloat16",
            "what": name,
            "ms": round(took, 4),
            "peak_bytes": peak_bytes(contenders[name], plan),
        }
        for name, took in taken.items()
    ]
    print(f"hidden {vocab}: {taken}", flush=True)
    return rows


def sweep(plan: Plan) -> list[dict[str, Any]]:
    """Every size a launch might take, out of place, against the table's."""
    dtypes = (torch.bfloat16, torch.float32)
    return [row for v in plan.vocabularies for d in dtypes for row in sweep_case(plan, v, d)]


def sweep_case(plan: Plan, vocab: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One vocabulary and dtype."""
    from fastppo.ops.arguments import loss_arguments, row_arguments
    from fastppo.ops.backends import triton
    from fastppo.ops.backends.sizes import candidates, device_of, row_config
    from fastppo.ops.policy_loss import empty_loss_rows

    given = dense_inputs(plan, vocab, dtype)
    logits = given["logits"]
    out = torch.empty_like(logits)
    own = row_arguments(
        "sweep",
        given["token"],
        logits,
        vocab,
        temperature=1.0,
        softcap=None,
        ignore_index=-100,
        check=False,
    )
    loss = loss_arguments(
        "sweep",
        logits,
        behaviour_logprob_N=given["behaviour"],
        advantage_N=given["advantage"],
        weight_N=given["weight"],
        ref_logprob_N=given["ref"],
        importance_weight_N=None,
        offsets=None,
        kl_coef=0.1,
        entropy_coef=0.01,
        config=None,
        grad_scale=None,
    )
    into = empty_loss_rows(logits, "triton")
    everything = slice(0, plan.rows)
    tried = candidates(logits.element_size(), vocab)
    contenders = {
        str(config): (
            lambda config=config: triton.policy_loss(
                logits, out, own, loss, everything, into, config
            )
        )
        for config in (tried if plan.device == "cuda" else tried[:1])
    }
    device = device_of(logits.device)
    table = row_config(logits.element_size(), vocab, twice=True, device=device)
    taken = milliseconds(contenders, plan)
    rows = [
        {
            "vocab": vocab,
            "dtype": str(dtype).removeprefix("torch."),
            "config": name,
            "ms": round(took, 4),
            "in_table": name == str(table),
        }
        for name, took in taken.items()
    ]
    return rows


SECTIONS: dict[str, Callable[[Plan], Any]] = {
    "environment": environment,
    "tests": tests,
    "dense": dense,
    "linear": linear,
    "sweep": sweep,
}


def markdown(results: dict[str, Any]) -> str:
    """What a reader wants of the JSON."""
    where = results["environment"]
    lines = [
        f"# {where['device']}, {where['date']}",
        "",
        f"torch {where['torch']}, triton {where['triton']}; by `make gpu`; milliseconds, medians.",
        "",
        *(f"- {folder}: {one['summary']}" for folder, one in results["tests"].items()),
        "",
        "| rows x vocabulary | dtype | what | ms | share of a copy | peak MiB above inputs |",
        "|---|---|---|---|---|---|",
    ]
    for row in [*results["dense"], *results["linear"]]:
        share = row.get("share_of_copy")
        lines.append(
            f"| {row['rows']} x {row['vocab']} | {row['dtype']} | {row['what']} | {row['ms']} | "
            f"{'' if share is None else share} | {row['peak_bytes'] / 2**20:.0f} |"
        )
    lines += [
        "",
        "| vocabulary | dtype | warps x vectors, programs | ms | in the table |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['vocab']} | {row['dtype']} | {row['config']} | {row['ms']} | "
        f"{'yes' if row['in_table'] else ''} |"
        for row in results["sweep"]
    ]
    return "\n".join(lines) + "\n"


def measure(plan: Plan, folder: Path, sections: list[str]) -> int:
    """Run the sections one by one; 1 if a test failed."""
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name in sections:
        results[name] = SECTIONS[name](plan)
        path = folder / f"{name}.json"
        path.write_text(json.dumps(results[name], indent=1) + "\n", encoding="utf-8")
        print(path, flush=True)
    if set(sections) == set(SECTIONS):
        (folder / "README.md").write_text(markdown(results), encoding="utf-8")
        print(folder / "README.md")
    return int(any(one["exit"] not in (0, 5) for one in results.get("tests", {}).values()))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["seven_b"]:  # the trainer itself: needs transformers and peft
        from benchmarks import seven_b

        return seven_b.main(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--rehearse", action="store_true", help="toy sizes on the CPU, nothing kept"
    )
    asked = parser.parse_args(argv)
    if asked.rehearse:
        if os.environ.get("TRITON_INTERPRET") != "1":
            print("benchmarks.gpu: a rehearsal needs TRITON_INTERPRET=1", file=sys.stderr)
            return 2
        with tempfile.TemporaryDirectory() as folder:
            return measure(TOY, Path(folder), asked.only)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no GPU here; --rehearse walks through without one", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    return measure(REAL, asked.out or RESULTS / f"gpu-{name}", asked.only)


if __name__ == "__main__":
    sys.exit(main())
