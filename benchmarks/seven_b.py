"""A 7B with all four roles on one GPU: peak memory and seconds a phase, against the usual way.

    python -m benchmarks.gpu seven_b            # Qwen2.5-7B's shape, random weights, nothing loaded
    python -m benchmarks.gpu seven_b --toy      # the same walk at toy sizes, on the CPU

Stage rm trains a reward adapter, stage ppo takes it as reward and critic: the trainer itself, on
files of random text. The usual way is on the same models and the same rollout: logits of every
position in float32, log_softmax, gather, autograd, PEFT's casts, layers checkpointed and nothing
offloaded. Each part writes its JSON when it ends; one that runs out of memory says so in it.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.gpu import RESULTS
from fastppo import toy
from fastppo.config import Config, config_from_dict
from fastppo.memory.retry import out_of_memory, release_memory
from fastppo.memory.shapes import TABLE, ModelShape
from fastppo.models import build as roles
from fastppo.models.batch import Batch, make_batch, token_index
from fastppo.models.load import disable_dropout
from fastppo.offload.activations import wrap
from fastppo.ppo import trainer
from fastppo.ppo.advantage import estimate
from fastppo.ppo.metrics import Clock
from fastppo.ppo.rollout import sample
from fastppo.ppo.sampling import Sampling
from fastppo.ppo.score import score
from fastppo.rm import train as reward_model
from fastppo.run.preflight import check
from fastppo.types import Experience, Rollout

GIB = 2**30


@dataclass(frozen=True)
class Size:
    """What is built, and how long its sequences are."""

    shape: ModelShape
    device: str
    lengths: tuple[int, ...]  # prompt and response, half and half
    rank: int
    rows: int  # sequences of an optimiser step, a micro-batch each
    bf16: bool


REAL = Size(TABLE["Qwen/Qwen2.5-7B"], "cuda", (2048, 8192), 64, 4, bf16=True)
TOY = Size(ModelShape(32, 2, 2, 1, 16, 64, 320, False, True), "cpu", (96,), 4, 2, bf16=False)


def write_files(size: Size, folder: Path) -> None:
    """Sizes and a tokenizer of bytes, no weights; pairs and prompts longer than there is room."""
    shape = size.shape
    tokenizer = toy.byte_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=max(size.lengths),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="bfloat16" if size.bf16 else "float32",
    ).save_pretrained(folder / "model")
    draw = random.Random(0)

    def text() -> str:
        return "".join(draw.choices(string.ascii_lowercase + " ", k=2 * max(size.lengths)))

    pairs = [
        {"instruction": text(), "chosen": text(), "rejected": text()} for _ in range(2 * size.rows)
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "prompts.json").write_text(json.dumps([{"instruction": text()}] * size.rows))


def settings(size: Size, folder: Path, **more: Any) -> Config:
    """What both stages have in common."""
    return config_from_dict(
        {
            "model_name_or_path": str(folder / "model"),
            "template": "chatml",
            "lora_rank": size.rank,
            "bf16": size.bf16,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": size.rows,
            "overwrite_output_dir": True,
            "metrics_dir": str(folder / "metrics"),
            **more,
        }
    )


def rm_config(size: Size, folder: Path, length: int) -> Config:
    """Pairs of `length` tokens each."""
    return settings(
        size,
        folder,
        stage="rm",
        dataset=str(folder / "pairs.json"),
        output_dir=str(folder / "reward"),
        cutoff_len=length,
        max_steps=2,
    )


def ppo_config(size: Size, folder: Path, length: int) -> Config:
    """All four roles; every response goes on to its end."""
    half = length // 2
    return settings(
        size,
        folder,
        stage="ppo",
        dataset=str(folder / "prompts.json"),
        reward_model=str(folder / "reward"),
        output_dir=str(folder / "ppo"),
        cutoff_len=half,
        max_new_tokens=half,
        min_new_tokens=half,
        ppo_epochs=1,
        max_steps=10,
    )


@contextmanager
def random_weights(size: Size) -> Iterator[None]:
    """Inside, the base is made on the device, the same each time, and nothing is read."""

    def load(config: Config, device: torch.device, *_: Any, **__: Any) -> nn.Module:
        torch.manual_seed(0)
        made = Qwen2Config.from_pretrained(config.model_name_or_path)
        dtype = torch.bfloat16 if size.bf16 else torch.float32
        with device:
            base = AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation="sdpa")
        base.requires_grad_(False)
        base.config.use_cache = False
        disable_dropout(base)
        return base

    with ExitStack() as stack:
        for module in (roles, reward_model):
            stack.enter_context(patch.object(module, "load_base", load))
        yield


class Phases(Clock):
    """Seconds and peak memory of each phase, the device waited for at both ends."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.cuda, self.found = size.device == "cuda", dict[str, dict[str, float]]()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        with super().__call__(phase):
            yield
            if self.cuda:
                torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / GIB if self.cuda else 0.0
        self.found[phase] = {
            "seconds": round(self.seconds[phase], 3),
            "peak_gib": round(peak, 2),
        }


