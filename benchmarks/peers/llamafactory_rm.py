"""A reward model trained and scored by LLaMA-Factory itself, to hold fastppo's reading against.

    python -m benchmarks.peers.environments llamafactory    # once
    python -m benchmarks.peers.llamafactory_rm FOLDER

FOLDER gets the tiny base, the pairs, what LLaMA-Factory's stage rm wrote (adapter, value head,
tokenizer) and `scores.json`: its own scores of the held-out pairs in full, where its
generated_predictions.jsonl has two digits. tests/fixtures/llamafactory_rm is such a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

WORDS = ["rain", "tea", "trains", "a cat", "the sea", "bread", "winter", "a song"]
SYSTEM = "You answer in one line."
KEPT = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "value_head.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "trainer_state.json",
    "all_results.json",
    "scores.json",
)


def absent() -> str | None:
    """Why LLaMA-Factory cannot run here; None where it can."""
    from benchmarks.peers.environments import LLAMAFACTORY

    if LLAMAFACTORY.ready:
        return None
    return "not installed; run: python -m benchmarks.peers.environments llamafactory"


def make_inputs(folder: Path) -> dict[str, Any]:
    """A tiny Llama and pairs in LLaMA-Factory's formats; the settings of its stage rm."""
    from fastppo import toy

    toy.write_model(folder / "base", seed=5, hidden_size=16)
    # transformers 5 writes names into this file that 4 does not know.
    readable = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>"],
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    path = folder / "base" / "tokenizer_config.json"
    path.write_text(json.dumps(readable, indent=1) + "\n", encoding="utf-8")
    pairs = [
        {
            "conversations": [
                {"from": "system", "value": SYSTEM},
                {"from": "human", "value": f"Write about {word}, please."},
                {"from": "gpt", "value": "How long?"},
                {"from": "human", "value": f"{i + 3} words."},
            ],
            "chosen": {"from": "gpt", "value": f"{word.title()}: " + "a quiet eau " * (i % 3 + 1)},
            "rejected": {"from": "gpt", "value": f"{word} " + "brr tsk pfff " * (i % 4)},
        }
        for i, word in enumerate(WORDS * 2)
    ]
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    sets = {"train": pairs[:10], "held_out": pairs[10:]}
    info = {
        name: {
            "file_name": f"{name}.json",
            "ranking": True,
            "formatting": "sharegpt",
            "columns": columns,
        }
        for name in sets
    }
    for name, value in {**sets, "dataset_info": info}.items():
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return {
        "stage": "rm",
        "do_train": True,
        "do_eval": True,
        "do_predict": True,
        "model_name_or_path": "base",  # relative: whoever moves the folder can still read it
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_target": "all",
        "dataset": "train",
        "eval_dataset": "held_out",
        "dataset_dir": ".",
        "template": "chatml",
        "cutoff_len": 256,
        "output_dir": "out",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-3,
        "num_train_epochs": 4.0,
        "logging_steps": 5,
        "save_steps": 500,
        "report_to": "none",
        "bf16": False,
        "fp16": False,
        "preprocessing_num_workers": 1,
        "overwrite_cache": True,
    }


def run_inside(config: str) -> None:
    """Under LLaMA-Factory's packages: its own run, and its trainer's scores before rounding."""
    # Imported whatever is trained, and there is no build of it for every torch.
    audio = ModuleType("torchaudio")
    audio.__spec__ = ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = audio
    from llamafactory.hparams import get_train_args
    from llamafactory.train.rm.trainer import PairwiseTrainer
    from llamafactory.train.rm.workflow import run_rm

    rounded = PairwiseTrainer.save_predictions

    def save_predictions(self, predicted) -> None:
        rounded(self, predicted)
        chosen, rejected = (scores.astype("float64").tolist() for scores in predicted.predictions)
        path = Path(self.args.output_dir) / "scores.json"
        path.write_text(json.dumps({"chosen": chosen, "rejected": rejected}, indent=1) + "\n")

    PairwiseTrainer.save_predictions = save_predictions
    arguments = get_train_args(json.loads(Path(config).read_text(encoding="utf-8")))
    model, data, training, finetuning, _ = arguments
    run_rm(model, data, training, finetuning, [])


def run(folder: Path, settings: dict[str, Any]) -> Path:
    """LLaMA-Factory's run in `folder`, where all paths begin; its output_dir, scores.json in it.

    Raises:
        RuntimeError: its run failed; the end of what it said.
    """
    config = folder / "llamafactory.json"
    config.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    environment = {
        **os.environ,
        "DISABLE_VERSION_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "USE_TORCH_XLA": "0",
    }
    from benchmarks.peers.environments import LLAMAFACTORY

    script, python = str(Path(__file__).resolve()), str(LLAMAFACTORY.python.absolute())
    command = [python, script, "--inside", str(config.resolve())]
    ran = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if ran.returncode != 0:
        raise RuntimeError(f"LLaMA-Factory's stage rm failed:\n{ran.stdout}\n{ran.stderr}"[-6000:])
    return folder / str(settings["output_dir"])


def make(folder: Path) -> None:
    """Inputs, LLaMA-Factory's run, and of it what a reader of reward models needs."""
    folder.mkdir(parents=True, exist_ok=True)
    out = run(folder, make_inputs(folder))
    for name in KEPT:
        if (out / name).is_file():
            shutil.copy(out / name, folder / name)
    shutil.rmtree(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        run_inside(options.inside)
        return 0
    reason = absent()
    if reason or not options.folder:
        print(reason or "name a FOLDER to write to", file=sys.stderr)
        return 2
    make(Path(options.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
