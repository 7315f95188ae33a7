"""Which chat template is saved with a model: one that gives the token ids of its training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from fastppo.errors import UserError
from fastppo.templates.jinja import (
    chat_template,
    set_thinking,
    with_answer_as_trained,
    with_system,
)
from fastppo.templates.template import Message, Template

WINDOW = 24  # tokens that are shown around a difference
_HI: Message = {"role": "user", "content": "Hi"}
_HO: Message = {"role": "assistant", "content": "Ho."}
CONVERSATIONS: tuple[tuple[str | None, list[Message], str], ...] = (
    (None, [_HI], "Ho, ho."),
    (
        None,
        [_HI, {"role": "assistant", "content": "Ho."}, {"role": "user", "content": "Yo?"}],
        "No.",
    ),
    ("Be brief.", [_HI], "Ho."),
)


class Difference(NamedTuple):
    """Where a chat template writes a conversation differently from training, as text."""

    training: str
    chat_template: str
    tokens_only: bool  # the text is the same, but is split into other tokens


def trained_ids(
    template: Template, system: str | None, messages: list[Message], answer: str | None
) -> list[int]:
    """Token ids of a conversation in training; with `answer` None, those of the prompt alone."""
    ids = template.encode_prompt(messages, template.default_system if system is None else system)
    if answer is None:
        return ids
    return [*ids, *template.encode_response(answer), *template.suffix_ids]


def written_ids(
    tokenizer: Any,
    jinja: str | None,
    system: str | None,
    messages: list[Message],
    answer: str | None,
) -> list[int] | None:
    """Token ids of a conversation by the chat template `jinja`; None if it raises an error."""
    chat = [dict(message) for message in messages]
    if system is not None:
        chat.insert(0, {"role": "system", "content": system})
    if answer is not None:
        chat.append({"role": "assistant", "content": answer})
    how = {"add_generation_prompt": answer is None, "tokenize": True, "return_dict": False}
    try:
        return list(tokenizer.apply_chat_template(chat, chat_template=jinja, **how))
    except Exception:  # a chat template can raise anything
        return None


def differences(
    template: Template, jinja: str | None, *, answers: bool, own: str | None
) -> Iterator[Difference]:
    """Yield a Difference for each conversation to which `jinja` gives other ids than training.

    Args:
        answers: True compares whole conversations, which a reward model reads; False compares
            prompts, which a policy reads.
        own: the tokenizer's own chat template, which is used in training with `template: null`.
    """
    tokenizer = template.tokenizer
    for system, messages, answer in CONVERSATIONS:
        said = answer if answers else None
        with _chat_template(tokenizer, own):
            try:
                wanted = trained_ids(template, system, messages, said)
            except UserError:  # it takes no system prompt, so no record in training had one
                continue
        found = written_ids(tokenizer, jinja, system, messages, said) if jinja else None
        if found == wanted:
            continue
        if found is None:
            yield Difference(tokenizer.decode(wanted[:WINDOW]), "", tokens_only=False)
            continue
        start = shared_length(wanted, found)
        shown = slice(max(0, start - WINDOW // 2), start + WINDOW // 2)
        yield Difference(
            tokenizer.decode(wanted[shown]),
            tokenizer.decode(found[shown]),
            tokens_only=tokenizer.decode(wanted) == tokenizer.decode(found),
        )


def shared_length(first: list[int], second: list[int]) -> int:
    """The number of ids that are equal at the start of both lists."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length


@contextmanager
def _chat_template(tokenizer: Any, jinja: str | None) -> Iterator[None]:
    """Inside the block the tokenizer has the chat template `jinja`."""
    before = tokenizer.chat_template
    tokenizer.chat_template = jinja
    try:
        yield
    finally:
        tokenizer.chat_template = before


def candidates(template: Template, own: str | None) -> Iterator[str]:
    """Chat templates that may give the ids of training; those closest to `own` come first.

    `own` is the tokenizer's chat template. It can do more than write turns (it formats tools, for
    example), so it is changed as little as possible.
    """
    tokenizer, slots = template.tokenizer, template.slots
    if own is not None:
        yield own
        changed = own
        system = template.default_system
        if system is None and slots is not None:
            system = slots.default_system
        if system:
            changed = with_system(changed, system)
        quiet = "" if template.enable_thinking else set_thinking(False)
        if quiet or system:
            yield quiet + changed
        if slots is None:
            end = tokenizer.decode([template.eos_id, *template.suffix_ids])
            yield quiet + with_answer_as_trained(changed, end)
    if slots is not None:
        yield chat_template(
            slots,
            tokenizer,
            default_system=template.default_system,
            enable_thinking=template.enable_thinking,
            preserve_thinking=template.preserve_thinking,
        )


def matching_chat_template(
    template: Template, *, answers: bool
) -> tuple[str | None, list[Difference]]:
    """The chat template that gives the ids of training, or else the closest one.

    A tokenizer that has several named templates keeps them. `answers` is that of `differences`.

    Returns:
        The chat template, and its differences from training; none if it gives the same ids.
    """
    own = template.tokenizer.chat_template
    if own is not None and not isinstance(own, str):
        return own, list(differences(template, None, answers=answers, own=own))[:1]
    tried = []
    for jinja in candidates(template, own):
        found = list(differences(template, jinja, answers=answers, own=own))
        if not found:
            return jinja, []
        tried.append((sum(not each.tokens_only for each in found), len(found), jinja, found))
    if not tried:
        return own, []
    _, _, jinja, found = min(tried, key=lambda each: each[:2])
    return jinja, found


@contextmanager
def as_trained(template: Template, *, answers: bool) -> Iterator[None]:
    """Inside the block the tokenizer has the chat template to save: the one that fits training."""
    jinja, _ = matching_chat_template(template, answers=answers)
    with _chat_template(template.tokenizer, jinja):
        yield
