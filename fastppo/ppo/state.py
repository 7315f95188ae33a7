"""The state of a run between two steps, and how it is built from the configuration."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.amp import GradScaler
from transformers import set_seed

from fastppo.config import Config, load_config
from fastppo.data import encode_prompts
from fastppo.errors import UserError
from fastppo.memory.auto import advice_on_failure, resolve_auto
from fastppo.memory.budgets import Budgets, may_share_prompts
from fastppo.models.batch import check_packing, shuffled_batch
from fastppo.models.build import Roles, build
from fastppo.models.limits import (
    check_reference_vocabulary,
    check_reward_tokens,
    check_rows,
    drop_pad_without_row,
    embedding_rows,
    note_beyond_training,
)
from fastppo.models.load import autocast_dtype, load_tokenizer
from fastppo.models.prompt_sharing import share_prompts
from fastppo.models.rounding import note_on_16_bits
from fastppo.models.scaler import make_scaler
from fastppo.models.shared_layers import share_layers
from fastppo.ppo.advantage import KLController, RunningScore
from fastppo.ppo.columns import absent_columns
from fastppo.ppo.engine_start import start_engine
from fastppo.ppo.metrics import MetricsWriter
from fastppo.ppo.optimizer import make_optimizer, make_scheduler
from fastppo.ppo.ptx import Demonstrations
from fastppo.ppo.rollout import row_batch_note
from fastppo.ppo.sampling import Sampling
from fastppo.ppo.snapshot import Snapshot
from fastppo.rewards.function import load_function
from fastppo.rewards.reward import Reward, make_reward
from fastppo.run.launch import choose_device, note_on_device
from fastppo.run.preflight import check
from fastppo.run.sharding import shard_base
from fastppo.run.stopping import Stop
from fastppo.run.tracking import Trackers
from fastppo.run.world import ALONE, World
from fastppo.seeds import random_state, seed_of
from fastppo.servers.in_process import check_colocated
from fastppo.templates import Template, get_template, note_on_template
from fastppo.types import Prompt

if TYPE_CHECKING:
    from fastppo.data import Records
    from fastppo.memory.plan import Plan
    from fastppo.ppo.engine import Engine
    from fastppo.types import Answers


@dataclass
class State:
    """The state of a run between two steps."""

    config: Config
    roles: Roles
    tokenizer: Any
    template: Template
    reward: Reward
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    eval_is_held_out: bool  # whether eval_prompts are kept out of the training prompts
    optimizer: torch.optim.Optimizer
    scheduler: Any
    controller: KLController
    running_score: RunningScore
    metrics: MetricsWriter
    tracker: Trackers | None
    budgets: Budgets
    plan: Plan | None  # None if the shape of the model is unknown
    notes: list[str]  # to be printed: decisions of the memory plan, tokens, positions
    ptx: Demonstrations | None = None
    scaler: GradScaler | None = None  # of the loss, with fp16
    engine: Engine | None = None  # samples in place of the model here (use_vllm)
    step: int = 0
    before: Answers | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # entries of the log
    began: float = field(default_factory=time.monotonic)
    random: dict[str, Any] = field(
        default_factory=random_state
    )  # state of the random number generators after `step` steps
    stop: Stop = field(default_factory=Stop)
    world: World = ALONE  # the processes of the run; one alone unless torchrun started more
    best_step: int | None = None  # of the policy that load_best_model_at_end has put back
    saved_step: int = -1  # the step of the last checkpoint that this run wrote
    sample: tuple[str, str, float] | None = None  # prompt, response and score, of the last rollout

    def __post_init__(self) -> None:
        self.snapshot = Snapshot(self.optimizer, self.scaler)
        self.prompt_order = prompt_order(self.config, len(self.prompts))

    def seconds(self) -> float:
        """Wall time since the run began."""
        return time.monotonic() - self.began

    @property
    def total_steps(self) -> int:
        """PPO steps of the whole run."""
        return total_steps(self.config, len(self.prompts))


def total_steps(config: Config, n_prompts: int) -> int:
    """PPO steps of the whole run; a last batch that is not full is not dropped."""
    if config.max_steps > 0:
        return config.max_steps
    steps = config.num_train_epochs * n_prompts / config.prompts_a_step
    return max(1, math.ceil(steps - 1e-9))  # 0.1 * 30 / 3 is above 1 by rounding alone


def note_on_parts(config: Config, world: World) -> str | None:
    """A line where a step's prompts are not divided evenly among the processes; else None."""
    whole, over = divmod(config.prompts_a_step, world.size)
    if not over:
        return None
    return (
        f"{config.prompts_a_step} prompts a step on {world.size} processes: {over} of them have "
        f"{whole + 1}, the others {whole}, and wait for those"
    )


def prompt_order(config: Config, n_prompts: int) -> Callable[[int], list[int]]:
    """A function from the step to the indices of its prompts.

    Steps read all prompts pass after pass; each pass is shuffled in another order.
    """
    return partial(
        shuffled_batch,
        n_prompts,
        size=config.prompts_a_step,
        seed=seed_of(config.data_order_seed, "prompt order"),
        shuffle=not config.disable_shuffling,
    )


