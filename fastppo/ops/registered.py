"""Registers the operators with torch.library as `fastppo::<name>`, for tracers.

A schema of torch.library can have only tensors and scalars. The arguments of an operator here are a
NamedTuple; its fields are tensors, scalars, `float | Tensor`, or further NamedTuples. The schema
and the values of a call are made from these fields. Eager calls do not use this module.
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
# The kind of a field says how many entries of the schema it has. _ONE: one entry. _EITHER, for
# `float | Tensor`: two entries, the tensor (or None) and the float. A NamedTuple: its own fields.
_ONE: Final = "one"
_EITHER: Final = "either"
_KINDS: Final[dict[type, tuple[Any, ...]]] = {}


def _schema(arguments: type, prefix: str = "") -> list[str]:
    """The schema's entries as `type name`; names of inner fields begin with their tuple's name."""
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
    """The values of `arguments` in the order of the schema's entries."""
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
    """The arguments from the values of the schema's entries; the inverse of `flatten`."""
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
    """Register `fastppo::<name>`, and return the function that calls it.

    Args:
        arguments, outputs: NamedTuples; all fields of the outputs are tensors.
        forward: computes the outputs; they share no memory with each other or with the arguments.
        fake: gives empty outputs with the same shapes and dtypes.
        results: number of differentiable outputs, which are the first ones.
        save: stores what the backward needs in autograd's context.
        backward: (context, *gradients of the differentiable outputs) -> gradients of the schema's
            first entries; the other entries have no gradient.
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
