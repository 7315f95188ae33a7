"""TRL 0.24's PPOTrainer trains on the demo's task; run by `python -m benchmarks.learn --only trl`.

As in run_trl.py the policy is under a LoRA adapter, whose null is the reference. Reward and value
model are the reward model as `fastppo-export` writes it, the latter under an adapter of its own: so
TRL's own example starts its critic, and so does `critic: adapter`. Set from outside: the bias of
the reward model's head, for which a classifier of transformers has no place, and the policy's
adapter in the upper layers alone. What the trainer has no setting for stays as it is: it clips no
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from watch import Watch, main, trainable


def texts_of(tokenizer: Any, ids_BT: torch.Tensor, first: int) -> list[str]:
    """The responses from token `first` on, each up to its first EOS."""
    rows = [row[first:] for row in ids_BT.tolist()]
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    cut = [row[: next((i for i, x in enumerate(row) if x in ends), len(row))] for row in rows]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in cut]


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

    def lora(task: str, layers: list[int] | None) -> LoraConfig:
        rank = settings["rank"]
        return LoraConfig(
            task_type=task,
            r=rank,
            lora_alpha=2 * rank,
            layers_to_transform=layers,
            target_modules=[
                *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
            ],
        )

    def classifier() -> Any:
        made = AutoModelForSequenceClassification.from_pretrained(
            settings["classifier"], num_labels=1, dtype=torch.float32
        )
        head = torch.nn.Linear(made.score.in_features, 1)
        with torch.no_grad():
            head.weight.copy_(made.score.weight)
            head.bias.fill_(made.config.score_bias)
        made.score = head
        return made

    value_model = inject_adapter_in_model(lora("SEQ_CLS", None), classifier())
    value_model.score.requires_grad_(True)
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    texts: list[list[str]] = []
    sample = ppo_trainer.batch_generation

    def heard(policy: Any, queries: torch.Tensor, *args: Any) -> Any:
        ids_BT, logits = sample(policy, queries, *args)
        texts.append(texts_of(tokenizer, ids_BT, queries.shape[1]))
        return ids_BT, logits

    ppo_trainer.batch_generation = heard
    updates = 0

    class Ends(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.begin()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if len(watch.steps) + 1 == settings["steps"]:
                logged = [row for row in state.log_history if "objective/kl" in row]
                watch.facts |= {
                    "kl": [row["objective/kl"] for row in logged],
                    "proxy": [row["objective/scores"] for row in logged],
                    "texts": texts,
                    "updates": updates,
                }
                made.model.policy.save_pretrained(settings["adapter"])
            watch.lap()  # the last one ends the run

    config = PPOConfig(
        output_dir=f"{settings['folder']}/trl",
        per_device_train_batch_size=settings["batch"],
        gradient_accumulation_steps=1,
        num_ppo_epochs=settings["epochs"],
        num_mini_batches=1,
        total_episodes=settings["steps"] * settings["batch"],
        response_length=settings["new_tokens"],
        stop_token="eos",
        temperature=settings["temperature"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["scheduler"],
        adam_epsilon=settings["adam_epsilon"],
        kl_coef=settings["kl_coef"],
        cliprange=settings["cliprange"],
        cliprange_value=settings["cliprange_value"],
        vf_coef=settings["vf_coef"],
        gamma=settings["gamma"],
        lam=settings["lam"],
        num_sample_generations=0,
        gradient_checkpointing=False,
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
        peft_config=lora("CAUSAL_LM", settings["layers"]),
        callbacks=[Ends()],
    )
    step = made.optimizer.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal updates
        updates += 1
        return step(*args, **kwargs)

    made.optimizer.step = counted
    watch.facts["trainable"] = trainable(made.model)
    for name in ("trl", "transformers", "peft"):
        watch.facts[name] = version(name)
    made.train()


if __name__ == "__main__":
    main(run)
