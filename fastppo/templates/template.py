"""A template with its tokenizer: converts conversations to token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastppo.errors import UserError
from fastppo.templates.formats import (
    EOS,
    NO_THOUGHT,
    TEMPLATES,
    THOUGHT,
    Mark,
    Slot,
    Slots,
    check_name,
)
from fastppo.templates.jinja import chat_template

Message = dict[str, str]

_A_THOUGHT = re.compile(re.escape(THOUGHT[0]) + "(.*?)" + re.escape(THOUGHT[1]), re.DOTALL)
_PROBE = "0fastppo0"  # an answer that no chat template changes


def without_thought(text: str) -> str:
    """`text` without its reasoning."""
    return _A_THOUGHT.sub("", text).lstrip("\n")


def has_thought(text: str) -> bool:
    """Whether the answer has reasoning, complete or truncated."""
    return THOUGHT[0].strip() in text or THOUGHT[1].strip() in text


class Template:
    """A chat template and its tokenizer; `slots` None is the tokenizer's own Jinja template.

    `eos_id` ends an answer. `stop_ids` are all tokens that end a sampled response (`eos_id` first);
    `stop_strings` are the template's stops that are no single token of this tokenizer. `suffix_ids`
    are the tokens that LLaMA-Factory writes after `eos_id`; its reward models are scored there.
    `default_system` is the run's own, for records without a system prompt; None is the template's.
    """

    def __init__(
        self,
        name: str,
        slots: Slots | None,
        tokenizer: Any,
        *,
        enable_thinking: bool = True,
        preserve_thinking: bool = False,
        default_system: str | None = None,
    ) -> None:
        self.name, self.slots, self.tokenizer = name, slots, tokenizer
        self.default_system = default_system
        self.enable_thinking, self.preserve_thinking = enable_thinking, preserve_thinking
        missing = [t for t in (slots.needs if slots else ()) if self._id(t) is None]
        if missing:
            raise UserError(
                f"template: '{name}' needs the token {missing[0]}, which this model's tokenizer "
                "does not have; choose the model's own template (template: null)"
            )
        own = tokenizer.eos_token_id
        if slots and slots.replace_eos:
            tokenizer.eos_token = slots.stop[0]
        end, self.suffix_ids = self._end()
        if end is None:
            raise UserError(
                f"template: '{name}' leaves the end of a response to the tokenizer, and it has no "
                "EOS token; choose a template that has one, such as chatml"
            )
        self.eos_id: int = end
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(end)
        self.pad_id: int = tokenizer.pad_token_id
        stops = slots.stop if slots else ()
        further = [self._id(token) for token in stops]
        ids = dict.fromkeys([end, tokenizer.eos_token_id, *further, own])
        self.stop_ids: tuple[int, ...] = tuple(i for i in ids if i is not None)
        self.stop_strings = tuple(t for t, i in zip(stops, further, strict=True) if i is None)

    def _id(self, token: str) -> int | None:
        found: int | None = self.tokenizer.convert_tokens_to_ids(token)
        unknown = self.tokenizer.unk_token_id
        return None if found == unknown and token != self.tokenizer.unk_token else found

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _fill(self, slot: Slot, content: str = "") -> list[int]:
        """Token ids of a slot; its pieces are encoded separately, so that no token spans two."""
        ids: list[int | None] = []
        for piece in slot:
            if isinstance(piece, Mark):
                eos = piece is EOS
                ids.append(self.tokenizer.eos_token_id if eos else self.tokenizer.bos_token_id)
            else:
                ids += self._encode(piece.replace("{}", content, 1))
        return [i for i in ids if i is not None]

    def _answer(self, text: str) -> list[int]:
        """Token ids of an answer, with everything that LLaMA-Factory writes after the text."""
        assert self.slots is not None
        ids = self._fill(self.slots.assistant, text)
        if self.slots.efficient_eos and self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        return ids

    def _end(self) -> tuple[int | None, tuple[int, ...]]:
        """The id that ends an answer, and the ids that the template writes after it."""
        end = self.tokenizer.eos_token_id
        if self.slots is not None:
            written = "".join(piece for piece in self.slots.assistant if isinstance(piece, str))
            ids = self._answer(_PROBE)
            ends = {self._id(token) for token in self.slots.stop if token in written} or {end}
        else:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
            tail = str(self._apply(turns, tokenize=False)).rpartition(_PROBE)[2]
            ids, ends = self._encode(tail), {*self.tokenizer.added_tokens_decoder, end}
        for place, token in enumerate(ids):
            if token in ends:
                return token, tuple(ids[place + 1 :])
        return end, ()

    def _apply(self, chat: list[Message], **how: Any) -> Any:
        """Apply the tokenizer's own chat template."""
        from jinja2.exceptions import TemplateError

        if not self.enable_thinking:
            how["enable_thinking"] = False
        try:
            return self.tokenizer.apply_chat_template(chat, **how)
        except TemplateError as error:
            raise UserError(
                f"template: this model's own chat template refuses the conversation ({error}); "
                "name a template, or take the system prompts out"
            ) from None

    def encode_prompt(self, messages: Sequence[Message], system: str | None = None) -> list[int]:
        """Ids of a conversation that ends with a user's turn, including the assistant's header.

        `system` None is the template's default system prompt, "" is no system prompt. With
        `enable_thinking` false a reasoning template writes an empty thought after the header, so
        that the policy does not think.
        """
        messages = [self._as_history(message) for message in messages]
        slots = self.slots
        if slots is None:
            chat = [dict(message) for message in messages]
            if system:
                chat.insert(0, {"role": "system", "content": system})
            how = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
            return list(self._apply(chat, **how))
        system = slots.default_system if system is None else system
        ids = self._fill(slots.prefix)
        fused = ""
        if system and slots.fuse_system:
            fused = "".join(p for p in slots.system if isinstance(p, str)).replace("{}", system, 1)
        elif system:
            ids += self._fill(slots.system, system)
        for message in messages:
            user = message["role"] == "user"
            ids += self._fill(slots.user if user else slots.assistant, fused + message["content"])
            fused = ""
        return ids + (
            self._encode(NO_THOUGHT) if slots.reasoning and not self.enable_thinking else []
        )

    def _as_history(self, message: Message) -> Message:
        """An earlier turn as it is in the prompt: an answer without its reasoning."""
        reasoning = self.slots is not None and self.slots.reasoning and not self.preserve_thinking
        if not reasoning or message["role"] == "user":
            return message
        return {**message, "content": without_thought(message["content"])}

    def encode_response(self, text: str) -> list[int]:
        """Ids of an answer with `eos_id` at its end.

        A reasoning template writes an empty thought before an answer that has no thought. With
        `enable_thinking` false the empty thought is in the prompt instead, and the answer's own
        thought is removed.
        """
        if self.slots is None:
            return [*self._encode(text), self.eos_id]
        thought: list[int] = []
        if self.slots.reasoning and not self.enable_thinking:
            text = without_thought(text)
        elif self.slots.reasoning and not has_thought(text):
            thought = self._encode(NO_THOUGHT)
        ids = self._answer(text)
        return thought + ids[: len(ids) - len(self.suffix_ids)]

    def fit_prompt(
        self, messages: Sequence[Message], system: str | None, limit: int
    ) -> list[int] | None:
        """`encode_prompt` in at most `limit` tokens; None if even an empty question is too long.

        First the oldest exchanges are dropped, then the last question is cut at its end. The system
        prompt stays, and so does the assistant's header at the end: without it, the model would
        continue the user's text.
        """
        ids = self.encode_prompt(messages, system)
        while len(ids) > limit and len(messages) > 2:
            messages = messages[2:]
            ids = self.encode_prompt(messages, system)
        kept = self._encode(messages[-1]["content"]) if len(ids) > limit else []
        while len(ids) > limit:
            if not kept:
                return None
            kept = kept[: max(0, len(kept) - (len(ids) - limit))]
            # An incomplete character at the end would decode to a replacement character.
            text = self.tokenizer.decode(kept, clean_up_tokenization_spaces=False)
            shorter = {"role": "user", "content": text.rstrip("\ufffd")}
            ids = self.encode_prompt([*messages[:-1], shorter], system)
        return ids


