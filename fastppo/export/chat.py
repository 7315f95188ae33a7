"""The chat template of an export: what training wrote, or a line that says what differs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.config.file import read_json
from fastppo.config.rewards import RECORD, TEXT_RECORD
from fastppo.templates import TEMPLATES, get_template
from fastppo.templates.exported import differences, matching_chat_template

if TYPE_CHECKING:
    from fastppo.export.config import ExportConfig
    from fastppo.templates import Template


def trained_template(config: ExportConfig, folder: Path, tokenizer: Any) -> Template:
    """The template that the model in `folder` was trained with: as recorded, or as `config` says.

    LLaMA-Factory's folders have no record.
    """
    settings: dict[str, Any] = {}
    for record in (RECORD, TEXT_RECORD):
        if (folder / record).is_file():
            settings |= read_json(folder / record)
    name = settings.get("template")
    keys = ("default_system", "enable_thinking", "preserve_thinking")
    for key in ("template", *keys):
        if getattr(config, key) is not None:
            settings[key] = getattr(config, key)
    return get_template(
        config.template or (name if name in TEMPLATES else None),
        tokenizer,
        **{key: settings[key] for key in keys if settings.get(key) is not None},
    )


def set_chat_template(template: Template, *, answers: bool) -> Iterator[str]:
    """Give the tokenizer the chat template that writes what was trained; yields what changes.

    The ids that training makes of a few conversations are compared with those that the chat
    template makes. `answers` as in `matching_chat_template`.
    """
    tokenizer = template.tokenizer
    own = tokenizer.chat_template
    jinja, found = matching_chat_template(template, answers=answers)
    if jinja != own:
        before = list(differences(template, own, answers=answers, own=own))
        tokenizer.chat_template = jinja
        if before:
            wrote = (
                f"wrote {before[0].chat_template!r}"
                if before[0].chat_template
                else "could not write"
            )
            yield (
                f"the chat template is now the training's (template: {template.name}): the "
                f"tokenizer's own {wrote} where {before[0].training!r} was trained"
            )
    for each in found[:1]:
        what = "splits the text into other tokens" if each.tokens_only else "writes other text"
        yield (
            f"the chat template {what} than training did: {each.chat_template!r} where "
            f"{each.training!r} was trained; send it what training wrote, as token ids or as text"
        )
    if not template.enable_thinking:
        yield thinking_line(template)
    if not isinstance(tokenizer.chat_template, str):
        return
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    twice = tokenizer(text)["input_ids"]
    if twice[:2] == [tokenizer.bos_token_id] * 2:
        yield (
            "the chat template writes BOS, and this tokenizer puts one before any text: tokenise "
            "what apply_chat_template wrote with add_special_tokens=False"
        )


def thinking_line(template: Template) -> str:
    """How to serve a model that was trained with `enable_thinking: false`."""
    prompt = [{"role": "user", "content": "Hi"}]
    how = {"add_generation_prompt": True, "tokenize": False}
    apply = template.tokenizer.apply_chat_template
    if apply(prompt, enable_thinking=True, **how) == apply(prompt, enable_thinking=False, **how):
        return (
            "trained with enable_thinking: false, which changes nothing in this chat template: "
            "serve it as it is"
        )
    return (
        "trained with enable_thinking: false: the chat template writes the empty thought unless "
        "it is asked for thoughts, so serve it without enable_thinking, or with "
        'chat_template_kwargs {"enable_thinking": false}'
    )
