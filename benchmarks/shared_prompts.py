"""Scoring and an update's pass with a prompt run once for its responses, against each row alone.

By the trainer's own functions, on SmolLM2-135M under LoRA in float32 with gradient checkpointing
and without a critic, as GRPO trains: a rollout of one prompt and its responses, of random tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Contender
from benchmarks.peers.models import linked
from fastppo import toy
from fastppo.config import config_from_dict
from fastppo.ppo import trainer
from fastppo.ppo.advantage import estimate
from fastppo.ppo.score import score
from fastppo.ppo.update import accumulate_gradients, mini_batches
from fastppo.types import Prompt, Rollout

MODEL = Path("output/demo/model")
FOLDER = Path("output/benchmarks/shared_prompts")
SIZES = ((30, 8, 40), (256, 8, 40))  # tokens of the prompt, responses, tokens of each
EACH, ONCE = "each row alone", "fastppo, prompt once"


def cases(quick: bool) -> Iterator[Case]:
    """Scoring (actor and reference), and an update's forward and backward, at each size."""
    if quick:
        place = FOLDER / "model"
        toy.write_model(place, hidden_size=32, layers=2)
    else:
        place = linked(MODEL, FOLDER)
    for prompt, responses, length in ((30, 4, 5),) if quick else SIZES:
        state = make_state(place, prompt, responses, length)
        yield from of_a_size(state, prompt, responses, length)


def make_state(model: Path, prompt: int, responses: int, length: int) -> trainer.State:
    """A run whose micro-batch is all responses to a prompt; its adapter differs from the base."""
    prompts = FOLDER / "prompts.json"
    prompts.write_text(json.dumps([{"instruction": "x"}]), encoding="utf-8")
    state = trainer.init_state(
        config_from_dict(
            {
                "stage": "ppo",
                "model_name_or_path": str(model),
                "reward_model": "fastppo.toy:vowels",
                "reward_model_type": "function",
                "dataset": str(prompts),
                "template": "chatml",
                "output_dir": str(FOLDER / "run"),
                "overwrite_output_dir": True,
                "metrics_dir": str(FOLDER / "metrics"),
                "advantage": "grpo",
                "num_generations": responses,
                "per_device_train_batch_size": responses,
                "cutoff_len": prompt,
                "max_new_tokens": length,
                "disable_gradient_checkpointing": False,
                "use_cpu": True,
            }
        )
    )
    torch.manual_seed(0)
    for parameter in state.roles.trainable_parameters("actor"):
        nn.init.normal_(parameter, std=0.02)
    return state


def make_rollout(prompt: int, responses: int, length: int, vocab: int) -> Rollout:
    """Responses of random tokens to one prompt."""
    ids_BT = torch.randint(10, vocab - 10, (responses, prompt + length))
    ids_BT[:, :prompt] = ids_BT[0, :prompt]
    return Rollout(
        prompts=[Prompt(ids_BT[0, :prompt].tolist(), "x")] * responses,
        input_ids_BT=ids_BT,
        prompt_lengths=[prompt] * responses,
        response_lengths=[length] * responses,
        terminated=[False] * responses,
        sampler_logprob_N=torch.zeros(responses * length),
        texts=["x"] * responses,
    )


def of_a_size(state: trainer.State, prompt: int, responses: int, length: int) -> Iterator[Case]:
    """The two phases, each row alone and with the prompt once."""
    roles, config = state.roles, state.config
    once = state.budgets
    assert once.update.prompts is not None, "\n".join(state.notes)
    each = replace(
        once, update=replace(once.update, prompts=None), scoring=replace(once.scoring, prompts=None)
    )
    rollout = make_rollout(prompt, responses, length, roles.lm_head.weight_VD.shape[0])
    rewards: tuple[Tensor, dict[str, Tensor]] = (torch.arange(float(responses)), {})

    def scoring(budgets: Any) -> Any:
        return score(roles, rollout, rewards, temperature=1.0, budget=budgets.scoring)

    def logprobs(budgets: Any) -> list[Tensor]:
        scored = scoring(budgets)
        return [scored.logprob_N, scored.ref_logprob_N]

    experience = estimate(scoring(each), config, state.controller, state.running_score)
    (mini,) = mini_batches(experience, config, seed=0)

    def update(budgets: Any) -> None:
        roles.train()
        state.optimizer.zero_grad(set_to_none=True)
        accumulate_gradients(roles, experience, mini, config, budgets)

    def gradients(budgets: Any) -> Sequence[Tensor]:
        update(budgets)
        return [p.grad.clone() for p in roles.trainable_parameters("actor") if p.grad is not None]

    shape = f"{responses} responses of {length} tokens to a prompt of {prompt}"
    for name, call, answer in (
        ("scoring", scoring, logprobs),
        ("forward and backward of an update", update, gradients),
    ):
        case = Case({"op": name, "shape": shape, "dtype": "float32"}, answer(each), tolerance=1e-3)
        for who, budgets in ((EACH, each), (ONCE, once)):
            case.add(
                Contender(
                    who,
                    lambda call=call, budgets=budgets: call(budgets),
                    lambda answer=answer, budgets=budgets: answer(budgets),
                    ours=True,
                )
            )
        yield case


def ratios(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The median time with the prompt once, as a share of that of each row alone."""
    found = []
    for before, after in zip(rows[::2], rows[1::2], strict=True):
        if "ms" in before and "ms" in after:
            share = after["ms"] / before["ms"]
            found.append(f"{after['op']}, {after['shape']}: {share:.2f} of the time")
    return found


def page_rows(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The lines of the table in docs/step.md: seconds of both ways, their share, and memory."""
    for before, after in zip(rows[::2], rows[1::2], strict=True):
        times = [
            f"{row['ms'] / 1e3:.1f} s, {row['peak_bytes'] / 2**30:.2f} GiB"
            for row in (before, after)
        ]
        yield (
            f"| {after['op']}, {after['shape']} | {times[0]} | {times[1]} | "
            f"{after['ms'] / before['ms']:.2f} |"
        )
