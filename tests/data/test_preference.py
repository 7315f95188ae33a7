"""Pairs in TRL's preference format: answers that are lists of messages."""

from __future__ import annotations

import pytest

from fastppo.data import encode_pairs
from fastppo.errors import UserError
from tests.project import describe, records, write_json

SYSTEM = {"role": "system", "content": "Sys"}
ASKED = {"role": "user", "content": "What is the sky?"}


def says(text):
    return {"role": "assistant", "content": text}


BLUE, GREEN = says("Blue."), says("Green.")
AGAIN = {"role": "user", "content": "Sure?"}


def read(project, row, **entry):
    """The one record of stage rm, by an entry or, without one, by the file's path."""
    write_json(project / "data" / "pairs.json", [row])
    name = "pairs" if entry else str(project / "data" / "pairs.json")
    if entry:
        describe(project, pairs={"file_name": "pairs.json", **entry})
    (record,) = records(project, stage="rm", dataset=name).train
    return record


EXPLICIT = {"prompt": [SYSTEM, ASKED], "chosen": [BLUE], "rejected": [GREEN]}
IMPLICIT = {"chosen": [SYSTEM, ASKED, BLUE], "rejected": [SYSTEM, ASKED, GREEN]}
SAME = {
    "explicit": EXPLICIT,
    "implicit": IMPLICIT,
    # HuggingFaceH4/ultrafeedback_binarized: the lists have the prompt, which stands beside as text.
    "text_beside": {"prompt": "What is the sky?", **IMPLICIT, "messages": IMPLICIT["chosen"]},
}


@pytest.mark.parametrize("entry", [{}, {"ranking": True}], ids=["path", "entry"])
@pytest.mark.parametrize("kind", SAME)
def test_a_pair_of_message_lists_is_the_pair_of_its_texts(project, chatml, kind, entry):
    record = read(project, SAME[kind], **entry)
    assert (record.system, record.messages) == ("Sys", [ASKED])
    (pair,) = encode_pairs([record], chatml, 2048)
    text = chatml.tokenizer.decode(pair.prompt_ids)
    assert text == (
        "<|im_start|>system\nSys<|im_end|>\n<|im_start|>user\nWhat is the sky?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert chatml.tokenizer.decode(pair.chosen_ids).startswith("Blue.")
    assert chatml.tokenizer.decode(pair.rejected_ids).startswith("Green.")


def test_turns_that_both_answers_share_are_the_prompts(project):
    """Of an explicit prompt too; two equal answers stay answers."""
    row = {"prompt": [ASKED], "chosen": [BLUE, AGAIN, BLUE], "rejected": [BLUE, AGAIN, GREEN]}
    record = read(project, row)
    assert record.messages == [ASKED, BLUE, AGAIN]
    assert (record.chosen, record.rejected) == ("Blue.", "Green.")
    equal = read(project, {"chosen": [ASKED, BLUE], "rejected": [ASKED, BLUE]})
    assert (equal.messages, equal.chosen, equal.rejected) == ([ASKED], "Blue.", "Blue.")


def test_a_prompt_in_text_before_lists_of_one_answer_and_trls_text_format(project):
    for answers in (
        {"chosen": [BLUE], "rejected": [GREEN]},
        {"chosen": "Blue.", "rejected": "Green."},
    ):
        record = read(project, {"prompt": "What is the sky?", **answers})
        assert (record.messages, record.chosen, record.rejected) == ([ASKED], "Blue.", "Green.")


def test_names_and_tags_of_the_entry_hold(project):
    row = {
        "asked": [{"from": "human", "value": "What is the sky?"}],
        "good": [{"from": "gpt", "value": "Blue."}],
        "bad": [{"from": "gpt", "value": "Green."}],
    }
    columns = {"messages": "asked", "chosen": "good", "rejected": "bad"}
    record = read(project, row, ranking=True, formatting="sharegpt", columns=columns)
    assert (record.messages, record.chosen, record.rejected) == ([ASKED], "Blue.", "Green.")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"chosen": [ASKED, BLUE], "rejected": "Green."}, "'rejected' is text, and must be a list"),
        ({"chosen": [ASKED, BLUE], "rejected": []}, "'rejected' is empty, and must be a list"),
        ({"chosen": [BLUE], "rejected": [GREEN]}, "has no prompt, and 'chosen' begins otherwise"),
        (
            {"prompt": [ASKED], "chosen": [BLUE, AGAIN], "rejected": [GREEN]},
            "'chosen' has assistant, user after the prompt, and must have one assistant's",
        ),
        (
            {"prompt": [ASKED, BLUE], "chosen": [GREEN], "rejected": [BLUE]},
            "turns are user, assistant; user and assistant must alternate",
        ),
        (
            {"prompt": [ASKED], "chosen": [{**BLUE, "tool_calls": [{}]}], "rejected": [GREEN]},
            "tool calls are not supported",
        ),
    ],
    ids=["one_text", "empty", "no_prompt", "goes_on", "no_question", "tools"],
)
def test_pairs_that_are_no_pairs_say_why(project, row, why):
    with pytest.raises(UserError, match=why):
        read(project, row)


def test_prompts_of_trl_by_their_path(project):
    """TRL's prompt-only format in stage ppo: text, or messages."""
    write_json(project / "mine.json", [{"prompt": "What is the sky?"}])
    assert records(project, dataset="mine.json").train[0].messages == [ASKED]
    write_json(project / "mine.json", [{"prompt": [SYSTEM, ASKED]}])
    (record,) = records(project, dataset="mine.json").train
    assert (record.system, record.messages) == ("Sys", [ASKED])
