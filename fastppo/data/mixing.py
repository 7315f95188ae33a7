"""Read the data sets of a run, mix them into one list, and split off records for evaluation."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

from fastppo.data.files import read_rows
from fastppo.data.info import Source, check_ranking, find_source
from fastppo.data.records import DroppedRows, Record, to_records
from fastppo.errors import UserError, note
from fastppo.seeds import seed_of

if TYPE_CHECKING:
    from fastppo.config import Config

STRATEGIES = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}


@dataclass(frozen=True)
class Records:
    """The records of a run: for training, for evaluation, and for the PTX loss (`ptx_dataset`)."""

    train: list[Record]
    eval: list[Record]
    ptx: list[Record] = field(default_factory=list)


def read_records(config: Config) -> Records:
    """Read all records that the configuration names, and check that they fit its stage.

    Notes on bad rows are printed after all sets have been read, so that an error is one line.
    """
    notes: list[str] = []
    train = read_sets(config, config.dataset, "dataset", notes)
    evaluation: list[Record] = []
    if config.eval_dataset:
        evaluation = read_sets(config, config.eval_dataset, "eval_dataset", notes)
    elif config.val_size:
        train, evaluation = split_validation(train, config)
    ptx = read_demonstrations(config, notes)
    for line in dict.fromkeys(notes):
        note(line)
    return Records(train, evaluation, ptx)


def read_demonstrations(config: Config, notes: list[str]) -> list[Record]:
    """The records of `ptx_dataset`; raises UserError if one has no answer."""
    if config.ptx_dataset is None or config.stage != "ppo":
        return []
    records = read_sets(config, config.ptx_dataset, "ptx_dataset", notes)
    for record in records:
        if record.response is None:
            raise UserError(
                f"{record.where}: ptx_dataset learns from answers, and this has none; fill in its "
                "output, or drop the row"
            )
    return records


def read_sets(config: Config, names: str, key: str, notes: list[str]) -> list[Record]:
    """The mixed records of the data sets in the comma-separated `names`, the value of `key`."""
    sets = [read_set(config, name.strip(), key, notes) for name in names.split(",")]
    return mix(sets, config)


def read_set(config: Config, name: str, key: str, notes: list[str]) -> list[Record]:
    """The valid records of one data set, limited by num_samples and max_samples.

    Notes on bad rows are appended to `notes`.
    """
    source = find_source(config, name, key)
    check_ranking(config, source)
    rows = read_rows(source, config)
    first = next(rows, None)
    if first is None:
        raise UserError(
            f"{config.source}: {key}: '{name}' ({source.path or source.hub}) has no records; "
            "add some"
        )
    if source.plain and isinstance(first.content, dict):
        source = guess_format(source, first.content, config)
    wanted = source.info.get("num_samples")
    dropped = DroppedRows(str(source.path or source.hub))
    limit = config.max_samples if wanted is None else None
    records = to_records(chain([first], rows), source, dropped, limit)
    line = dropped.note()
    if line:
        notes.append(line)
    if wanted is not None:
        records = draw_samples(records, wanted, seed_of(config.seed, f"num_samples {name}"))
    return records[: config.max_samples]


def guess_format(source: Source, row: dict[str, object], config: Config) -> Source:
    """The source with the format of its first row, for sets without an entry."""
    if config.stage == "ppo" and {"chosen", "rejected"} <= set(row):
        check_ranking(config, replace(source, info={"ranking": True}))
    kinds = {"conversations": "sharegpt", "messages": "openai"}
    found = [kind for column, kind in kinds.items() if column in row]
    info = {**source.info, **({"formatting": found[0]} if found else {})}
    if not found and "prompt" in row and "instruction" not in row:  # as in TRL: text or messages
        info["columns"] = {"prompt": "prompt"}
        if config.stage == "ppo" and isinstance(row["prompt"], list):
            info |= {"formatting": "openai", "columns": {"messages": "prompt"}}
    if source.path is not None and source.path.suffix == ".txt":
        info["columns"] = {"prompt": "text"}
    return replace(source, info=info)


def draw_samples(records: list[Record], count: int, seed: int) -> list[Record]:
    """Exactly `count` random records; no record is drawn again before all have been drawn."""
    generator = random.Random(seed)
    drawn = generator.sample(records, min(count, len(records)))
    return drawn + generator.choices(records, k=count - len(drawn))


def mix(sets: list[list[Record]], config: Config) -> list[Record]:
    """The records of all sets in one list, by mix_strategy.

    The sets are concatenated, or interleaved in the same order as by LLaMA-Factory (`datasets`).
    """
    if len(sets) == 1 or config.mix_strategy == "concat":
        return list(chain.from_iterable(sets))
    probabilities = config.mixing_probabilities
    if probabilities is not None and len(probabilities) != len(sets):
        raise UserError(
            f"{config.source}: interleave_probs: has {len(probabilities)} numbers for "
            f"{len(sets)} data sets; give one for each"
        )
    from datasets import Dataset, interleave_datasets

    places = [
        Dataset.from_dict({"set": [number] * len(records), "row": list(range(len(records)))})
        for number, records in enumerate(sets)
    ]
    order = interleave_datasets(
        places,
        probabilities=probabilities,
        seed=config.seed,
        stopping_strategy=STRATEGIES[config.mix_strategy],
    )
    return [sets[number][row] for number, row in zip(order["set"], order["row"], strict=True)]


def split_validation(records: list[Record], config: Config) -> tuple[list[Record], list[Record]]:
    """Split off `val_size` records; returns those for training and those for evaluation.

    Both are in the file's order. The rows for evaluation are the same as in LLaMA-Factory, which
    calls `datasets.Dataset.train_test_split(val_size, seed=seed)`.
    """
    import numpy as np

    size = config.val_size
    count = int(size) if size >= 1 else math.ceil(size * len(records))
    if count >= len(records):
        raise UserError(
            f"{config.source}: val_size: holds out {count} of {len(records)} records and leaves "
            "none to train on; lower it"
        )
    chosen = set(np.random.default_rng(config.seed).permutation(len(records))[:count].tolist())
    return (
        [record for i, record in enumerate(records) if i not in chosen],
        [records[i] for i in sorted(chosen)],
    )
