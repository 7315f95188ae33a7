"""Files of every type, folders of them, and data sets on the hub."""

from __future__ import annotations

import datasets
import pytest

from fastppo.config import config_from_dict
from fastppo.data import read_records
from fastppo.errors import UserError
from tests.project import PPO, RM, asked, describe, records, write_json

ROWS = [{"instruction": "写诗", "input": "雨"}, {"instruction": "b", "input": ""}]
QUESTIONS = ["写诗\n雨", "b"]


def write(path, rows):
    """`rows` in the format that the extension names."""
    if path.suffix == ".json":
        write_json(path, rows)
    elif path.suffix == ".jsonl":
        datasets.Dataset.from_list(rows).to_json(path, force_ascii=False)
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        with datasets.arrow_writer.ArrowWriter(path=str(path)) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "arrow"])
def test_a_file_of_every_type_and_a_folder_of_two(project, cache, kind):
    for name in (f"rows.{kind}", f"many/b.{kind}", f"many/a.{kind}"):
        path = project / "data" / name
        path.parent.mkdir(exist_ok=True)
        write(path, ROWS)
    (project / "data" / "many" / ".DS_Store").write_text("the system's")
    describe(project, one={"file_name": f"rows.{kind}"}, two={"file_name": "many"})
    assert asked(records(project, dataset="one", cache_dir=cache).train) == QUESTIONS
    got = records(project, dataset="two", cache_dir=cache).train
    assert asked(got) == QUESTIONS * 2
    assert f"a.{kind} row 1" in got[0].where or "data/many row 1" in got[0].where
    plain = records(project, dataset=f"data/rows.{kind}", cache_dir=cache).train
    assert asked(plain) == QUESTIONS


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(project, cache, kind):
    path = project / f"rows.{kind}"
    write(path, ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert asked(records(project, dataset=path.name, cache_dir=cache).train) == QUESTIONS


def test_a_line_of_text_is_a_prompt(project, cache):
    (project / "data" / "lines.txt").write_bytes(b"\xef\xbb\xbf" + "写诗\nb\n".encode())
    describe(project, lines={"file_name": "lines.txt", "columns": {"prompt": "text"}})
    assert asked(records(project, dataset="lines", cache_dir=cache).train) == ["写诗", "b"]
    plain = records(project, dataset="data/lines.txt", cache_dir=cache).train
    assert asked(plain) == ["写诗", "b"]


def test_ranked_conversations_from_parquet(project, cache):
    turn = {"from": "human", "value": "a", "weight": None}
    row = {
        "conversations": [turn],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    }
    write(project / "pairs.parquet", [row])
    config = config_from_dict({**RM, "dataset": "pairs.parquet", "cache_dir": cache})
    (record,) = read_records(config).train
    assert (record.chosen, record.rejected) == ("yes", "no")


def test_plain_pairs_are_for_stage_rm(project):
    write_json(project / "mine.json", [{"instruction": "a", "chosen": "b", "rejected": "c"}])
    config = config_from_dict({**RM, "dataset": "mine.json"})
    assert read_records(config).train[0].chosen == "b"


def test_a_split_of_a_file(project, cache):
    write_json(project / "data" / "rows.json", ROWS)
    describe(project, rows={"file_name": "rows.json", "split": "train[1:]"})
    assert asked(records(project, dataset="rows", cache_dir=cache).train) == ["b"]


def test_the_hub_is_asked_for_name_subset_split_and_folder(project, monkeypatch):
    calls = []

    def load_dataset(place, **how):
        calls.append((place, how))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    entry = {"subset": "zh", "split": "test", "folder": "python", "ms_hub_url": "else/where"}
    # A name on the hub wins over a file's, as in LLaMA-Factory.
    describe(project, far={"hf_hub_url": "owner/set", "file_name": "rows.json", **entry})
    got = records(project, dataset="far", cache_dir="cache").train
    assert asked(got) == QUESTIONS
    assert got[0].where == "owner/set row 1"
    how = {"name": "zh", "data_dir": "python", "split": "test", "cache_dir": "cache"}
    assert calls == [("owner/set", how)]
    calls.clear()
    records(project, dataset="a/b,c/d", dataset_dir="ONLINE")
    assert [place for place, _ in calls] == ["a/b", "c/d"]


def test_no_network_is_one_line(project, monkeypatch):
    def load_dataset(place, **how):
        raise ConnectionError("Couldn't reach 'owner/set' on the Hub\nMaxRetryError: ...")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    describe(project, far={"hf_hub_url": "owner/set"})
    with pytest.raises(UserError) as error:
        read_records(config_from_dict({**PPO, "dataset": "far"}))
    assert str(error.value) == (
        "'owner/set' on the Hugging Face hub: cannot be read (Couldn't reach 'owner/set' on the "
        "Hub); check the name and the network"
    )


def test_a_link_to_another_place_in_the_folder_is_followed(project):
    (project / "data" / "link.json").symlink_to("prompts.json")
    describe(project, linked={"file_name": "link.json"})
    assert len(records(project, dataset="linked").train) == 4
