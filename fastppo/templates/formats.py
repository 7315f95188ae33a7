"""The text of each template, in LLaMA-Factory's slots.

The slots are those of LLaMA-Factory 0.9.5 (`data/template.py`), compared with the formats that the
models' authors publish; docs/data.md lists the differences. If the two differ, LLaMA-Factory's text
is used, because models that were tuned with LLaMA-Factory have seen it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from enum import Enum

from fastppo.errors import UserError


class Mark(Enum):
    """Represents a special token of the tokenizer in a slot, in contrast to text."""

    BOS = "bos"
    EOS = "eos"


BOS, EOS = Mark.BOS, Mark.EOS
Slot = tuple[str | Mark, ...]
THOUGHT = ("<think>\n", "\n</think>\n\n")  # around a thought
NO_THOUGHT = "".join(THOUGHT)


@dataclass(frozen=True)
class Slots:
    """A template: the text of each kind of message, in slots.

    In a slot `{}` is replaced by the message; the pieces of a slot are tokenized separately.
    `stop` are the tokens that end a response, the template's own first; with `replace_eos` the
    first becomes the tokenizer's EOS. With `efficient_eos` the assistant's slot has no end, and
    the tokenizer's EOS is appended to answers in training. With `fuse_system` the system prompt is
    the beginning of the first question. `reasoning` templates write an empty thought if an answer
    has none. With `replace_jinja` this template replaces the tokenizer's own chat template. `needs`
    are special tokens that the tokenizer must have.
    """

    user: Slot
    assistant: Slot = ("{}", EOS)
    system: Slot = ("{}",)
    prefix: Slot = ()
    stop: tuple[str, ...] = ()
    default_system: str = ""
    replace_eos: bool = False
    efficient_eos: bool = False
    fuse_system: bool = False
    reasoning: bool = False
    replace_jinja: bool = False
    needs: tuple[str, ...] = ()


def _chatml(
    default_system: str = "",
    *,
    stop: tuple[str, ...] = ("<|im_end|>",),
    prefix: Slot = (),
    replace_eos: bool = True,
    reasoning: bool = False,
    replace_jinja: bool = False,
) -> Slots:
    return Slots(
        user=("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",),
        assistant=("{}<|im_end|>\n",),
        system=("<|im_start|>system\n{}<|im_end|>\n",),
        prefix=prefix,
        stop=stop,
        default_system=default_system,
        replace_eos=replace_eos,
        reasoning=reasoning,
        replace_jinja=replace_jinja,
        needs=("<|im_start|>", "<|im_end|>"),
    )


def _llama2(default_system: str = "") -> Slots:
    return Slots(
        user=(BOS, "[INST] {} [/INST]"),
        system=("<<SYS>>\n{}\n<</SYS>>\n\n",),
        default_system=default_system,
        fuse_system=True,
    )


def _gemma(stop: tuple[str, ...] = ("<end_of_turn>",), *, efficient_eos: bool = False) -> Slots:
    return Slots(
        user=("<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",),
        assistant=("{}<end_of_turn>\n",),
        system=("{}\n\n",),
        prefix=(BOS,),
        stop=stop,
        replace_eos=not efficient_eos,
        efficient_eos=efficient_eos,
        fuse_system=True,
        needs=("<start_of_turn>", "<end_of_turn>"),
    )


def _phi(end: str, needs: tuple[str, ...], newline: str) -> Slots:
    return Slots(
        user=(f"<|user|>{newline}{{}}{end}{newline}<|assistant|>{newline}",),
        assistant=(f"{{}}{end}{newline}",),
        system=(f"<|system|>{newline}{{}}{end}{newline}",),
        stop=(end,),
        replace_eos=True,
        needs=needs,
    )


def _deepseek3(*, reasoning: bool = False) -> Slots:
    return Slots(
        user=("<｜User｜>{}<｜Assistant｜>",),
        prefix=(BOS,),
        reasoning=reasoning,
        needs=("<｜User｜>", "<｜Assistant｜>"),
    )


_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_PHI = ("<|user|>", "<|assistant|>", "<|end|>")

TEMPLATES: dict[str, Slots] = {
    "default": Slots(
        user=("Human: {}", EOS, "\nAssistant:"),
        assistant=("{}", EOS, "\n"),
        system=("System: {}", EOS, "\n"),
        replace_jinja=True,
    ),
    # LLaMA-Factory 0.9.5 gives `empty` no EOS; its older versions did. It has one here, because the
    # score of a response is read at its end.
    "empty": Slots(user=("{}",), assistant=("{}",), efficient_eos=True),
    "alpaca": Slots(
        user=("### Instruction:\n{}\n\n### Response:\n",),
        assistant=("{}", EOS, "\n\n"),
        default_system=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
        ),
        replace_jinja=True,
    ),
    "vicuna": Slots(user=("USER: {} ASSISTANT:",), default_system=_VICUNA, replace_jinja=True),
    "chatml": _chatml(stop=("<|im_end|>", "<|im_start|>"), replace_jinja=True),
    "qwen": _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": _chatml(reasoning=True),
    "qwen3_nothink": _chatml(),
    "smollm": _chatml(replace_eos=False),
    "smollm2": _chatml(
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face.", replace_eos=False
    ),
    "yi": _chatml(replace_eos=False),
    "llama2": _llama2(),
    "llama2_zh": _llama2("You are a helpful assistant. 你是一个乐于助人的助手。"),
    "llama3": Slots(
        user=(
            "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        assistant=("{}<|eot_id|>",),
        system=("<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",),
        prefix=(BOS,),
        stop=("<|eot_id|>", "<|eom_id|>"),
        replace_eos=True,
        needs=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": Slots(
        user=("[INST] {}[/INST]",),
        assistant=(" {}", EOS),
        system=("{}\n\n",),
        prefix=(BOS,),
        fuse_system=True,
    ),
    "ministral": Slots(
        user=("[INST]{}[/INST]",), system=("{}\n\n",), prefix=(BOS,), fuse_system=True
    ),
    "mistral_small": Slots(
        user=("[INST]{}[/INST]",),
        system=("[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]",),
        prefix=(BOS,),
    ),
    "gemma": _gemma(),
    "gemma2": _gemma(("<eos>", "<end_of_turn>"), efficient_eos=True),
    "gemma3": _gemma(),
    "phi": _phi("<|end|>", _PHI, "\n"),
    "phi4": Slots(
        user=("<|im_start|>user<|im_sep|>{}<|im_end|><|im_start|>assistant<|im_sep|>",),
        assistant=("{}<|im_end|>",),
        system=("<|im_start|>system<|im_sep|>{}<|im_end|>",),
        stop=("<|im_end|>",),
        replace_eos=True,
        needs=("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    ),
    "phi4_mini": _phi("<|end|>", _PHI, ""),
    "deepseek": Slots(user=("User: {}\n\nAssistant:",), system=("{}\n\n",), prefix=(BOS,)),
    "deepseek3": _deepseek3(),
    "deepseekr1": _deepseek3(reasoning=True),
    "glm4": Slots(
        user=("<|user|>\n{}<|assistant|>",),
        assistant=("\n{}",),
        system=("<|system|>\n{}",),
        prefix=("[gMASK]<sop>",),
        stop=("<|user|>", "<|observation|>"),
        efficient_eos=True,
        needs=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
    ),
    "zephyr": Slots(
        user=("<|user|>\n{}", EOS, "<|assistant|>\n"),
        system=("<|system|>\n{}", EOS),
        default_system="You are Zephyr, a helpful assistant.",
    ),
}


def check_name(name: str | None) -> None:
    """Raise UserError if no template has this name."""
    if name is not None and name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.5)
        cure = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(TEMPLATES)}"
        raise UserError(f"template: '{name}' is unknown; {cure} (null: the tokenizer's own)")
