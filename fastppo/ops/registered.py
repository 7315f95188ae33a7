"""Operators as torch.library knows them: `fastppo::<name>`, taken while something traces.

A schema of torch.library holds tensors and scalars alone. An operator's arguments are a NamedTuple,
whose fields are tensors, scalars, a float or tensor, or NamedTuples again: the schema is made of
its fields, and so are the values of a call. Eager calls do not come here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

A = TypeVar("A", bound=tuple[Any, ...])
R = TypeVar("R", bound=tuple[Any, ...])

_SCALARS: Final[dict[Any, str]] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    int: "int",
    int | None: "int?",
    bool: "bool",
    tuple[bool, ...]: "bool[]",
    str: "str",
    torch.dtype: "ScalarType",
}
# A field is one entry of the schema; or, a float or tensor, two (the tensor or None, and the
# float); or a tuple of entries, whose class is its kind.
_ONE: Final = "one"
_EITHER: Final = "either"
_KINDS: Final[dict[type, tuple[Any, ...]]] = {}


def _schema(arguments: type, prefix: str = "") -> list[str]:
    """`type name` of every entry, the fields of inner tuples under their field's name."""
    entries: list[str] = []
    kinds: list[Any] = []
    for name, kind in get_type_hints(arguments).items():
        if kind == float | Tensor:
            entries += [f"Tensor? {prefix}{name}_tensor", f"float {prefix}{name}"]
            kinds.append(_EITHER)
        elif kind in _SCALARS:
            entries.append(f"{_SCALARS[kind]} {prefix}{name}")
            kinds.append(_ONE)
        else:
            entries += _schema(kind, f"{prefix}{name}_")
            kinds.append(kind)
    _KINDS[arguments] = tuple(kinds)
    return entries


def flatten(arguments: tuple[Any, ...]) -> list[Any]:
    """The values of a schema's entries."""
    flat: list[Any] = []
    for value, kind in zip(arguments, _KINDS[type(arguments)], strict=True):
        if kind is _ONE:
            flat.append(value)
        elif kind is _EITHER:
            flat += [value, 1.0] if isinstance(value, Tensor) else [None, value]
        else:
            flat += flatten(value)
    return flat


def build(arguments: type[A], values: Iterator[Any]) -> A:
    """The inverse of `flatten`."""
    fields: list[Any] = []
    for kind in _KINDS[arguments]:
        if kind is _ONE:
            fields.append(next(values))
        elif kind is _EITHER:
            tensor, number = next(values), next(values)
            fields.append(number if tensor is None else tensor)
        else:
            fields.append(build(kind, values))
    return arguments(*fields)


def register(
    name: str,
    arguments: type[A],
    outputs: type[R],
    forward: Callable[[A], R],
    fake: Callable[[A], R],
    *,
    results: int = 0,
    save: Callable[[Any, A, R], None] | None = None,
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
) -> Callable[[A], R]:
    """Register `fastppo::<name>`, and give the function that calls it.

    Args:
        arguments, outputs: NamedTuples; the outputs' fields are tensors.
        forward: the operator; its results share no memory, with each other or the arguments.
        fake: results of the same shapes and dtypes.
        results: how many of the outputs, the first ones, are differentiable.
        save: keeps on autograd's context what the backward needs.
        backward: (context, *gradients of the differentiable outputs) -> gradients of the schema's
            first entries; the others have none.
    """
    entries = _schema(arguments)
    made = ", ".join(["Tensor"] * len(get_type_hints(outputs)))
    schema = f"({', '.join(entries)}) -> ({made})"

    def several(found: R) -> Any:
        return tuple(found) if len(found) > 1 else found[0]

    def run(*flat: Any) -> Any:
        return several(forward(build(arguments, iter(flat))))

    def shapes(*flat: Any) -> Any:
        return several(fake(build(arguments, iter(flat))))

    operator = torch.library.custom_op(f"fastppo::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(shapes)
    if save is not None and backward is not None:
        kept, derive = save, backward

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.mark_non_differentiable(*output[results:])
            ctx.set_materialize_grads(False)
            kept(ctx, build(arguments, iter(inputs)), outputs(*output))

        @once_differentiable
        def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            found = derive(ctx, *grads[:results])
            return (*found, *[None] * (len(entries) - len(found)))

        operator.register_autograd(gradients, setup_context=setup_context)

    def call(given: A) -> R:
        found = getattr(torch.ops.fastppo, name)(*flatten(given))
        return outputs(found) if isinstance(found, Tensor) else outputs(*found)

    return call
