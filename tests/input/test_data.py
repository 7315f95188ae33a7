"""Records of every format, and how they are encoded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastppo import toy
from fastppo.config import config_from_dict
from fastppo.data import encode_pairs, encode_prompts, read_records
from fastppo.templates import get_template

from .conftest import PPO, PROMPTS, RM, write_json

FIXTURES = Path(__file__).parent / "fixtures"


def records(project, rows=None, info=None, **changes):
    """Read `rows` as a data set that `info` describes."""
    if rows is not None:
        write_json(project / "data" / "rows.json", rows)
        write_json(
            project / "data" / "dataset_info.json",
            {"rows": {"file_name": "rows.json", **(info or {})}},
        )
        changes = {"dataset": "rows", **changes}
    base = RM if (info or {}).get("ranking") else PPO
    return read_records(config_from_dict({**base, **changes}))


@pytest.fixture(scope="module")
def chatml():
    return get_template("chatml", toy.byte_tokenizer())


def test_chinese_prompts_without_output(project, chatml):
    shutil.copy(FIXTURES / "chinese_prompts.json", project / "data" / "prompts.json")
    train = records(project).train
    assert train[0].messages == [{"role": "user", "content": "写一句关于雨天的话。\n要积极。"}]
    assert [record.response for record in train] == [None, None]
    prompts = encode_prompts(train, chatml, 2048)
    text = chatml.tokenizer.decode(prompts[1].ids)
    assert text == "<|im_start|>user\n介绍一下北京。<|im_end|>\n<|im_start|>assistant\n"


def test_output_is_kept_and_never_learned_from(project, chatml):
    rows = [{"instruction": "a", "output": "SECRET"}]
    (prompt,) = encode_prompts(records(project, rows).train, chatml, 2048)
    assert prompt.reference == "SECRET"
    assert "SECRET" not in chatml.tokenizer.decode(prompt.ids)


def test_columns_rename_history_and_system(project, chatml):
    info = {"columns": {"prompt": "q", "query": "more", "history": "past", "system": "sys"}}
    rows = [{"q": "Now?", "more": "Say.", "past": [["Hi", "Ho"]], "sys": "Be brief."}]
    (prompt,) = encode_prompts(records(project, rows, info).train, chatml, 2048)
    assert chatml.tokenizer.decode(prompt.ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nNow?\nSay.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_sharegpt_pairs_with_tags_of_their_own(project, chatml):
    info = {
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "turns", "chosen": "good", "rejected": "bad"},
        "tags": {"role_tag": "role", "content_tag": "text", "user_tag": "user"},
    }
    turn = {"role": "user", "text": "Hi"}
    rows = [{"turns": [turn], "good": {"role": "gpt", "text": "yes"}, "bad": {"text": "no"}}]
    (pair,) = encode_pairs(records(project, rows, info).train, chatml, 2048)
    decode = chatml.tokenizer.decode
    assert decode(pair.prompt_ids).endswith("Hi<|im_end|>\n<|im_start|>assistant\n")
    assert (decode(pair.chosen_ids), decode(pair.rejected_ids)) == ("yes<|im_end|>", "no<|im_end|>")


def test_sharegpt_prompts_keep_the_last_answer_aside(project):
    turns = [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"},
    ]
    (record,) = records(project, [{"conversations": turns}], {"formatting": "sharegpt"}).train
    assert record.messages == [{"role": "user", "content": "a"}]
    assert (record.system, record.response) == ("S", "b")


@pytest.mark.parametrize(("size", "held"), [(0.25, 1), (1, 1), (2, 2), (0.01, 1)])
def test_val_size_is_a_share_or_a_count_seeded_disjoint_and_complete(project, size, held):
    one, again = (records(project, val_size=size) for _ in range(2))
    assert one == again
    assert (len(one.train), len(one.eval)) == (4 - held, held)
    both = [record.where for record in one.train + one.eval]
    assert sorted(both) == sorted(f"data/prompts.json row {i}" for i in range(1, 5))


def test_comma_lists_and_max_samples(project):
    got = records(project, dataset="prompts, chats", max_samples=2)
    assert [record.messages[0]["content"] for record in got.train] == ["Say 0", "Say 1", "Hi"]


def test_jsonl_a_plain_path_and_a_byte_order_mark(project):
    (project / "mine.jsonl").write_bytes(
        b'\xef\xbb\xbf{"instruction": "a"}\n\n{"instruction": "b"}\n'
    )
    got = records(project, dataset="mine.jsonl").train
    assert [record.messages[0]["content"] for record in got] == ["a", "b"]
    pairs = [{"instruction": "a", "chosen": "b", "rejected": "c"}]
    write_json(project / "mine.json", pairs)
    config = config_from_dict({**RM, "dataset": "mine.json"})
    assert read_records(config).train[0].chosen == "b"


def test_csv_goes_through_datasets(project):
    (project / "data" / "rows.csv").write_text('instruction,input\n"a, b",c\n')
    write_json(project / "data" / "dataset_info.json", {"rows": {"file_name": "rows.csv"}})
    got = records(project, dataset="rows", cache_dir=str(project / "cache")).train
    assert got[0].messages[0]["content"] == "a, b\nc"


def test_42_an_over_long_prompt_keeps_its_generation_header(project, chatml):
    rows = [{"instruction": "word " * 200}]
    (prompt,) = encode_prompts(records(project, rows).train, chatml, 60)
    text = chatml.tokenizer.decode(prompt.ids)
    assert len(prompt.ids) <= 60
    assert text.startswith("<|im_start|>user\nword word")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_over_long_pairs_keep_their_eos(project, chatml):
    rows = [{"instruction": "a", "chosen": "x" * 99, "rejected": "short"}]
    (pair,) = encode_pairs(records(project, rows, {"ranking": True}).train, chatml, 60)
    assert len(pair.prompt_ids) + len(pair.chosen_ids) == 60
    assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == chatml.eos_id


def test_records_say_where_they_came_from(project):
    assert records(project).train[2].where == "data/prompts.json row 3"
    assert len(PROMPTS) == 4
