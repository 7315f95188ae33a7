"""What is cut where a conversation is longer than cutoff_len, and what never is."""

from __future__ import annotations

import pytest

from fastppo.data import encode_pairs, encode_prompts
from fastppo.data.encode import share_length
from fastppo.errors import UserError
from tests.project import records

LONG = "".join(chr(ord("a") + i % 26) for i in range(200))
HEADER = "<|im_end|>\n<|im_start|>assistant\n"


def prompts(project, template, cutoff_len, *rows, info=None, **how):
    got = records(project, list(rows), info).train
    return [
        template.tokenizer.decode(p.ids) for p in encode_prompts(got, template, cutoff_len, **how)
    ]


def pairs(project, template, cutoff_len, row, **how):
    got = records(project, [row], {"ranking": True}).train
    (pair,) = encode_pairs(got, template, cutoff_len, **how)
    return pair


def test_42_an_over_long_prompt_keeps_its_generation_header(project, chatml):
    (text,) = prompts(project, chatml, 60, {"instruction": LONG})
    assert len(chatml.tokenizer.encode(text)) == 60
    kept = text.removeprefix("<|im_start|>user\n").removesuffix(HEADER)
    assert LONG.startswith(kept)
    assert text == f"<|im_start|>user\n{kept}{HEADER}"


def test_a_prompt_that_just_fits_is_whole(project, chatml):
    (whole,) = prompts(project, chatml, 999, {"instruction": LONG})
    length = len(chatml.tokenizer.encode(whole))
    assert prompts(project, chatml, length, {"instruction": LONG}) == [whole]
    (shorter,) = prompts(project, chatml, length - 1, {"instruction": LONG})
    assert shorter == whole.replace(LONG, LONG[:-1])


def test_the_oldest_exchanges_go_first_and_the_system_prompt_stays(project, chatml):
    columns = {"prompt": "q", "history": "past", "system": "sys"}
    row = {"q": "now", "sys": "S", "past": [["old", LONG], ["new", "answer"]]}
    (text,) = prompts(project, chatml, 110, row, info={"columns": columns})
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nnew<|im_end|>\n"
        f"<|im_start|>assistant\nanswer<|im_end|>\n<|im_start|>user\nnow{HEADER}"
    )


def test_truncation_leaves_no_incomplete_character(project, chatml):
    (text,) = prompts(project, chatml, 60, {"instruction": "雨天" * 40})
    assert "\ufffd" not in text
    assert text.startswith("<|im_start|>user\n雨天")
    assert text.endswith(HEADER)


def test_a_system_prompt_that_leaves_no_room_drops_the_row(project, chatml, capsys):
    info = {"columns": {"prompt": "q", "system": "sys"}}
    rows = [{"q": "a"}, {"q": "b", "sys": LONG}]
    assert len(prompts(project, chatml, 60, *rows, info=info)) == 1
    assert (
        "1 of 2 rows are bad and dropped (data/rows.json row 2: without its question it has "
    ) in (said := capsys.readouterr().err)
    assert "tokens, of the system prompt and the template, and cutoff_len is 60); raise" in said
    with pytest.raises(UserError, match=r"1 of 1 rows are bad .*raise cutoff_len"):
        prompts(project, chatml, 60, rows[1], info=info)


def test_llamafactorys_cut_behind_its_key(project, chatml):
    (text,) = prompts(project, chatml, 60, {"instruction": LONG}, lf_truncation=True)
    # Without an answer, an empty one's EOS and newline take their 2 of the 60.
    assert text == f"<|im_start|>user\n{LONG}"[: len("<|im_start|>") + 57]
    # One that is never learned from takes its share too: 40 + EOS + newline of 100.
    row = {"instruction": LONG, "output": "x" * 40}
    (text,) = prompts(project, chatml, 100, row, lf_truncation=True)
    assert len(chatml.tokenizer.encode(text)) == 100 - 42


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    # By hand from LLaMA-Factory's rule, cutoff_len 100.
    [
        (20, 30, (20, 30)),
        (200, 30, (70, 30)),  # the answer fits in half: the prompt gives way
        (30, 200, (30, 70)),  # the prompt does: the answer gives way
        (300, 100, (75, 25)),  # neither: in proportion
        (50, 50, (50, 50)),
        (60, 120, (34, 66)),  # 100 * 120 / 180 = 66.7, rounded down
    ],
)
def test_prompt_and_answer_share_the_room(source, target, expected):
    assert share_length(source, target, 100) == expected


