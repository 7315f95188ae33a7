"""A template as Jinja, for the tokenizer that is saved beside the model."""

from __future__ import annotations

from typing import Any

from fastppo.templates.formats import EOS, Mark, Slot, Slots


def chat_template(slots: Slots, tokenizer: Any) -> str:
    """Jinja that writes what `slots` write, so that whoever loads the model talks to it so.

    As in LLaMA-Factory's, the assistant's header stands behind every question, asked for or not.
    """

    def written(slot: Slot, content: str = "content") -> str:
        parts = []
        for piece in slot:
            if isinstance(piece, Mark):
                token = tokenizer.eos_token if piece is EOS else tokenizer.bos_token
                parts.append(quoted(token or ""))
                continue
            before, braces, after = piece.partition("{}")
            parts += [quoted(before), *([content] if braces else []), quoted(after)]
        return " ~ ".join(part for part in parts if part != "''") or "''"

    system = written(slots.system, "system")
    fused = f"{{% if loop.first and system %}}{{% set content = {system} ~ content %}}{{% endif %}}"
    apart = f"{{% if system %}}{{{{ {system} }}}}{{% endif %}}"
    return (
        f"{{% set said = messages %}}{{% set system = {quoted(slots.default_system)} %}}"
        "{% if messages and messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] %}{% set said = messages[1:] %}{% endif %}"
        f"{{{{ {written(slots.prefix)} }}}}{'' if slots.fuse_system else apart}"
        "{% for message in said %}{% set content = message['content'] %}"
        f"{fused if slots.fuse_system else ''}"
        f"{{% if message['role'] == 'user' %}}{{{{ {written(slots.user)} }}}}"
        f"{{% elif message['role'] == 'assistant' %}}{{{{ {written(slots.assistant)} }}}}"
        "{% endif %}{% endfor %}"
    )


def quoted(text: str) -> str:
    """A Jinja string."""
    text = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{text}'"


def without_suffix(jinja: str, suffix: str) -> str:
    """The same template, without `suffix` behind a conversation that ends with an answer.

    For a reward model that is read at EOS: whoever reads the last token reads EOS.
    """
    ends = f"messages[-1]['role'] == 'assistant' and chat.endswith({quoted(suffix)})"
    return (
        f"{{% set chat %}}{jinja.removesuffix(chr(10))}{{% endset %}}"
        f"{{{{ chat[:{-len(suffix)}] if {ends} else chat }}}}"
    )
