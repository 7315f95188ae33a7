"""20 steps of TRL's GRPOTrainer on a tiny model, in a process of its own; prints its losses.

Before them it prints whether TRL's own functions were replaced in the block and restored after it.

python -m tests.integrations.trl_run FOLDER ours|theirs|late|disturbed
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext

from benchmarks import peers

sys.path.append(str(peers.SITE))

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from fastppo.integrations import trl as ours


def letters(completions: list[str], **_: object) -> list[float]:
    """A reward that tells any two completions apart."""
    return [sum(map(ord, text)) % 17 / 8 for text in completions]


def heads() -> dict[str, object]:
    """TRL's modules that have the function which gives a model its head, and that function."""
    name = "add_fused_lm_head"
    found = {path: vars(module).get(name) for path, module in list(sys.modules.items())}
    return {path: head for path, head in found.items() if path.startswith("trl.") and head}


def main(folder: str, which: str) -> None:
    settings = GRPOConfig(
        output_dir=f"{folder}/{which}",
        max_steps=20,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        num_iterations=2,
        beta=0.1,
        entropy_coef=0.01,
        optim="sgd",  # Adam divides by small second moments, and makes rounding large
        learning_rate=0.1,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )

    def make() -> GRPOTrainer:
        return GRPOTrainer(
            model=f"{folder}/model",
            reward_funcs=letters,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": ["a b", "c d e", "f"] * 8}),
        )

    if which == "late":
        trainer = make()
        with ours.patched():
            pass
    if which == "disturbed":  # our head with a temperature that is off by 1e-3
        head = ours.logprobs_and_entropy
        ours.logprobs_and_entropy = lambda *given, temperature, **settings: head(
            *given, temperature=1.001 * temperature, **settings
        )
    before = heads()
    with ours.patched() if which in ("ours", "disturbed") else nullcontext():
        trainer = make()
        inside = heads()
    replaced = all(inside[path] is not head for path, head in before.items())
    after = heads()
    restored = before.items() <= after.items() and len(set(after.values())) == 1
    print(json.dumps({"modules": len(before), "replaced": replaced, "restored": restored}))
    trainer.train()
    keys = ("loss", "grad_norm", "kl", "entropy")
    log = [{k: row[k] for k in keys} for row in trainer.state.log_history if "loss" in row]
    print(json.dumps(log))


if __name__ == "__main__":
    main(*sys.argv[1:])
