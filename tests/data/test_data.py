"""Records of every format, which rows are bad, and what becomes of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastppo.config import config_from_dict
from fastppo.data import encode_pairs, encode_prompts, read_records
from fastppo.errors import UserError
from tests.project import PPO, PROMPTS, RM, asked, describe, records, write_json

FIXTURES = Path(__file__).parents[1] / "fixtures"


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
    columns = {"prompt": "q", "query": "more", "history": "past", "system": "sys"}
    info = {"columns": columns}
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


def test_records_say_where_they_came_from(project):
    assert records(project).train[2].where == "data/prompts.json row 3"
    assert len(PROMPTS) == 4


TURNS = [
    {"role": "system", "content": "Sys"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


def test_openai_messages_need_no_tags(project, chatml):
    rows = [{"messages": [*TURNS, {"role": "assistant", "content": "d", "tool_calls": None}]}]
    (record,) = records(project, rows, {"formatting": "openai"}).train
    assert (record.system, record.response) == ("Sys", "d")
    (prompt,) = encode_prompts([record], chatml, 2048)
    assert chatml.tokenizer.decode(prompt.ids) == (
        "<|im_start|>system\nSys<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_openai_pairs(project):
    answers = {name: {"role": "assistant", "content": name} for name in ("chosen", "rejected")}
    info = {"formatting": "openai", "ranking": True}
    (record,) = records(project, [{"messages": TURNS, **answers}], info).train
    assert asked([record]) == ["c"]
    assert (record.chosen, record.rejected) == ("chosen", "rejected")


def test_tags_of_llamafactorys_own_openai_example(project):
    info = {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
    (record,) = records(project, [{"messages": TURNS}], info).train
    assert (record.system, asked([record])) == ("Sys", ["c"])


def test_a_pair_has_one_prompt_and_ends_in_eos_with_llamafactorys_suffix_behind(project, chatml):
    rows = [{"instruction": "a", "input": "b", "chosen": "yes", "rejected": "no"}]
    got = records(project, rows, {"ranking": True}).train
    (pair,) = encode_pairs(got, chatml, 2048)
    (prompt,) = encode_prompts(got, chatml, 2048)
    assert pair.prompt_ids == prompt.ids
    assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == chatml.eos_id
    (longer,) = encode_pairs(got, chatml, 2048, suffix=True)
    newline = list(chatml.suffix_ids)
    assert longer.chosen_ids == pair.chosen_ids + newline
    assert longer.rejected_ids == pair.rejected_ids + newline


def test_columns_that_are_not_listed_are_not_read(project):
    rows = [{"instruction": "a", "input": "never", "output": "never", "system": "never"}]
    (record,) = records(project, rows, {"columns": {"prompt": "instruction"}}).train
    assert asked([record]) == ["a"]
    assert (record.response, record.system) == (None, None)


def test_an_output_that_is_no_text_is_for_reward_functions(project, chatml):
    got = records(project, [{"instruction": "6 * 7 = ?", "output": 42}]).train
    (prompt,) = encode_prompts(got, chatml, 2048)
    assert (prompt.reference, prompt.columns["output"]) == (None, 42)


def test_the_input_alone_may_be_the_question(project):
    (record,) = records(project, [{"instruction": "", "input": "b"}]).train
    assert asked([record]) == ["b"]


def test_default_system_gives_way_to_the_rows_own(project, chatml):
    rows = [{"q": "a", "sys": "Mine."}, {"q": "b", "sys": ""}]
    got = records(project, rows, {"columns": {"prompt": "q", "system": "sys"}}).train
    own, default = encode_prompts(got, chatml, 2048, "Ours.")
    assert "system\nMine.<" in chatml.tokenizer.decode(own.ids)
    assert "system\nOurs.<" in chatml.tokenizer.decode(default.ids)


def test_llamafactorys_demo_data_as_it_stands(project, chatml):
    """Rows of the shapes that LLaMA-Factory's `data/` has, and its dataset_info.json."""
    folder = str(FIXTURES / "llamafactory")
    alpaca = read_records(
        config_from_dict({**PPO, "dataset": "identity,alpaca_en_demo", "dataset_dir": folder})
    ).train
    assert asked(alpaca) == [
        "hi",
        "Describe a process of making crepes.",
        "Transform the following sentence using a synonym: \nThe car sped quickly.",
    ]
    pairs = read_records(
        config_from_dict({**RM, "dataset": "dpo_en_demo", "dataset_dir": folder})
    ).train
    assert [len(record.messages) for record in pairs] == [1, 1, 7]
    assert [record.system is None for record in pairs] == [True, False, True]
    encoded = encode_pairs(pairs, chatml, 2048)
    assert "😊" in chatml.tokenizer.decode(encoded[0].rejected_ids)


