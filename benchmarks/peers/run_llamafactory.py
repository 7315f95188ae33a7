"""LLaMA-Factory's PPO step on TRL 0.9.6, timed; run by `python -m benchmarks step`.

Its packages are unmodified. What of them is set from here, so that it starts at all and computes in
float32 as the others do: a stand-in for torchaudio, which is imported and not used; autocast off,
which is unconditional there; and min_new_tokens, so that every response has the length asked for.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from watch import Watch, main, scoring, trainable


def lora(settings: dict[str, Any]) -> dict[str, Any]:
    """Adapters on one base: policy, reference and reward model."""
    return {
        "finetuning_type": "lora",
        "lora_rank": settings["rank"],
        "lora_target": "all",
        "reward_model": settings["reward"],
        "reward_model_type": "lora",
    }


def freeze(settings: dict[str, Any]) -> dict[str, Any]:
    """The last two layers train; no adapter is taken as reward model."""
    return {
        "finetuning_type": "freeze",
        "reward_model": settings["full_reward"],
        "reward_model_type": "full",
    }


METHODS = {"lora": lora, "freeze": freeze}


def keys(settings: dict[str, Any]) -> dict[str, Any]:
    """The YAML."""
    return {
        "stage": "ppo",
        "do_train": True,
        "model_name_or_path": settings["model"],
        **METHODS[settings["finetuning"]](settings),
        "dataset": settings["dataset"],
        "dataset_dir": settings["dataset_dir"],
        "template": settings["template"],
        "output_dir": f"{settings['folder']}/llamafactory",
        "overwrite_output_dir": True,
        "per_device_train_batch_size": settings["batch"],
        "gradient_accumulation_steps": settings["accumulation"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_steps": settings["steps"],
        "ppo_epochs": settings["epochs"],
        "max_new_tokens": settings["new_tokens"],
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "disable_gradient_checkpointing": not settings["checkpointing"],
        "seed": settings["seed"],
        "report_to": "none",
        "logging_steps": 1,
        "save_steps": 100000,
        "use_cpu": True,
    }


def run(settings: dict[str, Any], watch: Watch) -> None:
    if "torchaudio" not in sys.modules:
        audio = ModuleType("torchaudio")
        audio.__spec__ = ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = audio
    from importlib.metadata import version

    from llamafactory.hparams import get_train_args
    from llamafactory.train.ppo.trainer import CustomPPOTrainer
    from llamafactory.train.ppo.workflow import run_ppo
    from transformers import TrainerCallback

    class Laps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.lap()

    made = CustomPPOTrainer.__init__

    def made_for_this(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.amp_context = nullcontext()
        self.generation_config.min_new_tokens = settings["new_tokens"]
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        watch.facts["trainable"] = trainable(self.model)
        watch.facts["optimised"] = sum(p.numel() for p in held)

    original = CustomPPOTrainer.step

    def step(self: Any, queries: Any, responses: Any, scores: Any) -> Any:
        watch.facts["response_tokens"] = sum(map(len, responses))
        return original(self, queries, responses, scores)

    CustomPPOTrainer.__init__, CustomPPOTrainer.step = made_for_this, step
    for name in ("llamafactory", "trl", "transformers", "peft"):
        watch.facts[name] = version(name)
    watch.phase(CustomPPOTrainer, "get_inputs", "generate")
    watch.phase(CustomPPOTrainer, "get_rewards", "score")
    watch.phase(CustomPPOTrainer, "batched_forward_pass", scoring)
    model, data, training, finetuning, generating = get_train_args(keys(settings))
    run_ppo(model, data, training, finetuning, generating, [Laps()])


if __name__ == "__main__":
    main(run)
