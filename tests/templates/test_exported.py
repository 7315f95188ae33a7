"""The chat template that is saved writes what training wrote, id for id."""

from __future__ import annotations

from itertools import product

import pytest

from fastppo.templates import TEMPLATES, get_template
from fastppo.templates.exported import as_trained, matching_chat_template
from fastppo.templates.template import NO_THOUGHT
from tests.templates.test_templates import HI, TURNS, own, tokenizer
from tests.tiers import slow_unless

OWN_SYSTEM = "You are a helpful assistant."
SETTINGS = [
    {},
    {"default_system": "Be kind."},
    {"default_system": ""},
    {"enable_thinking": False},
    {"preserve_thinking": True},
]


def with_own_system():
    """A tokenizer like Qwen1.5's: its template puts a system prompt where there is none."""
    made = tokenizer()
    made.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
        + OWN_SYSTEM
        + "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return made


MAKERS = {"none": tokenizer, "ends": lambda: own("</s>"), "own system": with_own_system}


def as_saved(template, answers):
    with as_trained(template, answers=answers):
        return template.tokenizer.chat_template


def written(template, jinja, messages, system=None, **how):
    chat = [{"role": "system", "content": system}, *messages] if system else list(messages)
    how |= {"tokenize": True, "return_dict": False, "chat_template": jinja}
    return template.tokenizer.apply_chat_template(chat, **how)


@pytest.mark.parametrize(
    ("maker", "settings"),
    slow_unless(
        lambda maker, settings: not settings or (maker == "none" and settings == SETTINGS[3]),
        product(MAKERS, SETTINGS),
    ),
    ids=str,
)
@pytest.mark.parametrize("name", [*(n for n in TEMPLATES if n != "vicuna"), None])
def test_conversations_have_the_ids_of_training(name, maker, settings):
    template = get_template(name, MAKERS[maker](), **settings)
    default = settings.get("default_system")
    for system in (None, "Sys"):
        prompt = template.encode_prompt(TURNS, default if system is None else system)
        answer = [*template.encode_response("So."), *template.suffix_ids]
        asked = written(
            template, as_saved(template, answers=False), TURNS, system, add_generation_prompt=True
        )
        assert asked == prompt
        whole = [*TURNS, {"role": "assistant", "content": "So."}]
        assert written(template, as_saved(template, answers=True), whole, system) == prompt + answer


def test_a_thought_in_the_answer_is_written_as_it_was_trained():
    for thinks in (True, False):
        template = get_template("qwen3", tokenizer(), enable_thinking=thinks)
        for text in ("Ho", "<think>\nhm\n</think>\n\nHo"):
            chat = [*HI, {"role": "assistant", "content": text}]
            wanted = template.encode_prompt(HI) + template.encode_response(text)
            wanted += list(template.suffix_ids)
            assert written(template, as_saved(template, answers=True), chat) == wanted


def test_a_template_that_writes_what_was_trained_stays_word_for_word():
    """It knows of tools, and more, that ours does not."""
    made = with_own_system()
    template = get_template("qwen", made, default_system=OWN_SYSTEM)
    assert as_saved(template, answers=False) == made.chat_template
    changed = get_template("qwen", made)
    assert made.chat_template in as_saved(changed, answers=False)


def test_without_thinking_the_empty_thought_is_written_unless_thoughts_are_asked_for():
    template = get_template("qwen3", tokenizer(), enable_thinking=False)
    jinja = as_saved(template, answers=False)
    how = {"tokenize": False, "chat_template": jinja, "add_generation_prompt": True}
    apply = template.tokenizer.apply_chat_template
    assert apply(HI, **how).endswith(NO_THOUGHT)
    assert NO_THOUGHT not in apply(HI, **how, enable_thinking=True)


def test_where_a_token_spans_two_pieces_that_is_told_apart_from_other_text():
    """`.U` is one token of this tokenizer: training encodes `.` and `USER:` apart."""
    template = get_template("vicuna", tokenizer())
    jinja, found = matching_chat_template(template, answers=True)
    assert found
    assert all(each.tokens_only for each in found)
    decode = template.tokenizer.decode
    prompt = decode(template.encode_prompt(HI))
    assert decode(written(template, jinja, HI)) == prompt


def test_several_templates_by_name_are_left_alone():
    made = tokenizer()
    made.chat_template = {"default": "{{ messages[0]['content'] }}", "tool_use": "x"}
    template = get_template("qwen", made)
    before = made.chat_template
    assert as_saved(template, answers=False) == before
