"""Sampling a rollout with SmolLM2-135M under LoRA: tokens a second, ours and transformers'.

All contenders sample from the same weights in one process, in turns: `fastppo` is the sampler of a
rollout; `generate, merged` is transformers' generate with merged adapters, linear layers for few
rows and the log-probs recorded, which is what a rollout was sampled by before; `generate` and
`generate_batch` are transformers' own on the model as it is. `vllm`, where it is installed, is
timed after them, because its processes keep their cores busy while they wait.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks import report, rollout_vllm
from fastppo.models.lora import merge_active_adapters
from fastppo.models.roles import Place, Roles
from fastppo.ops.few_rows import few_rows_linear, suits
from fastppo.ppo.cpu_layers import use_cpu_layers
from fastppo.ppo.row_batches import left_pad
from fastppo.ppo.sampler import Sampler
from fastppo.ppo.sampling import Draws, Sampling, Stops
from fastppo.ppo.slots import windows_of
from fastppo.types import Prompt

MODEL = Path("output/demo/model")
VOCAB = 49152
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
QUICK = {**SHAPE, "hidden_size": 36, "intermediate_size": 64, "num_hidden_layers": 2}
BASELINE = "generate, merged"
Contender = Callable[[list[Prompt], list[int]], int]  # prompts and their lengths -> tokens


class Lengths(Stops):
    """Ends each response at a length of its own."""

    def __init__(self, lengths: dict[int, int]) -> None:
        self.lengths, self.ids, self.strings = lengths, (), None
        self.sampling = Sampling(max(lengths.values()))

    def ended(self, rows: Any) -> list[bool | None]:
        """By the identity of the prompt's list."""
        return [False if len(ids) >= self.lengths[id(prompt)] else None for prompt, ids in rows]


class Until(StoppingCriteria):
    """The same for generate."""

    def __init__(self, prompt: int, lengths: list[int]) -> None:
        self.ends = torch.tensor(lengths) + prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return input_ids.shape[1] >= self.ends


class Record(LogitsProcessor):
    """Log-probs of the tokens that were sampled, as a rollout records them."""

    def __init__(self) -> None:
        self.pending: Tensor | None = None
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.pending is not None:
            chosen = self.pending.gather(1, input_ids[:, -1:]).squeeze(1)
            self.columns.append(chosen - self.pending.logsumexp(1))
        self.pending = scores
        return scores


def under_lora(model: Path, quick: bool) -> tuple[Any, str]:
    """A base under LoRA with random weights, the same at each call, and what it is."""
    torch.manual_seed(0)
    if (model / "model.safetensors").is_file() and not quick:
        base, words = AutoModelForCausalLM.from_pretrained(model), str(model)
    else:
        base = AutoModelForCausalLM.from_config(LlamaConfig(**(QUICK if quick else SHAPE)))
        words = "random weights"
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    peft: Any = get_peft_model(base, lora)
    return peft.eval(), words


def policy_of(model: Any, words: str) -> Roles:
    """The model as the trainer has it: its norms and gated MLPs run by native kernels."""
    place = Place(model, "default", words)
    return Roles({"actor": place, "reference": place}, {}, None, torch.device("cpu"), None)


@contextmanager
def as_before(model: Any) -> Iterator[None]:
    """Merged adapters and linear layers for few rows, as rollouts had them before the sampler."""

    def forward(layer: torch.nn.Linear, x: Tensor) -> Tensor:
        if suits(x, layer.weight):
            return few_rows_linear(x, layer.weight, layer.bias)
        return torch.nn.functional.linear(x, layer.weight, layer.bias)

    layers = [layer for layer in model.modules() if type(layer) is torch.nn.Linear]
    with torch.no_grad(), merge_active_adapters(model):
        for layer in layers:
            layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward


@contextmanager
def as_in_a_rollout(roles: Roles) -> Iterator[None]:
    with torch.no_grad(), merge_active_adapters(roles.base), use_cpu_layers(roles.base):
        yield


def contenders(roles: Roles, plain: Any) -> dict[str, Contender]:
    """Each by its name; a call samples a rollout and returns the number of its tokens.

    `plain` is the same model with transformers' own layers, which all but `fastppo` run.
    """

    def ours(prompts: list[Prompt], lengths: list[int]) -> int:
        own = {id(p.ids): n for p, n in zip(prompts, lengths, strict=True)}
        stops = Lengths(own)
        with as_in_a_rollout(roles):
            made = Sampler(
                roles,
                Draws(stops.sampling, 1),
                stops,
                slots=len(prompts),
                windows=windows_of(roles.one_token_cache()) or (),
            )
            return sum(len(answer.ids) for answer in made.run(prompts))

    def generate(prompts: list[Prompt], lengths: list[int], record: bool = False) -> int:
        ids, mask = left_pad(prompts, 0, roles.device)
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max(lengths),
            do_sample=True,
            top_k=0,
            pad_token_id=0,
            eos_token_id=None,
        )
        plain.generation_config = settings
        until = StoppingCriteriaList([Until(ids.shape[1], lengths)])
        with torch.no_grad():
            plain.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList([Record()] if record else []),
                stopping_criteria=until,
            )
        return sum(lengths)

    def merged(prompts: list[Prompt], lengths: list[int]) -> int:
        with as_before(plain):
            return generate(prompts, lengths, record=True)

    def generate_batch(prompts: list[Prompt], lengths: list[int]) -> int:
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max(lengths), do_sample=True, top_k=0, pad_token_id=0, eos_token_id=-1
        )
        plain.generation_config = settings
        # By default it takes 60% of all memory, and makes masks for batches of 8192 tokens.
        memory = ContinuousBatchingConfig(max_memory_percent=0.05, max_batch_tokens=1024)
        with plain.continuous_batching_context_manager(
            generation_config=settings, continuous_batching_config=memory
        ) as manager:
            for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
                manager.add_request(prompt.ids, request_id=str(i), max_new_tokens=n)
            tokens = 0
            for _ in prompts:
                done = None
                while done is None or not done.is_finished():
                    assert manager.is_running(), "generate_batch has stopped"
                    done = manager.get_result(timeout=1)
                tokens += len(done.generated_tokens)
        assert tokens == sum(lengths), f"{tokens} of {sum(lengths)} tokens"
        return tokens

    return {
        BASELINE: merged,
        "fastppo": ours,
        "generate": generate,
        "generate_batch": generate_batch,
    }