def rm(size: Size, folder: Path, length: int) -> dict[str, Any]:
    """Two optimiser steps of stage rm, as a whole: its loop is transformers'."""
    config, clock = rm_config(size, folder, length), Phases(size)
    with clock("run"):
        reward_model.run(config, check(config))
    taken = json.loads((folder / "reward" / "all_results.json").read_text())["train_runtime"]
    return {"phases": {"2 steps": {**clock.found["run"], "seconds": round(taken, 3)}}}


def ppo(size: Size, state: trainer.State, mode: str) -> dict[str, Any]:
    """A step of stage ppo."""
    clock = Phases(size)
    wrap(state.roles.base, mode)
    with patch.object(trainer, "Clock", lambda: clock):
        trainer.step_update(state)
    return {"phases": clock.found, "planned_gib": planned(state, mode)}


def planned(state: trainer.State, mode: str) -> float | None:
    """The plan's peak of tensors in a step."""
    if state.plan is None:
        return None
    return round(state.plan.with_changes(activation_offloading=mode).step_peak / GIB, 2)


def rollout_of(state: trainer.State) -> Rollout:
    """What is scored and learned from in the usual way; how it was sampled is not compared."""
    with state.roles.use("actor"):
        return sample(
            state.roles,
            state.prompts[: state.config.rollout_batch_size],
            sampling=Sampling.of(state.config),
            template=state.template,
            tokenizer=state.tokenizer,
            seed=0,
            budgets=state.budgets,
            plan=state.plan,
        )


def usual(size: Size, state: trainer.State) -> dict[str, Any]:
    """Scoring and update as trainers write them, on the same models."""
    clock, made = Phases(size), state.roles
    wrap(made.base, "checkpoint")
    rollout = rollout_of(state)
    scored = score(
        made,
        rollout,
        state.reward(rollout),
        temperature=state.config.temperature,
        budget=state.budgets.scoring,
        chunk_bytes=state.budgets.chunk_bytes,
    )
    experience = estimate(scored, state.config, state.controller, state.running_score)
    batches = [make_batch(rollout, [row]) for row in range(len(rollout.prompts))]
    adapted = [module for module in made.model.modules() if isinstance(module, LoraLayer)]
    for module in adapted:
        module.cast_input_dtype_enabled = True
    try:
        with clock("score"), torch.no_grad():
            for batch in batches:
                for role in ("actor", "reference"):
                    with made.use(role):
                        log_softmax(state, batch)
                with made.use("critic"):
                    made.value(made.hidden(**batch.inputs))
            state.reward(rollout)
        made.train()
        with clock("update"):
            for batch in batches:
                usual_backward(state, experience, batch)
            for group in state.optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], 1.0)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
    finally:
        made.eval()
        for module in adapted:
            module.cast_input_dtype_enabled = False
    return {"phases": clock.found}


