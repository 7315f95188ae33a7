"""Write TL;DR's prompts and pairs: python -m examples.tldr.make_data [FOLDER]

FOLDER holds prompts-train.jsonl, prompts-test.jsonl (columns `prompt`, `completion`),
pairs-train.jsonl and pairs-test.jsonl (columns `prompt`, `chosen`, `rejected`); without it
`trl-lib/tldr` and `trl-lib/tldr-preference` are read from the hub. The files go to
output/tldr/data.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

OUT = Path("output/tldr/data")
SETS = {"prompts": "trl-lib/tldr", "pairs": "trl-lib/tldr-preference"}
SPLITS = {"train": "train", "test": "validation"}
EVALUATED = 1000  # posts and pairs that an evaluation takes from the held-out split, at most


def text(value: Any) -> str:
    """A text, or that of a list of one message, as the hub has had both."""
    return value if isinstance(value, str) else str(value[-1]["content"])


def record(kind: str, row: Mapping[str, Any]) -> dict[str, str]:
    """A row under fastppo's names; an answer begins with a blank, as it does after `TL;DR:`."""
    if kind == "prompts":
        return {"instruction": text(row["prompt"]), "output": f" {text(row['completion']).strip()}"}
    answers = {name: f" {text(row[name]).strip()}" for name in ("chosen", "rejected")}
    return {"instruction": text(row["prompt"]), **answers}


def rows(kind: str, split: str, folder: Path | None) -> Iterable[Mapping[str, Any]]:
    """The rows of a split, from a local folder or from the hub."""
    if folder is not None:
        lines = (folder / f"{kind}-{split}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    from datasets import load_dataset

    return load_dataset(SETS[kind], split=SPLITS[split])  # type: ignore[no-any-return]


def main() -> None:
    """Write all four files and their dataset_info.json."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    OUT.mkdir(parents=True, exist_ok=True)
    info: dict[str, Any] = {}
    for kind in SETS:
        for split in SPLITS:
            made = [record(kind, row) for row in rows(kind, split, folder)]
            made = made[:EVALUATED] if split == "test" else made
            name = f"tldr_{kind}_{split}"
            (OUT / f"{name}.json").write_text(json.dumps(made, indent=1), encoding="utf-8")
            info[name] = {"file_name": f"{name}.json"} | (
                {"ranking": True} if kind == "pairs" else {}
            )
            print(f"{len(made)} rows in {OUT / name}.json")
    (OUT / "dataset_info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
