"""TRL 0.24's PPOTrainer, timed; run by `python -m benchmarks step`.

The policy under a LoRA adapter, whose null is the reference; a value model with an adapter of its
own; and a reward model, which is frozen. PPOConfig's gradient_checkpointing reaches no model in
this version, so it is switched on, and off for sampling, on the models themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from watch import Watch, main, scoring, trainable


def run(settings: dict[str, Any], watch: Watch) -> None:
    from importlib.metadata import version

    from datasets import Dataset
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl import PPOConfig
    from trl.trainer import ppo_trainer

    class Laps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.lap()

    def lora(task: str) -> LoraConfig:
        rank = settings["rank"]
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        return LoraConfig(task_type=task, r=rank, lora_alpha=2 * rank, target_modules=targets)

    def classifier() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            settings["model"], num_labels=1, dtype=torch.float32
        )

    value_model = inject_adapter_in_model(lora("SEQ_CLS"), classifier())
    value_model.score.requires_grad_(True)
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)

    def enable(*_: Any) -> None:
        for one in (model, value_model):
            one.gradient_checkpointing_enable({"use_reentrant": False})

    def disable(*_: Any) -> None:
        for one in (model, value_model):
            one.gradient_checkpointing_disable()

    if settings["checkpointing"]:
        enable()
    ppo_trainer.PolicyAndValueWrapper.gradient_checkpointing_enable = enable
    ppo_trainer.PolicyAndValueWrapper.gradient_checkpointing_disable = disable
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    config = PPOConfig(
        output_dir=f"{settings['folder']}/trl",
        per_device_train_batch_size=settings["batch"],
        gradient_accumulation_steps=settings["accumulation"],
        num_ppo_epochs=settings["epochs"],
        num_mini_batches=1,
        total_episodes=settings["steps"] * settings["batch"] * settings["accumulation"],
        response_length=settings["new_tokens"],
        temperature=1.0,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        num_sample_generations=0,
        report_to="none",
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        seed=settings["seed"],
    )
    made = ppo_trainer.PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=model,
        ref_model=None,
        reward_model=classifier(),
        value_model=value_model,
        train_dataset=Dataset.from_dict({"input_ids": settings["prompts"]}),
        eval_dataset=Dataset.from_dict({"input_ids": settings["prompts"][:1]}),
        peft_config=lora("CAUSAL_LM"),
        callbacks=[Laps()],
    )
    held = [p for group in made.optimizer.param_groups for p in group["params"]]
    watch.facts["trainable"] = trainable(made.model)
    watch.facts["optimised"] = sum(p.numel() for p in held)
    for name in ("trl", "transformers", "peft"):
        watch.facts[name] = version(name)
    # Every response has the length asked for: TRL stops at no token unless it is given one.
    tokens = settings["new_tokens"] * settings["batch"] * settings["accumulation"]
    watch.facts["response_tokens"] = tokens
    watch.phase(ppo_trainer, "batch_generation", "generate")
    watch.phase(ppo_trainer, "get_reward", "score")
    watch.phase(ppo_trainer, "forward", scoring)
    made.train()


if __name__ == "__main__":
    main(run)
