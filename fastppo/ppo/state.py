"""What a run is between two steps, and how it comes to be."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from fastppo.config import Config, load_config
from fastppo.data import encode_prompts
from fastppo.memory.auto import advice_on_failure, resolve_auto
from fastppo.memory.budgets import Budgets
from fastppo.models.batch import check_packing, shuffled_batch
from fastppo.models.build import Roles, build
from fastppo.models.load import load_tokenizer
from fastppo.ppo.advantage import KLController, RunningScore
from fastppo.ppo.metrics import MetricsWriter, absent_columns
from fastppo.ppo.optimizer import make_optimizer, make_scheduler
from fastppo.ppo.ptx import Demonstrations
from fastppo.ppo.sampling import Sampling
from fastppo.ppo.snapshot import Snapshot
from fastppo.rewards.function import load_function
from fastppo.rewards.reward import Reward, make_reward
from fastppo.run.launch import choose_device
from fastppo.run.preflight import check
from fastppo.run.stopping import Stop
from fastppo.run.tracking import Trackers
from fastppo.seeds import random_state, seed_of
from fastppo.templates import Template, get_template
from fastppo.types import Prompt

if TYPE_CHECKING:
    from fastppo.data import Records
    from fastppo.memory.plan import Plan
    from fastppo.types import Answers


@dataclass
class State:
    """All that a run is between two steps."""

    config: Config
    roles: Roles
    tokenizer: Any
    template: Template
    reward: Reward
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    eval_is_held_out: bool  # eval_prompts were kept out of training
    optimizer: torch.optim.Optimizer
    scheduler: Any
    controller: KLController
    running_score: RunningScore
    metrics: MetricsWriter
    tracker: Trackers | None
    budgets: Budgets
    plan: Plan | None  # None: a model whose shape is not known
    notes: list[str]  # what was decided by the memory plan, in words
    ptx: Demonstrations | None = None
    step: int = 0
    before: Answers | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # as the log has them
    began: float = field(default_factory=time.monotonic)
    random: dict[str, Any] = field(default_factory=random_state)  # generators, after `step` steps
    stop: Stop = field(default_factory=Stop)
    saved_step: int = -1  # the step whose checkpoint this run wrote last

    def __post_init__(self) -> None:
        self.snapshot = Snapshot(self.optimizer)

    def seconds(self) -> float:
        """Wall time since the run began."""
        return time.monotonic() - self.began

    @property
    def total_steps(self) -> int:
        """PPO steps of the whole run."""
        return total_steps(self.config, len(self.prompts))


def total_steps(config: Config, n_prompts: int) -> int:
    """PPO steps of the whole run; no prompt is dropped for not filling a batch."""
    if config.max_steps > 0:
        return config.max_steps
    steps = config.num_train_epochs * n_prompts / config.prompts_a_step
    return max(1, math.ceil(steps - 1e-9))  # 0.1 * 30 / 3 is above 1 by rounding alone


def prompts_of_step(state: State) -> list[Prompt]:
    """The next prompts of an endless shuffled stream, each `num_generations` times in a row."""
    config = state.config
    chosen = shuffled_batch(
        len(state.prompts),
        state.step,
        config.prompts_a_step,
        seed=seed_of(config.data_order_seed, "prompt order"),
        shuffle=not config.disable_shuffling,
    )
    return [state.prompts[i] for i in chosen for _ in range(config.num_generations)]


def optimizer_steps(config: Config) -> int:
    """Optimiser steps in a PPO step that nothing cuts short."""
    return config.ppo_epochs * config.ppo_buffer_size


def init_state(
    config: Config | str | Path | None = None,
    records: Records | None = None,
    resumed: Path | None = None,
) -> State:
    """Everything a run needs, loaded; `None` is the built-in toy, a path is a YAML file.

    Trackers go on in the run that `resumed`, a checkpoint, is of.
    """
    if config is None:
        from fastppo import toy

        config = toy.config()
    elif not isinstance(config, Config):
        config = load_config(config)
    if records is None:
        records = check(config)
    device = choose_device(config)
    set_seed(config.seed)
    if config.eval_judge is not None:
        load_function(config.eval_judge, "eval_judge")
    for spec in config.rewards:  # before the base is loaded, which takes a while
        if spec.kind == "function":
            load_function(spec.target, "reward_model")
    tokenizer = load_tokenizer(config)
    template = get_template(
        config.template,
        tokenizer,
        enable_thinking=config.enable_thinking,
        preserve_thinking=config.preserve_thinking,
    )
    room = (config.cutoff_len, config.default_system)
    prompts = encode_prompts(records.train, template, *room, lf_truncation=config.lf_truncation)
    held_out = bool(records.eval)
    eval_prompts = (
        encode_prompts(records.eval, template, *room, lf_truncation=config.lf_truncation)
        if held_out
        else prompts
    )[: config.eval_max_samples]
    config, plan, notes = resolve_auto(config, device)  # the shape is in the hub's cache by now
    budgets = Budgets.of(config)
    with advice_on_failure(plan, config, budgets, device):
        roles = build(config, device)
    roles.check_head(prompts[0].ids)
    Sampling.of(config).check(device)
    if config.padding_free:
        check_packing(roles, prompts[0].ids)
    optimizer = make_optimizer(config, roles)
    scheduler = make_scheduler(config, optimizer, total_steps(config, len(prompts)))
    reward = make_reward(config, roles, template, tokenizer, prompts, budgets)
    return State(
        config=config,
        roles=roles,
        tokenizer=tokenizer,
        template=template,
        reward=reward,
        prompts=prompts,
        eval_prompts=eval_prompts,
        eval_is_held_out=held_out,
        optimizer=optimizer,
        scheduler=scheduler,
        controller=KLController(
            config.init_kl_coef, config.ppo_target, config.horizon, config.adap_kl_ctrl
        ),
        running_score=RunningScore(),
        metrics=MetricsWriter(Path(config.metrics_dir), reward.extra_names, absent_columns(config)),
        tracker=Trackers.of(config, resumed),
        budgets=budgets,
        plan=plan,
        notes=notes,
        ptx=Demonstrations.of(records.ptx, template, config),
    )
