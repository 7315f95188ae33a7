"""A template as Jinja text, for the tokenizer that is saved with the model."""

from __future__ import annotations

from typing import Any

from fastppo.templates.formats import EOS, NO_THOUGHT, Mark, Slot, Slots


def chat_template(
    slots: Slots,
    tokenizer: Any,
    *,
    default_system: str | None = None,
    enable_thinking: bool = True,
    preserve_thinking: bool = False,
) -> str:
    """A Jinja template that gives the same text as `slots`, for other programs that load the model.

    As in LLaMA-Factory, the assistant's header follows every question, even without
    add_generation_prompt.

    Args:
        slots: the template's pieces.
        tokenizer: the tokenizer that gets the template.
        default_system: the system prompt of a conversation without one; None is the template's.
        enable_thinking: the default of that argument in a template for reasoning models.
        preserve_thinking: whether earlier answers keep their thoughts.
    """

    def expression(slot: Slot, content: str = "content") -> str:
        parts = []
        for piece in slot:
            if isinstance(piece, Mark):
                token = tokenizer.eos_token if piece is EOS else tokenizer.bos_token
                parts.append(quote(token or ""))
                continue
            before, braces, after = piece.partition("{}")
            parts += [quote(before), *([content] if braces else []), quote(after)]
        return " ~ ".join(part for part in parts if part != "''") or "''"

    default = slots.default_system if default_system is None else default_system
    system = expression(slots.system, "system")
    fused = f"{{% if loop.first and system %}}{{% set content = {system} ~ content %}}{{% endif %}}"
    apart = f"{{% if system %}}{{{{ {system} }}}}{{% endif %}}"
    end = tokenizer.eos_token if slots.efficient_eos else None
    forget, quiet, thought = "", "", ""
    if slots.reasoning:
        earlier = "false" if preserve_thinking else "not loop.last"
        no_thought = f"{{{{ {quote(NO_THOUGHT)} }}}}"
        quiet = f"{{% if loop.last and not enable_thinking %}}{no_thought}{{% endif %}}"
        forget = (
            f"{{% if ({earlier} or (loop.last and not enable_thinking)) and "
            "'<think>\\n' in content and '\\n</think>\\n\\n' in content %}{% set content = "
            "(content.split('<think>\\n')[0] ~ content.split('\\n</think>\\n\\n')[-1])"
            ".lstrip('\\n') %}{% endif %}"
        )
        thought = (
            "{% if loop.last and not ('<think>' in content or '</think>' in content) %}"
            f"{no_thought}{{% endif %}}"
        )
    return (
        f"{set_thinking(enable_thinking) if slots.reasoning else ''}"
        f"{{% set said = messages %}}{{% set system = {quote(default)} %}}"
        "{% if messages and messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] %}{% set said = messages[1:] %}{% endif %}"
        f"{{{{ {expression(slots.prefix)} }}}}{'' if slots.fuse_system else apart}"
        "{% for message in said %}{% set content = message['content'] %}"
        f"{fused if slots.fuse_system else ''}"
        f"{{% if message['role'] == 'user' %}}{{{{ {expression(slots.user)} }}}}"
        f"{quiet}{{% elif message['role'] == 'assistant' %}}{forget}{thought}"
        f"{{{{ {expression(slots.assistant)} }}}}"
        f"{f'{{% if loop.last %}}{{{{ {quote(end)} }}}}{{% endif %}}' if end else ''}"
        "{% endif %}{% endfor %}"
    )


def set_thinking(enable_thinking: bool) -> str:
    """A piece of Jinja that gives `enable_thinking` a value where the caller gave none."""
    value = "true" if enable_thinking else "false"
    return (
        "{% if enable_thinking is not defined %}"
        f"{{% set enable_thinking = {value} %}}{{% endif %}}"
    )


def with_system(jinja: str, system: str) -> str:
    """The template with `system` before conversations that have no system prompt."""
    turn = f"{{'role': 'system', 'content': {quote(system)}}}"
    return (
        "{% if not messages or messages[0]['role'] != 'system' %}"
        f"{{% set messages = [{turn}] + messages %}}{{% endif %}}" + jinja
    )


def with_answer_as_trained(jinja: str, end: str) -> str:
    """The template with a final answer as training writes it: header, text and `end`.

    Training writes an answer behind the prompt's generation header, and some templates write a
    whole conversation otherwise.
    """
    return (
        "{% if messages and messages[-1]['role'] == 'assistant' %}"
        "{% set final_answer = messages[-1]['content'] %}{% set messages = messages[:-1] %}"
        "{% set add_generation_prompt = true %}{% endif %}"
        + jinja.removesuffix("\n")
        + f"{{% if final_answer is defined %}}{{{{ final_answer ~ {quote(end)} }}}}{{% endif %}}"
    )


def quote(text: str) -> str:
    """`text` as a Jinja string literal."""
    text = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{text}'"


def without_suffix(jinja: str, suffix: str) -> str:
    """The template without `suffix` at the end of a conversation whose last turn is an answer.

    A reward model that is scored at EOS needs it: EOS is then the last token.
    """
    ends = f"messages[-1]['role'] == 'assistant' and chat.endswith({quote(suffix)})"
    return (
        f"{{% set chat %}}{jinja.removesuffix(chr(10))}{{% endset %}}"
        f"{{{{ chat[:{-len(suffix)}] if {ends} else chat }}}}"
    )
