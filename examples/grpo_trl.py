"""TRL's GRPOTrainer with LoRA, with TRL's output head and with ours: numbers, CPU time, memory.

    python examples/grpo_trl.py MODEL [STEPS]

MODEL is a folder or a name on the hub; the demo's is output/demo/model. It needs trl 1.16.0. Each
way runs in a process of its own, one after the other.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext

from both_ways import Series, compare

COMPARED = ("loss", "grad_norm", "kl", "entropy")
PROMPTS = ["Describe the sea.", "What is a good morning?", "Write a line on rain.", "Why run?"]


def brevity(completions: list[str], **_: object) -> list[float]:
    """The reward: few words."""
    return [-len(text.split()) / 20 for text in completions]


def train(ours: bool, model: str, steps: int, length: int = 48) -> tuple[Series, float]:
    """What a few steps of GRPO log, and the CPU seconds of the loss's forward."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    from fastppo.integrations.trl import patched

    settings = GRPOConfig(
        output_dir="output/grpo_trl",
        max_steps=steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=length,
        logging_steps=1,
        # Every batch is trained on twice, and far from the reference: with ratios of 1 and a KL of
        # 0, as in the first step, the loss is rounding around 0.
        num_iterations=2,
        beta=0.2,
        learning_rate=3e-3,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    with patched() if ours else nullcontext():  # the one line that is fastppo's
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=brevity,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS * steps}),
            peft_config=LoraConfig(r=16, target_modules="all-linear"),
        )
    trainer.remove_callback(PrinterCallback)  # all is printed at the end
    compute, seconds = trainer._compute_loss, 0.0

    def timed(*args: object) -> object:
        nonlocal seconds
        start = time.process_time()
        loss = compute(*args)
        seconds += time.process_time() - start
        return loss

    trainer._compute_loss = timed
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    return {key: [row[key] for row in log] for key in COMPARED}, seconds


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("python examples/grpo_trl.py MODEL [STEPS]")
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    compare("TRL's", "the loss's forward", train, sys.argv[1], steps)
