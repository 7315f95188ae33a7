"""Triton's interpreter, without the larger part of its time, and with one rounding less.

- At each call of a device function it looks through all of `triton.language` for builtins that it
  has yet to replace. Within one launch the second look can only find what the first one replaced.
- A scan calls its step once a lane. Here it goes as a GPU's does: whole vectors, each composed with
  itself 1, 2, 4, ... lanes before, so 10 calls for 1024 lanes (test_interpreter.py holds it to
  Triton's own).
- A fused multiply-add rounds once, as a GPU's does; Triton's interpreter rounds the product too.
- The shape of a tensor, the type of a block, and numpy's name for a type, are made anew for every
  tensor. Here they are looked up.
- Every sum and product of integers is computed again in 64 bits, to see whether it overflowed.
  A GPU does not look, and at the sizes of these tests there is nothing to find.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

# The modules that were replaced since the launch began, by what a function can see of them.
replaced: set[frozenset[str]] = set()
visible: dict[Any, frozenset[str]] = {}
launch = interpreter.GridExecutor.__call__
numpy_type = interpreter._get_np_dtype
scan_lane_by_lane = interpreter.ScanOps.generic_scan


def seen_by(function: Any) -> frozenset[str]:
    """Which of the two modules that can be replaced a device function has among its globals."""
    values = function.__globals__.values()
    return frozenset(lang.__name__ for lang in (tl, tl.core) if any(v is lang for v in values))


def fused_multiply_add(self: Any, x: Any, y: Any, z: Any) -> Any:
    """InterpreterBuilder.create_fma of float32: the product is exact in float64."""
    exact = np.multiply(x.data, y.data, dtype=np.float64) + z.data
    return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
    replaced.clear()
    try:
        return launch(self, *args, **kwargs)
    finally:
        replaced.clear()


def called(self: Any, *args: Any, **kwargs: Any) -> Any:
    """InterpretedFunction.__call__, with one look for each set of modules."""
    modules = visible.get(self.fn)
    if modules is None:
        modules = visible[self.fn] = seen_by(self.fn)
    if modules not in replaced:
        interpreter._patch_lang(self.fn)
        replaced.add(modules)
    function = self.rewrite()
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def scan(self: Any, vectors: Sequence[Any]) -> list[Any]:
    """ScanOps.generic_scan of vectors: lane i is the composition of lanes 0 to i, in that order."""
    (lanes,) = vectors[0].handle.data.shape
    reach = 1  # each lane holds the composition of so many, those that there are
    while reach < lanes:
        # The first lanes have all of theirs; what is computed for them is thrown away.
        earlier = [
            self.to_tensor(np.concatenate([x.handle.data[:reach], x.handle.data[:-reach]]), x.dtype)
            for x in vectors
        ]
        found = self.combine_fn.fn(*earlier, *vectors)
        found = found if isinstance(found, tuple) else (found,)
        vectors = [
            self.to_tensor(np.concatenate([x.handle.data[:reach], y.handle.data[reach:]]), x.dtype)
            for x, y in zip(vectors, found, strict=True)
        ]
        reach *= 2
    return list(vectors)


@cache
def shape_of(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """What a tensor has as `shape` and as `numel`."""
    numel = 1
    for size in sizes:
        numel *= size
    return tl.core.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(numel)


def init_tensor(self: Any, handle: Any, type: Any) -> None:
    """tl.tensor.__init__."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = shape_of(tuple(type.shape) if type.is_block() else ())


block_types: dict[tuple[str, tuple[int, ...]], Any] = {}


def block_type_of(element: Any, shape: Sequence[int]) -> Any:
    """tl.block_type, which is only read once it is made."""
    if type(element) is not tl.dtype:
        return tl.block_type(element, shape)
    key = element.name, tuple(shape)
    found = block_types.get(key)
    if found is None:
        found = block_types[key] = tl.block_type(element, shape)
    return found


numpy_types: dict[str, Any] = {}


def numpy_type_of(given: Any) -> Any:
    """interpreter._get_np_dtype."""
    if type(given) is not tl.dtype:
        return numpy_type(given)
    found = numpy_types.get(given.name)
    if found is None:
        found = numpy_types[given.name] = numpy_type(given)
    return found


def install() -> None:
    interpreter.GridExecutor.__call__ = launched
    interpreter.InterpretedFunction.__call__ = called
    interpreter.ScanOps.generic_scan = scan
    interpreter.InterpreterBuilder.create_fma = fused_multiply_add
    interpreter._get_np_dtype = numpy_type_of
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter.InterpreterBuilder.get_block_ty = lambda self, *given: block_type_of(*given)
    tl.block_type.with_element_ty = lambda self, element: block_type_of(element, self.shape)
    tl.core.tensor.__init__ = init_tensor
