"""Chat templates by LLaMA-Factory's names: text around what is said, and where a response ends."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastppo.errors import UserError

Message = dict[str, str]


@dataclass(frozen=True)
class Slots:
    """A template's text; `{}` is the content, `<bos>` and `<eos>` are the tokenizer's own.

    `eos` None is the tokenizer's own EOS. `stop` are further tokens that end a response, `suffix`
    is what LLaMA-Factory writes behind EOS, `needs` are the special tokens without which the text
    would fall apart into letters.
    """

    user: str
    assistant: str = "{}"
    system: str = "{}"
    prefix: str = ""
    eos: str | None = None
    stop: tuple[str, ...] = ()
    suffix: str = ""
    default_system: str = ""
    needs: tuple[str, ...] = ()


def _chatml(default_system: str = "") -> Slots:
    return Slots(
        user="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        system="<|im_start|>system\n{}<|im_end|>\n",
        eos="<|im_end|>",
        suffix="\n",
        default_system=default_system,
        needs=("<|im_start|>", "<|im_end|>"),
    )


TEMPLATES: dict[str, Slots] = {
    "default": Slots(user="Human: {}<eos>\nAssistant:", system="System: {}<eos>\n", suffix="\n"),
    "empty": Slots(user="{}"),
    "alpaca": Slots(
        user="### Instruction:\n{}\n\n### Response:\n",
        system="{}\n\n",
        suffix="\n\n",
        default_system=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request."
        ),
    ),
    "chatml": _chatml(),
    "qwen": _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3_nothink": _chatml(),
    "smollm2": _chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "llama3": Slots(
        user=(
            "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        prefix="<bos>",
        eos="<|eot_id|>",
        stop=("<|eom_id|>",),
        needs=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma": Slots(
        user="<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
        system="{}\n\n",
        prefix="<bos>",
        eos="<end_of_turn>",
        suffix="\n",
        needs=("<start_of_turn>", "<end_of_turn>"),
    ),
    "phi4": Slots(
        user="<|im_start|>user<|im_sep|>{}<|im_end|><|im_start|>assistant<|im_sep|>",
        system="<|im_start|>system<|im_sep|>{}<|im_end|>",
        eos="<|im_end|>",
        needs=("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    ),
}


def check_name(name: str | None) -> None:
    """Refuse a template that is not there, without a tokenizer."""
    if name is not None and name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.5)
        cure = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(TEMPLATES)}"
        raise UserError(f"template: '{name}' is unknown; {cure}")


class Template:
    """A chat template and the tokenizer that it writes for."""

    def __init__(self, name: str, slots: Slots | None, tokenizer: Any) -> None:
        self.name, self.slots, self.tokenizer = name, slots, tokenizer
        missing = [t for t in (slots.needs if slots else ()) if self._id(t) is None]
        if missing:
            raise UserError(
                f"template: '{name}' needs the token {missing[0]}, which this model's tokenizer "
                f"does not "
                "have; choose the model's own template (template: null)"
            )
        eos = slots.eos if slots and slots.eos else tokenizer.eos_token
        if eos is None:
            raise UserError(
                f"template: '{name}' leaves the end of a response to the tokenizer, and it has no "
                f"EOS "
                "token; choose a template that has one, such as chatml"
            )
        self.eos_id: int = self._id(eos) if self._id(eos) is not None else tokenizer.eos_token_id
        further = [self._id(token) for token in (slots.stop if slots else ())]
        own = [tokenizer.eos_token_id]
        ids = dict.fromkeys([self.eos_id, *further, *own])
        self.stop_ids: tuple[int, ...] = tuple(i for i in ids if i is not None)
        pad = tokenizer.pad_token_id
        self.pad_id: int = pad if pad is not None else self.eos_id

    def _id(self, token: str) -> int | None:
        found = self.tokenizer.convert_tokens_to_ids(token)
        unknown = self.tokenizer.unk_token_id
        return (
            None
            if found is None or (found == unknown and token != self.tokenizer.unk_token)
            else found
        )

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        text = text.replace("<eos>", eos)
        if text.startswith("<bos>"):
            text = bos + text.removeprefix("<bos>")
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    @property
    def suffix_ids(self) -> tuple[int, ...]:
        """What LLaMA-Factory's template writes behind EOS: where its reward models were scored."""
        return tuple(self._encode(self.slots.suffix)) if self.slots else ()

    def encode_prompt(self, messages: Sequence[Message], system: str | None = None) -> list[int]:
        """Ids of a conversation that ends with a user's turn, up to the assistant's header.

        `system` None is the template's default, "" is none. Turns are encoded one by one, as
        LLaMA-Factory does: a merge across their borders would give other tokens.
        """
        if self.slots is None:
            chat = [dict(message) for message in messages]
            if system:
                chat.insert(0, {"role": "system", "content": system})
            ids = self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            return list(ids)
        slots = self.slots
        system = slots.default_system if system is None else system
        ids = self._encode(slots.prefix)
        if system:
            ids += self._encode(slots.system.replace("{}", system))
        for message in messages:
            if message["role"] == "user":
                ids += self._encode(slots.user.replace("{}", message["content"]))
            else:
                ids += self._encode(slots.assistant.replace("{}", message["content"]))
                ids += [self.eos_id, *self.suffix_ids]
        return ids

    def encode_response(self, text: str) -> list[int]:
        """Ids of an answer, EOS at its end."""
        text = self.slots.assistant.replace("{}", text) if self.slots else text
        return [*self._encode(text), self.eos_id]

    def fit_prompt(
        self, messages: Sequence[Message], system: str | None, limit: int
    ) -> list[int] | None:
        """`encode_prompt` in at most `limit` tokens; None where even an empty question is too long.

        What is cut is the end of the last question, never the assistant's header behind it: without
        that, the model would go on writing the user's text.
        """
        ids = self.encode_prompt(messages, system)
        content = messages[-1]["content"]
        kept = self._encode(content)
        while len(ids) > limit:
            if not kept:
                return None
            kept = kept[: max(0, len(kept) - (len(ids) - limit))]
            shorter = {"role": "user", "content": self.tokenizer.decode(kept)}
            ids = self.encode_prompt([*messages[:-1], shorter], system)
        return ids


def get_template(name: str | None, tokenizer: Any) -> Template:
    """The template of that name; None is the tokenizer's own, or `empty` where it has none."""
    check_name(name)
    if name is not None:
        return Template(name, TEMPLATES[name], tokenizer)
    if getattr(tokenizer, "chat_template", None):
        return Template("tokenizer", None, tokenizer)
    return Template("empty", TEMPLATES["empty"], tokenizer)