def test_a_few_bad_rows_are_counted_shown_and_dropped(project, capsys):
    bad = [{"output": "x"}, 7, {"instruction": 1}, {"instruction": "  "}]
    got = records(project, [*PROMPTS, *bad, *PROMPTS])
    assert len(got.train) == 8
    assert capsys.readouterr().err == (
        "fastppo-train: note: data/rows.json: 4 of 12 rows are bad and dropped (row 5: has no "
        "'instruction', it has output; row 6: is a number, not an object; row 7: 'instruction' is "
        "a number, not text; ...)\n"
    )


def test_a_torn_line_of_jsonl_is_a_bad_row(project, capsys):
    (project / "mine.jsonl").write_text('{"instruction": "a"}\n\n{"instruction": "b"}\n{"instru')
    assert asked(records(project, dataset="mine.jsonl").train) == ["a", "b"]
    assert "1 of 3 rows are bad and dropped (row 3: not JSON (" in capsys.readouterr().err


def test_half_of_the_rows_may_be_bad_and_not_more(project):
    assert len(records(project, [*PROMPTS[:2], {}, {}]).train) == 2
    with pytest.raises(UserError, match=r"rows.json: 3 of 5 rows are bad \(row 3, .* 5: has no"):
        records(project, [*PROMPTS[:2], {}, {}, {}])


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"conversations": [{"from": "human", "value": "a"}], "tools": "[{}]"}, "has 'tools', and"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": "{}"},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "b"},
                ]
            },
            "a turn by 'function_call', and",
        ),
    ],
    ids=["tools", "function_call"],
)
def test_rows_that_call_tools_are_bad_and_rows_of_such_sets_that_do_not_are_good(
    project, capsys, row, why
):
    info = {
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "tools": "tools"},
    }
    good = {"conversations": [{"from": "human", "value": "a"}], "tools": "[]"}
    assert len(records(project, [good, row], info).train) == 1
    assert f"row 2: has {why.removeprefix('has ')} tool calls are not supported" in (
        capsys.readouterr().err
    )


def test_openai_tool_calls_are_bad_rows(project, capsys):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    rows = [{"messages": TURNS}, {"messages": [*TURNS, call]}]
    assert len(records(project, rows, {"formatting": "openai"}).train) == 1
    assert "row 2: has a turn by 'assistant', and tool calls" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ("text", "has no 'chosen' with a role and a text"),
        ({"from": "human", "value": "b"}, "'chosen' is the user's"),
        ({"from": "gpt", "value": ""}, "'value' is blank"),
    ],
    ids=["text", "human", "empty"],
)
def test_an_answer_that_is_none(project, chosen, why):
    row = {
        "conversations": [{"from": "human", "value": "a"}],
        "chosen": chosen,
        "rejected": {"from": "gpt", "value": "c"},
    }
    with pytest.raises(UserError, match=why):
        records(project, [row], {"formatting": "sharegpt", "ranking": True})


def test_pairs_and_prompts_are_told_apart_by_stage(project):
    describe(project, pairs={"file_name": "pairs.json", "ranking": True})
    with pytest.raises(UserError, match=r"stage ppo learns from prompts.*or use stage: rm"):
        records(project, dataset="pairs")
    describe(project, pairs={"file_name": "pairs.json"})
    with pytest.raises(UserError, match=r"stage rm learns from pairs.*name a set of pairs"):
        read_records(config_from_dict(RM))


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"instruction": "a"}, "a"),
        ({"conversations": [{"from": "human", "value": "b"}]}, "b"),
        ({"messages": [{"role": "user", "content": "c"}]}, "c"),
    ],
)
def test_a_file_named_by_its_path_shows_its_format(project, row, question):
    write_json(project / "mine.json", [row])
    assert asked(records(project, dataset="mine.json").train) == [question]


@pytest.mark.parametrize("empty", ["", None])
@pytest.mark.parametrize("formatting", ["openai", "sharegpt"])
def test_an_empty_system_turn_is_no_system_prompt(project, chatml, formatting, empty):
    """Sets with a system turn in every row leave it empty where there is none."""
    turn = {"openai": ("messages", "role", "content", "user")}.get(
        formatting, ("conversations", "from", "value", "human")
    )
    column, role, content, user = turn
    rows = [
        {column: [{role: "system", content: empty}, {role: user, content: "q"}]},
        {column: [{role: "system", content: "Be brief."}, {role: user, content: "q"}]},
    ]
    got = records(project, rows, {"formatting": formatting}).train
    assert [record.system for record in got] == [None, "Be brief."]
    (bare, _) = encode_prompts(got, chatml, 99)
    assert bare.messages == [{"role": "user", "content": "q"}]
    (ours, theirs) = encode_prompts(got, chatml, 99, default_system="Ours.")
    assert [m.messages[0]["content"] for m in (ours, theirs)] == ["Ours.", "Be brief."]


@pytest.mark.parametrize("nothing", ["", None, [], 0])
def test_columns_that_are_empty_are_absent(project, nothing):
    columns = {"prompt": "instruction", "query": "input", "history": "past", "tools": "tools"}
    row = {"instruction": "q", "past": nothing, "input": nothing or None, "tools": nothing or ""}
    (record,) = records(project, [row], {"columns": columns}).train
    assert record.messages == [{"role": "user", "content": "q"}]
