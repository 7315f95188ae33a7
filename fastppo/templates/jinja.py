"""A template as Jinja text, for the tokenizer that is saved with the model."""

from __future__ import annotations

from typing import Any

from fastppo.templates.formats import EOS, Mark, Slot, Slots


def chat_template(slots: Slots, tokenizer: Any) -> str:
    """A Jinja template that gives the same text as `slots`, for other programs that load the model.

    As in LLaMA-Factory, the assistant's header follows every question, even without
    add_generation_prompt.
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

    system = expression(slots.system, "system")
    fused = f"{{% if loop.first and system %}}{{% set content = {system} ~ content %}}{{% endif %}}"
    apart = f"{{% if system %}}{{{{ {system} }}}}{{% endif %}}"
    return (
        f"{{% set said = messages %}}{{% set system = {quote(slots.default_system)} %}}"
        "{% if messages and messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] %}{% set said = messages[1:] %}{% endif %}"
        f"{{{{ {expression(slots.prefix)} }}}}{'' if slots.fuse_system else apart}"
        "{% for message in said %}{% set content = message['content'] %}"
        f"{fused if slots.fuse_system else ''}"
        f"{{% if message['role'] == 'user' %}}{{{{ {expression(slots.user)} }}}}"
        f"{{% elif message['role'] == 'assistant' %}}{{{{ {expression(slots.assistant)} }}}}"
        "{% endif %}{% endfor %}"
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