def note_on_template(asked: str | None, template: Template) -> str | None:
    """A note where no template was `asked` for and the tokenizer has none; else None."""
    if asked is not None or template.name != "empty":
        return None
    return (
        "template: this tokenizer has no chat template, so a prompt is its text alone; name the "
        "template that the model was fine-tuned with"
    )


def get_template(
    name: str | None,
    tokenizer: Any,
    *,
    enable_thinking: bool = True,
    preserve_thinking: bool = False,
    default_system: str | None = None,
) -> Template:
    """The template with this name; None is the tokenizer's own, or `empty` if it has none.

    As in LLaMA-Factory the tokenizer is changed to fit, and saved with the changes: with
    `replace_eos` its EOS becomes the template's, a missing padding token becomes EOS, and a missing
    chat template (with `replace_jinja` also an existing one) becomes this template.
    """
    check_name(name)
    own = getattr(tokenizer, "chat_template", None)
    if name is None:
        name = "tokenizer" if own else "empty"
    slots = TEMPLATES.get(name)
    made = Template(
        name,
        slots,
        tokenizer,
        enable_thinking=enable_thinking,
        preserve_thinking=preserve_thinking,
        default_system=default_system,
    )
    if slots and (not own or slots.replace_jinja) and not slots.reasoning and name != "empty":
        tokenizer.chat_template = chat_template(slots, tokenizer)
    return made