def log_softmax(state: trainer.State, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs of every next token and entropies, (B, T) each, from logits in float32."""
    made = state.roles
    with made.precision():
        logits = made.base(
            input_ids=batch.input_ids_BT, attention_mask=batch.mask_BT, use_cache=False
        ).logits
    log_p = torch.log_softmax(logits.float(), dim=-1)
    token_BT = torch.roll(batch.input_ids_BT, shifts=-1, dims=1)
    return log_p.gather(2, token_BT[..., None]).squeeze(2), -(log_p.exp() * log_p).sum(-1)


def usual_backward(state: trainer.State, experience: Experience, batch: Batch) -> None:
    """Clipped surrogate with entropy, then the clipped value loss; autograd for both."""
    made, scored = state.roles, experience.scored
    at = token_index(scored.rollout.response_lengths, batch.rows).to(batch.input_ids_BT.device)
    advantage, old = experience.advantage_N[at], scored.logprob_N[at]
    with made.use("actor"):
        logprob_BT, entropy_BT = log_softmax(state, batch)
        ratio = (batch.packing.gather(logprob_BT) - old).exp()
        surrogate = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
        (surrogate - 0.0 * batch.packing.gather(entropy_BT)).mean().backward()
    with made.use("critic"):
        hidden_BTD = made.hidden(**batch.inputs)
        value, target = made.value(batch.packing.gather(hidden_BTD)), experience.return_N[at]
        before = scored.value_N[at]
        clipped = before + (value - before).clamp(-0.2, 0.2)
        worst = torch.max((value - target).square(), (clipped - target).square())
        (0.05 * worst.mean()).backward()


def parts(
    size: Size, folder: Path
) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """What each part is, and what measures it."""
    for length in size.lengths:
        yield {"stage": "rm", "length": length, "way": "fastppo"}, partial(rm, size, folder, length)
        config = ppo_config(size, folder, length)
        state = trainer.init_state(config, check(config))
        if length == size.lengths[0]:  # libraries loaded, kernels chosen, optimiser state made
            trainer.step_update(state)
        for mode in ("checkpoint", "checkpoint+offload"):
            what = {"stage": "ppo", "length": length, "way": f"fastppo, {mode}"}
            yield what, partial(ppo, size, state, mode)
        yield (
            {"stage": "ppo", "length": length, "way": "the usual way"},
            partial(usual, size, state),
        )
        del state
        release_memory()


def measure(size: Size, out: Path) -> list[dict[str, Any]]:
    """Every part, its JSON written when it ends."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, random_weights(size):
        write_files(size, Path(folder))
        for what, part in parts(size, Path(folder)):
            began = time.monotonic()
            try:
                row = {**what, **part()}
            except Exception as error:
                if not out_of_memory(error):
                    raise
                row = {**what, "out_of_memory": str(error).splitlines()[0]}
            del part
            release_memory()
            found.append(row)
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{what}: {time.monotonic() - began:.1f} s", flush=True)
    return found


def markdown(found: list[dict[str, Any]]) -> str:
    """A row a part and phase."""
    lines = ["| stage | tokens | way | phase | seconds | peak GiB |", "|---|---|---|---|---|---|"]
    for row in found:
        head = f"| {row['stage']} | {row['length']} | {row['way']} |"
        for phase, took in row.get("phases", {"out of memory": {}}).items():
            cells = f"{took.get('seconds', '')} | {took.get('peak_gib', '')}"
            lines.append(f"{head} {phase} | {cells} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu seven_b", description=__doc__)
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--out", type=Path, help="the JSON; default: benchmarks/results")
    asked = parser.parse_args(argv)
    if not asked.toy and not torch.cuda.is_available():
        print("seven_b: no GPU here; --toy walks through without one", file=sys.stderr)
        return 2
    name = "toy" if asked.toy else torch.cuda.get_device_name().lower().replace(" ", "-")
    out = asked.out or RESULTS / f"seven-b-{name}.json"
    print(markdown(measure(TOY if asked.toy else REAL, out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
