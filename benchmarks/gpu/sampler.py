"""Tokens a second of the sampler: as it is, compiled (`cache_implementation: static`), merged."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.model import ppo_config, random_weights, size_of, write_files
from benchmarks.gpu.plan import Add, Plan
from benchmarks.gpu.timing import failure
from fastppo.ppo.rollout import sample
from fastppo.ppo.sampling import Sampling
from fastppo.ppo.trainer import State, init_state
from fastppo.run.preflight import check

PROMPTS, LENGTH, NEW_TOKENS = 16, 576, 64
# The most important first.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {"cache_implementation": "static"},
    "plain, adapter merged": {"merge_adapter": True},
}


def measure(plan: Plan, add: Add) -> list[str]:
    """A row for the first call of each way, and one for a second; returns what failed."""
    new = NEW_TOKENS if plan.cuda else 6
    plan = replace(plan, length=LENGTH if plan.cuda else 96)
    size = size_of(plan, new, PROMPTS)
    wrong = []
    with tempfile.TemporaryDirectory() as folder, random_weights(size):
        write_files(size, Path(folder))
        reward = {"reward_model": "fastppo.toy:vowels", "reward_model_type": "function"}
        config = ppo_config(size, Path(folder), critic="shared", **reward)
        state = init_state(config, check(config))
        fields = {"prompts": size.rows, "prompt": size.length - new, "new_tokens": new}
        for way, changes in WAYS.items():
            call = sampler(state, changes)
            try:
                if way == "plain":  # libraries are loaded; nothing is compiled that has a length
                    sampler(state, {"max_new_tokens": 2, "min_new_tokens": 2})()
                for turn in ("first call", "again")[way == "plain" :]:
                    seconds, tokens = timed(call, plan)
                    rate = round(tokens / seconds, 1)
                    add(way=way, call=turn, **fields, seconds=round(seconds, 3), rate=rate)
            except Exception as error:
                add(way=way, **fields, note=failure(error))
                wrong.append(f"{way}: {failure(error)}")
    return wrong


def sampler(state: State, changes: dict[str, Any]) -> Callable[[], int]:
    """A call that samples a response to every prompt, and returns the number of tokens."""
    sampling = replace(Sampling.of(state.config), **changes)

    def call() -> int:
        with state.roles.use("actor"):
            rollout = sample(
                state.roles,
                state.prompts[: state.config.rollout_batch_size],
                sampling=sampling,
                template=state.template,
                tokenizer=state.tokenizer,
                seed=0,
                budgets=state.budgets,
                plan=state.plan,
            )
        return sum(rollout.response_lengths)

    return call


def timed(call: Callable[[], int], plan: Plan) -> tuple[float, int]:
    """Seconds of a call, and its tokens."""
    began = time.perf_counter()
    tokens = call()
    if plan.cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, tokens
