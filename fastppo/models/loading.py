"""What goes wrong when a model, an adapter or a head is read, as one kind of failure."""

from __future__ import annotations

import re
from pickle import UnpicklingError

from safetensors import SafetensorError

# What transformers, PEFT, safetensors and torch raise at files that are not what they should be.
LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    ImportError,
    SafetensorError,
    UnpicklingError,
)


def first_line(error: Exception) -> str:
    """Libraries explain at length; the first line says what, but for what has better words."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error).strip())
    if "Weights only load failed" in text:
        return "it is no file of tensors alone, and nothing else in it is opened"
    if "custom code" in text:
        return "it brings code of its own, which runs only with trust_remote_code: true"
    if isinstance(error, KeyError):
        return f"unknown {text}"
    first, _, rest = (text or type(error).__name__).partition("\n")
    return (f"{first} {' '.join(rest.split())}" if first.rstrip().endswith(":") else first)[:200]