def cases(quick: bool, new: int) -> Iterator[tuple[str, list[Prompt], list[int]]]:
    """Name, prompts of 24 to 56 tokens, and the length of each response."""
    for count in (4, 16):
        numbers = random.Random(count)
        sizes = [numbers.randrange(24, 57) for _ in range(count)]
        prompts = [Prompt([numbers.randrange(1, VOCAB) for _ in range(n)], "") for n in sizes]
        yield f"{count} prompts, {new} tokens each", prompts, [new] * count
        most = 8 if quick else 256
        # From 8 to 256, evenly spaced on a logarithmic scale, in random order.
        spread = [round(8 * (most / 8) ** (i / (count - 1))) for i in range(count)]
        numbers.shuffle(spread)
        yield f"{count} prompts, 8 to {most} tokens", prompts, spread


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("--quick", action="store_true", help="a tiny model: a walk, no measurement")
    one.add_argument("--out", type=Path, metavar="FILE", help="the JSON; a .md goes beside it")
    one.add_argument("--rounds", type=int, default=3, help="default 3")
    one.add_argument("--new", type=int, default=64, help="tokens of equal responses (64)")
    one.add_argument("--model", type=Path, default=MODEL, help=f"default {MODEL}")
    one.add_argument("--only", nargs="+", metavar="CONTENDER")
    one.add_argument("--case", nargs="+", type=int, metavar="N", help="numbers of cases, from 0")


def measure(runs: dict[str, Contender], asked: Any) -> list[dict[str, Any]]:
    """Tokens a second of each contender in each case, in turns."""
    rows: list[dict[str, Any]] = []
    new = 4 if asked.quick else asked.new
    rounds = 1 if asked.quick else asked.rounds
    for number, (case, prompts, lengths) in enumerate(cases(asked.quick, new)):
        if asked.case and number not in asked.case:
            continue
        rates: dict[str, list[float]] = {name: [] for name in runs}
        own_rates: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():  # a first pass, not measured
            run(prompts[:2], [2, 2])
        for turn in range(rounds):
            order = list(runs.items())
            for name, run in order[turn % len(order) :] + order[: turn % len(order)]:
                began, own = time.perf_counter(), time.process_time()
                tokens = run(prompts, lengths)
                own_rates[name].append(tokens / (time.process_time() - own))
                rates[name].append(tokens / (time.perf_counter() - began))
                print(f"{case}: {name} {rates[name][-1]:.1f}", file=sys.stderr, flush=True)
        rows += [
            {
                "case": case,
                "contender": name,
                "tokens_per_second": statistics.median(own),
                "least": min(own),
                "most": max(own),
                # vLLM's work is in its own processes.
                "tokens_per_cpu_second": None
                if name == rollout_vllm.NAME
                else statistics.median(own_rates[name]),
            }
            for name, own in rates.items()
        ]
    return rows


def main(asked: Any, argv: list[str]) -> int:
    """Measure; print the table, and keep it unless it was a walk."""
    roles = policy_of(*under_lora(asked.model, asked.quick))
    plain, words = under_lora(asked.model, asked.quick)
    made = contenders(roles, plain)
    runs = {name: run for name, run in made.items() if not asked.only or name in asked.only}
    rows, notes = measure(runs, asked) if runs else [], []
    if not asked.only or rollout_vllm.NAME in asked.only:
        if (why := rollout_vllm.why_left_out(asked.quick)) is not None:
            notes.append(f"{rollout_vllm.NAME} is left out: {why}")
        else:
            with rollout_vllm.started(roles, asked.model) as run:
                rows += measure({rollout_vllm.NAME: run}, asked)
    order = list(dict.fromkeys(row["case"] for row in rows))
    rows.sort(key=lambda row: order.index(row["case"]))
    text = table(rows) + "".join(f"\n{line}\n" for line in notes)
    print(text)
    if not asked.quick:
        found = {
            "name": "rollout",
            "date": datetime.now(UTC).date().isoformat(),
            "command": f"python -m benchmarks {' '.join(argv)}",
            "model": words,
            "machine": report.machine(),
            "rows": rows,
            "notes": notes,
        }
        out = asked.out or report.RESULTS / f"rollout-{report.slug(found['machine'])}.json"
        out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(text, encoding="utf-8")
        print(out)
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Tokens a second by case and contender, and times what generate makes, merged."""
    head = "| case | contender | tokens/s | least to most | times the merged generate "
    lines = [
        head + "| tokens/s of the process's own time | times |",
        "|---|---|---|---|---|---|---|",
    ]
    first = {row["case"]: row for row in rows if row["contender"] == BASELINE}
    for row in rows:
        cells = [row["case"], row["contender"]]
        for kind in ("tokens_per_second", "tokens_per_cpu_second"):
            if row[kind] is None:
                cells += ["", ""]
                continue
            cells.append(f"{row[kind]:.1f}")
            if kind == "tokens_per_second":
                cells.append(f"{row['least']:.1f} to {row['most']:.1f}")
            base = first.get(row["case"])
            cells.append(f"{row[kind] / base[kind]:.2f}" if base else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
