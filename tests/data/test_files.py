"""Files of every type, folders of them, and data sets on the hub."""

from __future__ import annotations

import time
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from fastppo.config import config_from_dict, downloads
from fastppo.data import read_records
from fastppo.errors import UserError
from tests.project import PPO, RM, asked, describe, records, write_json

ROWS = [{"instruction": "写诗", "input": "雨"}, {"instruction": "b", "input": ""}]
QUESTIONS = ["写诗\n雨", "b"]
NOWHERE = "http://127.0.0.1:9"


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
    monkeypatch.setattr(downloads, "check_dataset", lambda where, name: None)
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


def test_without_a_network_one_line_says_so_after_one_question(project, monkeypatch, cache):
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    describe(project, far={"hf_hub_url": "owner/set"})
    begun = time.monotonic()
    with pytest.raises(UserError) as error:
        read_records(config_from_dict({**PPO, "dataset": "far", "cache_dir": cache}))
    assert str(error.value) == (
        "'owner/set' on the Hugging Face hub: cannot be read (it is not in the cache of "
        f"`datasets`, and {NOWHERE} does not answer (ConnectError)); fetch it where there is a "
        "network, or name a local file (HF_ENDPOINT names a mirror)"
    )
    assert time.monotonic() - begun < 15  # `datasets` alone waits 23 s between its six questions
    assert not datasets.config.HF_HUB_OFFLINE


def test_without_a_network_a_data_set_comes_from_the_cache(project, monkeypatch, cache):
    write_json(project / "rows.json", ROWS)
    files = {"data_files": str(project / "rows.json"), "cache_dir": cache}
    made = Path(datasets.load_dataset("json", split="train", **files).cache_files[0]["filename"])
    hashed = made.parent  # .../json/default-HASH/0.0.0/HASH/json-train.arrow
    made.rename(hashed / "set-train.arrow")
    kept = Path(cache) / "owner___set" / "default" / "0.0.0"
    kept.mkdir(parents=True)
    hashed.rename(kept / hashed.name)
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    describe(project, far={"hf_hub_url": "owner/set"})
    assert asked(records(project, dataset="far", cache_dir=cache).train) == QUESTIONS


def test_a_link_to_another_place_in_the_folder_is_followed(project):
    (project / "data" / "link.json").symlink_to("prompts.json")
    describe(project, linked={"file_name": "link.json"})
    assert len(records(project, dataset="linked").train) == 4


def test_the_numbers_of_a_csv_are_text_as_they_stand(project, cache):
    """pandas would make 12 of 007, 3.1 of 3.10, and nothing of NA and None."""
    lines = ["instruction,input,output", "12,,24", "007,3.10,NA", "None,true,"]
    (project / "data" / "num.csv").write_text("\r\n".join(lines), encoding="utf-8")
    got = records(project, dataset="data/num.csv", cache_dir=cache).train
    assert asked(got) == ["12", "007\n3.10", "None\ntrue"]
    assert [record.response for record in got] == ["24", "NA", None]
    assert got[0].columns == {"instruction": "12", "input": "", "output": "24"}


def test_pairs_of_numbers_in_a_csv(project, cache):
    text = "prompt,chosen,rejected\nWhat is 3+4?,7,8\nWhat is 1+1?,2,3\n"
    (project / "data" / "num2.csv").write_text(text)
    columns = {name: name for name in ("prompt", "chosen", "rejected")}
    describe(project, num2={"file_name": "num2.csv", "ranking": True, "columns": columns})
    config = config_from_dict({**RM, "dataset": "num2", "cache_dir": cache})
    got = read_records(config).train
    assert [(record.chosen, record.rejected) for record in got] == [("7", "8"), ("2", "3")]


def test_windows_line_ends_and_a_byte_order_mark_in_jsonl(project):
    path = project / "data" / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"instruction": "a"}\r\n{"instruction": "b"}\r\n\r\n')
    assert asked(records(project, dataset="data/windows.jsonl").train) == ["a", "b"]


def test_an_extension_in_capitals_is_one(project):
    (project / "data" / "P.JSONL").write_text('{"instruction": "a"}')
    assert asked(records(project, dataset="data/P.JSONL").train) == ["a"]


def test_a_comment_in_an_entry_and_extra_keys_where_they_are_allowed(project, monkeypatch):
    describe(project, d={"file_name": "prompts.json", "_comment": "ours"})
    assert len(records(project, dataset="d").train) == 4
    describe(project, d={"file_name": "prompts.json", "licence": "mit", "columns": None})
    with pytest.raises(UserError, match="unknown key 'licence'"):
        records(project, dataset="d")
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    assert len(records(project, dataset="d").train) == 4


def test_a_column_that_is_null_is_not_listed(project):
    columns = {"prompt": "instruction", "query": None, "history": None, "system": None}
    describe(project, d={"file_name": "prompts.json", "columns": columns})
    assert asked(records(project, dataset="d").train)[0] == "Say 0"
