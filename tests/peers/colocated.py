"""PPO steps with vLLM beside the trainer, in an environment that has both.

    python -m tests.peers.colocated FOLDER

writes a model and a run into the folder, and what test_vllm.py asks for as the last line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from fastppo import toy
from fastppo.ppo import trainer
from fastppo.ppo.engine_start import Comparison
from fastppo.ppo.state import init_state
from tests.tiny import stir


def main(folder: Path) -> None:
    toy.write_model(folder / "model", hidden_size=128)
    config = toy.config(
        folder / "run",
        model_name_or_path=str(folder / "model"),
        metrics_dir=str(folder / "metrics"),
        per_device_train_batch_size=8,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.1,
        vllm_adapter_dir=str(folder / "adapters"),
    )
    threads = torch.get_num_threads()
    run = init_state(config)
    assert run.engine is not None
    try:
        words = run.engine.words
        for _ in range(2):
            run = trainer.step_update(run)
        compared = Comparison(
            run.engine, run.roles, run.prompts[:4], run.template, run.tokenizer, tokens=16
        )
        with run.roles.use("actor"), torch.no_grad():
            first, again = compared.sample(), compared.sample()
            before_N = compared.logprobs(first)
            stir(run.roles.trainable_parameters("actor"), 4)
            moved_by = (compared.logprobs(first) - before_N).abs().mean().item()
            moved_gap = compared.gap(compared.sample())
        found = {
            "words": words,
            "sent": run.engine.sent,
            "rows": run.metrics.rows,
            "repeats": first.input_ids_BT.tolist() == again.input_ids_BT.tolist(),
            "moved_by": moved_by,
            "moved_gap": moved_gap,
            "threads": [threads, torch.get_num_threads()],
            "process_group": torch.distributed.is_initialized(),
        }
    finally:
        run.engine.close()
    found["left"] = [path.name for path in (folder / "adapters").iterdir()]
    print(json.dumps(found))


if __name__ == "__main__":  # vLLM's child processes import this module
    main(Path(sys.argv[1]))
