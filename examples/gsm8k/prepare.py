"""GSM8K as records with a question and its final answer, for ppo.yaml and grpo.yaml.

    python examples/gsm8k/prepare.py           # by `datasets`, from the hub
    python examples/gsm8k/prepare.py FOLDER    # from train.jsonl and test.jsonl in FOLDER

writes output/gsm8k/train.json and output/gsm8k/test.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.gsm8k.reward import ASK, final_answer

OUT = Path("output/gsm8k")


def rows(split: str, folder: Path | None) -> Iterable[dict[str, Any]]:
    """Rows with `question` and `answer`, whose last line is `#### ` and a number."""
    if folder is None:
        from datasets import load_dataset

        return load_dataset("openai/gsm8k", "main", split=split)
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def to_record(row: dict[str, Any]) -> dict[str, str]:
    """The question as verl asks it; its answer as a number."""
    answer = final_answer(row["answer"])
    if answer is None:
        raise ValueError(f"no '#### ' and a number in the answer to: {row['question'][:80]}")
    return {"instruction": f"{row['question']} {ASK}", "answer": answer}


def main(argv: list[str]) -> None:
    """Write both splits."""
    folder = Path(argv[0]) if argv else None
    OUT.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        records = [to_record(row) for row in rows(split, folder)]
        path = OUT / f"{split}.json"
        path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", "utf-8")
        print(f"{path}: {len(records)} problems")


if __name__ == "__main__":
    main(sys.argv[1:])