def init_state(
    config: Config | str | Path | None = None,
    records: Records | None = None,
    resumed: Path | None = None,
    world: World = ALONE,
) -> State:
    """Load everything that a run needs.

    Args:
        config: a configuration, the path of a YAML file, or None for the built-in toy.
        records: the data, if they have been read already.
        resumed: the checkpoint that the run resumes from; trackers then continue its curves.
        world: the processes of the run (`fastppo.run.world.join`), which share its steps.
    """
    if config is None:
        from fastppo import toy

        config = toy.config()
    elif not isinstance(config, Config):
        config = load_config(config)
    if records is None:
        records = check(config, shared=world.size > 1)
    device = choose_device(config)
    check_colocated(config, device.type)
    set_seed(config.seed)
    if config.eval_judge is not None:
        load_function(config.eval_judge, "eval_judge")
    for spec in config.rewards:  # before loading the base, which takes a while
        if spec.kind == "function" and spec.target not in config.objects.rewards:
            load_function(spec.target, "reward_model")
    tokenizer, rows = load_tokenizer(config), embedding_rows(config)
    check_reward_tokens(config, tokenizer)
    check_reference_vocabulary(config)
    pad_note = drop_pad_without_row(tokenizer, rows)
    template = get_template(
        config.template,
        tokenizer,
        enable_thinking=config.enable_thinking,
        preserve_thinking=config.preserve_thinking,
        default_system=config.default_system,
    )
    room = (config.cutoff_len, config.default_system)
    prompts = encode_prompts(records.train, template, *room, lf_truncation=config.lf_truncation)
    held_out = bool(records.eval)
    eval_prompts = (
        encode_prompts(records.eval, template, *room, lf_truncation=config.lf_truncation)
        if held_out
        else prompts
    )[: config.eval_max_samples]
    ptx = Demonstrations.of(records.ptx, template, config)
    check_rows(tokenizer, rows, [[template.eos_id]], "template", "the end of an answer")
    every = [prompt.ids for prompt in [*prompts, *eval_prompts]]
    check_rows(tokenizer, rows, every, "dataset", "a prompt")
    if ptx is not None:
        check_rows(tokenizer, rows, (p + a for p, a in ptx.pairs), "ptx_dataset", "an answer")
    longest = max(map(len, every)) + config.max_new_tokens
    found = (
        pad_note,
        note_on_template(config.template, template),
        note_beyond_training(config, longest),
        note_on_16_bits(device, autocast_dtype(config, device)),
        note_on_device(config, device),
        note_on_parts(config, world),
    )
    config, plan, notes = resolve_auto(  # the hub's cache has the shape
        config, device, world, cutoff_len=longest - config.max_new_tokens
    )
    notes += [line for line in found if line is not None]
    budgets = Budgets.of(config)
    with advice_on_failure(plan, config, budgets, device):
        roles = build(config, device)
        notes += shard_base(config, roles, budgets, world)
    roles.check_head(prompts[0].ids)
    Sampling.of(config).check(device)
    if (note := row_batch_note(roles)) is not None:
        if roles.sharding is not None:
            raise UserError(f"{config.source}: fsdp: {note}, which is not sharded; leave fsdp out")
        notes.append(note)
    if config.padding_free:
        check_packing(roles, prompts[0].ids)
    # 8-bit kernels may choose outliers by batch; a sharded layer that is left out has no hooks.
    if config.quantization_bit != 8 and roles.sharding is None:
        share_layers(
            roles,
            prompts[0].ids,
            base="actor" if config.finetuning_type == "lora" or config.ref_model else "reference",
            on_host="offload" in budgets.activation_offloading,
            packed=config.padding_free,
        )
    if may_share_prompts(config) and roles.sharding is None:
        sharing = share_prompts(roles, prompts[0].ids)
        budgets.update.prompts = budgets.scoring.prompts = sharing
        if sharing is not None:
            notes.append(
                f"a prompt is run once for its {config.num_generations} responses in scoring and "
                "update, where that is less work"
            )
    optimizer = make_optimizer(config, roles)
    scheduler = make_scheduler(config, optimizer, total_steps(config, len(prompts)))
    with world.together():
        tracker = Trackers.of(config, resumed) if world.main else None
    reward = make_reward(config, roles, template, tokenizer, prompts, budgets)
    engine = start_engine(config, roles, prompts, longest, template, tokenizer)
    notes += [] if engine is None else [engine.words]
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
        metrics=MetricsWriter(
            Path(config.metrics_dir),
            reward.extra_names,
            absent_columns(config),
            writes=world.main,
        ),
        tracker=tracker,
        budgets=budgets,
        plan=plan,
        notes=notes,
        ptx=ptx,
        scaler=make_scaler(roles.autocast, device),
        world=world,
        engine=engine,
    )
