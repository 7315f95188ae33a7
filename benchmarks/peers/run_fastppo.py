"""fastppo's PPO step, timed; run by `python -m benchmarks step` in this project's environment."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from products import Products, bytes_per_second, decoding_bytes
from watch import Finished, Watch, main, trainable

from fastppo.config import config_from_dict
from fastppo.config.rewards import RECORD
from fastppo.models import build as roles
from fastppo.models.load import load_tokenizer
from fastppo.ppo import trainer
from fastppo.rewards.reward import Reward
from fastppo.run import save

if TYPE_CHECKING:
    from fastppo.ppo.trainer import TrainState

# What every version of PEFT and LLaMA-Factory reads of an adapter_config.json.
KNOWN = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias")


def keys(settings: dict[str, Any]) -> dict[str, Any]:
    """The YAML, as LLaMA-Factory's; `critic` and `min_new_tokens` are fastppo's."""
    method = {"lora_rank": settings["rank"], "reward_model": settings["reward"]}
    if settings.get("finetuning") == "freeze":
        method = {
            "finetuning_type": "freeze",
            "reward_model": settings["full_reward"],
            "reward_model_type": "full",
        }
    return {
        "stage": "ppo",
        "model_name_or_path": settings["model"],
        **method,
        "critic": settings["critic"],
        "dataset": settings["dataset"],
        "dataset_dir": settings["dataset_dir"],
        "template": settings["template"],
        "output_dir": f"{settings['folder']}/fastppo",
        "overwrite_output_dir": True,
        "metrics_dir": f"{settings['folder']}/fastppo-metrics",
        "per_device_train_batch_size": settings["batch"],
        "gradient_accumulation_steps": settings["accumulation"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_steps": settings["steps"],
        "ppo_epochs": settings["epochs"],
        "max_new_tokens": settings["new_tokens"],
        "min_new_tokens": settings["new_tokens"],
        "disable_gradient_checkpointing": {True: False, False: True}.get(settings["checkpointing"]),
        "seed": settings["seed"],
        **settings["extra"],
    }


def make_reward(settings: dict[str, Any]) -> None:
    """An adapter and a head as stage rm leaves them, with random weights."""
    asked = {**keys(settings), "reward_model": "fastppo.toy:vowels", "critic": "adapter"}
    config = config_from_dict({**asked, "reward_model_type": "function"})
    made = roles.build(config, torch.device("cpu"))
    assert made.critic_head is not None
    with torch.no_grad():
        for parameter in [*made.trainable_parameters("actor"), made.critic_head.weight]:
            parameter.copy_(0.02 * torch.randn_like(parameter))
    folder = Path(settings["reward"])
    save.save_model(made.model, made.critic_head, load_tokenizer(config), folder)
    path = folder / "adapter_config.json"
    adapter = json.loads(path.read_text(encoding="utf-8"))
    adapter = {name: adapter[name] for name in KNOWN}
    path.write_text(json.dumps({**adapter, "base_model_name_or_path": settings["model"]}))
    (folder / RECORD).write_text(json.dumps({"score_at": "eos", "template": settings["template"]}))


def run(settings: dict[str, Any], watch: Watch) -> None:
    if settings.get("make_reward"):
        make_reward(settings)
        return
    watch.phase(trainer, "sample", "generate")
    watch.phase(trainer, "score", "score")
    watch.phase(Reward, "__call__", "score")
    state = trainer.init_state(config_from_dict(keys(settings)))
    heads = [] if state.roles.critic_head is None else [state.roles.critic_head]
    held = [p for group in state.optimizer.param_groups for p in group["params"]]
    watch.facts["trainable"] = trainable(state.roles.model, *heads)
    watch.facts["optimised"] = sum(p.numel() for p in held)
    watch.begin()
    try:
        while True:
            state = trainer.step_update(state)
            watch.facts["response_tokens"] = state.metrics.rows[-1]["response_tokens"]
            watch.lap()
    except Finished:
        if settings.get("products"):
            watch.facts["peak_gib"] = watch.peak_gib()  # without the matrices of what follows
            watch.facts["products"] = products_of_a_step(state, watch)
        raise


def products_of_a_step(state: TrainState, watch: Watch) -> dict[str, float]:
    """One more step, its products counted, and each timed by itself."""
    made = Products(watch.current)
    with made.counting():
        state = trainer.step_update(state)
    longest = state.metrics.rows[-1]["response_length_max"]
    head_VD = state.roles.lm_head.weight_VD
    speed = bytes_per_second()
    read = decoding_bytes(state.roles.model, head_VD) * (longest - 1) / speed
    phases = defaultdict(float, made.seconds())
    phases["generate"] += read
    return {**phases, "gb_per_second": speed / 1e9}


if __name__ == "__main__":
    main(run)