def test_over_long_pairs_keep_header_and_eos(project, chatml):
    row = {"instruction": LONG, "chosen": LONG, "rejected": "short"}
    pair = pairs(project, chatml, 120, row)
    decode = chatml.tokenizer.decode
    assert len(pair.prompt_ids) + len(pair.chosen_ids) <= 120
    assert decode(pair.prompt_ids).endswith(HEADER)
    assert decode(pair.rejected_ids) == "short<|im_end|>"
    assert LONG.startswith(decode(pair.chosen_ids[:-1]))
    assert pair.chosen_ids[-1] == chatml.eos_id


def test_a_long_prompt_is_whole_where_its_answers_leave_room(project, chatml):
    row = {"instruction": LONG, "chosen": "yes", "rejected": "no"}
    assert LONG in chatml.tokenizer.decode(pairs(project, chatml, 240, row).prompt_ids)


def test_an_answer_cut_with_its_suffix_keeps_both(project, chatml):
    row = {"instruction": "a", "chosen": LONG, "rejected": "b"}
    pair = pairs(project, chatml, 60, row, suffix=True)
    end = [chatml.eos_id, *chatml.suffix_ids]
    assert pair.chosen_ids[-len(end) :] == pair.rejected_ids[-len(end) :] == end
    assert len(pair.prompt_ids) + len(pair.chosen_ids) == 60


def test_llamafactorys_cut_of_a_pair_loses_header_and_eos(project, chatml):
    row = {"instruction": LONG, "chosen": LONG, "rejected": "short"}
    pair = pairs(project, chatml, 120, row, lf_truncation=True, suffix=True)
    assert len(pair.prompt_ids) + len(pair.chosen_ids) == 120
    assert LONG.startswith(chatml.tokenizer.decode(pair.chosen_ids))
    assert not chatml.tokenizer.decode(pair.prompt_ids).endswith(HEADER)
    assert chatml.tokenizer.decode(pair.rejected_ids) == "short<|im_end|>\n"


def test_pairs_of_equal_answers_are_counted_and_said(project, chatml, capsys):
    """A pair of two equal answers has a gradient of 0: nobody would see why nothing is learned."""
    rows = [
        {"instruction": "a", "chosen": "yes", "rejected": "no"},
        {"instruction": "b", "chosen": "same", "rejected": "same"},
        {"instruction": "c", "chosen": LONG + "x", "rejected": LONG + "y"},
    ]
    got = records(project, rows, {"ranking": True}).train
    assert len(encode_pairs(got, chatml, 99)) == 3
    assert capsys.readouterr().err == (
        "fastppo-train: note: dataset: 2 of 3 pairs have two equal answers (1 as they stand, 1 "
        "after the cut, so raise cutoff_len; the first is data/rows.json row 2): they teach "
        "nothing\n"
    )
    encode_pairs(got, chatml, 999)
    assert "1 of 3 pairs have two equal answers (1 as they stand; the" in capsys.readouterr().err
    encode_pairs(got[:1], chatml, 99)
    assert capsys.readouterr().err == ""


def test_pairs_that_are_all_equal_are_refused(project, chatml):
    row = {"instruction": "c", "chosen": LONG + "x", "rejected": LONG + "y"}
    with pytest.raises(UserError, match=r"1 of 1 pairs have two equal answers .* nothing to learn"):
        pairs(project, chatml, 60, row)
