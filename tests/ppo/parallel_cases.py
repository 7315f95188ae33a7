"""What each process of tests/ppo/test_parallel.py runs, and the settings that it runs with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastppo.ppo import evaluation, trainer, update
from fastppo.ppo.state import State, init_state
from fastppo.run import plots
from fastppo.run.world import World
from tests.reliability import runs
from tests.tiny import make_config, stir

# Each with what only it reaches. A step has 6 responses, and an optimiser step 3 or fewer: so of
# three processes some have no row in one.
CASES: dict[str, dict[str, Any]] = {
    "gae": {
        "ppo_score_norm": True,
        "ppo_whiten_rewards": True,
        "missing_eos_penalty": 0.5,
        "rollout_is_threshold": 1.5,
        "horizon": 8,
        "critic_warmup": 1,
    },
    "grpo": {
        "advantage": "grpo",
        "scale_rewards": "batch",
        "num_generations": 2,
        "whiten_advantages": True,
        "use_kl_loss": True,
        "loss_agg_mode": "seq-mean-token-sum",
    },
    "early": {"early_stopping": True, "target_kl": 1e-5, "critic": "shared", "kl_penalty": "full"},
    "threshold": {"ratio_threshold": 1.00001, "ptx_coef": 0.2, "learning_rate": 1e-2},
}
STEP = {
    "per_device_train_batch_size": 3,
    "ppo_buffer_size": 2,
    "ppo_epochs": 2,
    "max_new_tokens": 10,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "per_device_eval_batch_size": 1,
    "eval_judge": "fastppo.toy:vowels",
    "max_grad_norm": 0.5,
    "save_strategy": "no",
}


def make_state(world: World, folder: Path, dtype: torch.dtype, **changes: Any) -> State:
    """A run with every adapter stirred, whose responses end at many tokens: of ragged lengths."""
    if changes.get("ptx_coef"):
        answers = [{"instruction": f"Say {i}.", "output": "aeiou " * i} for i in range(1, 4)]
        runs.write_once(folder / "answers.json", answers)
        changes["ptx_dataset"] = str(folder / "answers.json")
    own = folder / f"{world.size}-{world.rank}"
    own.mkdir(parents=True, exist_ok=True)
    config = make_config(folder / "model", own, **{**STEP, **changes})
    state = init_state(config, world=world)
    roles = state.roles
    stir(roles.trainable_parameters("actor"), 3)
    if roles.has_critic:
        if not roles.shares_trunk:
            stir(roles.trainable_parameters("critic"), 4)
        stir(list(roles.critic_head.parameters()), 5, 1.0)
    for place in roles.places.values():
        place.model.to(dtype)
    if roles.critic_head is not None:
        roles.critic_head.to(dtype)
    state.template.stop_ids = (*state.template.stop_ids, *range(40, 70))
    return state


def steps_of_run(
    world: World, folder: Path, name: str, dtype: torch.dtype, steps: int, changes: dict[str, Any]
) -> dict[str, Any]:
    """Everything that must be the same however many processes a run has."""
    state = make_state(world, folder / name, dtype, **CASES[name], **changes)
    seen: list[Any] = []
    gradients: list[Any] = []
    inner, inner_step = trainer.update, update.clip_and_step

    def watched(roles: Any, experience: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(experience)
        return inner(roles, experience, *args, **kwargs)

    def watched_step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        gradients.append(
            [
                None if p.grad is None else p.grad.clone()
                for group in optimizer.param_groups
                for p in group["params"]
            ]
        )
        return inner_step(optimizer, *args, **kwargs)

    trainer.update, update.clip_and_step = watched, watched_step
    try:
        for _ in range(steps):
            trainer.step_update(state)
    finally:
        trainer.update, update.clip_and_step = inner, inner_step
    compared = evaluation.compare(state)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    own = folder / name / f"{world.size}-{world.rank}"
    return {
        "ids": [x.scored.rollout.input_ids_BT for x in seen],
        "lengths": [x.scored.rollout.response_lengths for x in seen],
        "texts": [x.scored.rollout.texts for x in seen],
        "own": [x.scored.own for x in seen],
        "advantages": [x.advantage_N for x in seen],
        "returns": [x.return_N for x in seen],
        "logprobs": [x.scored.logprob_N for x in seen],
        "kl_coef": state.controller.kl_coef,
        "gradients": gradients,
        "parameters": [p.detach().clone() for p in parameters],
        "rows": [
            {k: v for k, v in row.items() if k not in runs.CLOCKS} for row in state.metrics.rows
        ],
        "running": vars(state.running_score),
        "before": vars(compared.before),
        "after": vars(compared.after),
        "files": sorted(p.relative_to(own).as_posix() for p in own.rglob("*") if p.is_file()),
    }


def one_step(world: World, folder: Path, name: str) -> dict[str, Any]:
    """What a first step leaves, in float64."""
    state = make_state(world, folder, torch.float64, **{**CASES[name], "critic_warmup": 0})
    trainer.step_update(state)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    (row,) = state.metrics.rows
    return {
        "parameters": [p.detach().clone() for p in parameters],
        "kl_coef": state.controller.kl_coef,
        "running": vars(state.running_score),
        "row": {k: v for k, v in row.items() if k not in runs.CLOCKS},
    }


def all_cases(world: World, folder: Path) -> dict[str, dict[str, Any]]:
    """Every case in float64; GRPO in float32 too, over ten steps."""
    plots.draw_curves = lambda rows, path, title: path.write_bytes(b"")
    found = {name: steps_of_run(world, folder, name, torch.float64, 3, {}) for name in CASES}
    long = {"max_steps": 10, "learning_rate": 1e-3}
    found["float32"] = steps_of_run(world, folder, "grpo", torch.float32, 10, long)
    return found
