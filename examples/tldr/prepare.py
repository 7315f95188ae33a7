"""Reddit posts to summarise as records, for ppo.yaml.

    python examples/tldr/prepare.py           # trl-lib/tldr by `datasets`, from the hub
    python examples/tldr/prepare.py FOLDER    # from train.jsonl and validation.jsonl in FOLDER

writes output/tldr/train.json and output/tldr/validation.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OUT = Path("output/tldr")


def rows(split: str, folder: Path | None) -> Iterable[dict[str, Any]]:
    """Rows with `prompt`, which ends with `TL;DR:`, and `completion`, a person's summary."""
    if folder is None:
        from datasets import load_dataset

        return load_dataset("trl-lib/tldr", split=split)
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def main(argv: list[str]) -> None:
    """Write both splits."""
    folder = Path(argv[0]) if argv else None
    OUT.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        records = [
            {"instruction": row["prompt"], "output": row["completion"]}
            for row in rows(split, folder)
        ]
        path = OUT / f"{split}.json"
        path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", "utf-8")
        print(f"{path}: {len(records)} posts")


if __name__ == "__main__":
    main(sys.argv[1:])
