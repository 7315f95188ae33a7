"""Write GSM8K's questions for stage ppo: python -m examples.gsm8k.make_data [FOLDER]

FOLDER holds the set's own train.jsonl and test.jsonl (columns `question` and `answer`); without it
`openai/gsm8k` is read from the hub. The files go to output/gsm8k/data.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from examples.gsm8k.reward import last_answer

ASK = 'Let\'s think step by step and output the final answer after "####".'  # verl's words
OUT = Path("output/gsm8k/data")


def record(row: Mapping[str, str]) -> dict[str, str]:
    """A prompt with the number that its reward compares with."""
    right = last_answer(row["answer"])
    if right is None:
        raise SystemExit(f"no #### in the answer to {row['question'][:60]!r}")
    return {"instruction": f"{row['question']} {ASK}", "answer": right}


def rows(split: str, folder: Path | None) -> Iterable[Mapping[str, str]]:
    """The rows of a split, from a local folder or from the hub."""
    if folder is not None:
        lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    from datasets import load_dataset

    return load_dataset("openai/gsm8k", "main", split=split)  # type: ignore[no-any-return]


def main() -> None:
    """Write both splits and their dataset_info.json."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    OUT.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        made = [record(row) for row in rows(split, folder)]
        (OUT / f"{split}.json").write_text(json.dumps(made, indent=1), encoding="utf-8")
        print(f"{len(made)} questions in {OUT / split}.json")
    info = {f"gsm8k_{split}": {"file_name": f"{split}.json"} for split in ("train", "test")}
    (OUT / "dataset_info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
