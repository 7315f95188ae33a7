"""What goes wrong when a model, an adapter or a head is read, as one kind of failure."""

from __future__ import annotations

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
    """Libraries explain at length; the first line says what."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
