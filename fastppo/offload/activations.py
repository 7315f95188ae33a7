"""Activations out of the device's memory: recomputed, moved to host memory, or both.

For any PyTorch model with a list of layers, in any trainer:

    from fastppo.offload import ActivationOffload

    offload = ActivationOffload(model, mode="checkpoint+offload")
    for batch in batches:
        with offload:
            loss = model(**batch, use_cache=False).loss
        loss.backward()

| mode                 | kept on the device for the backward          | costs                   |
|----------------------|----------------------------------------------|-------------------------|
| `none`               | everything                                   | nothing                 |
| `checkpoint`         | each layer's input                           | a second forward        |
| `offload`            | a few layers' tensors                        | the bus: PCIe-bound     |
| `checkpoint+offload` | a few layers' inputs                         | a second forward        |

Gradients are the same, bit for bit, in all of them. Only what happens inside the layers is touched:
embeddings, the head and a fused loss behind it keep their buffers where they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fastppo.offload.parked import Group, Handle, Stash
from fastppo.offload.streams import Streams

Mode = Literal["none", "checkpoint", "offload", "checkpoint+offload"]
MODES = ("none", "checkpoint", "offload", "checkpoint+offload")
CACHES = ("past_key_values", "past_key_value", "layer_past")


class _Inside(threading.local):
    """Whether this thread runs a wrapped layer: what is called in there is left alone."""

    now = False


_inside = _Inside()


@contextmanager
def _within() -> Iterator[None]:
    before, _inside.now = _inside.now, True
    try:
        yield
    finally:
        _inside.now = before


class ActivationOffload:
    """Context manager: inside it the model's layers keep less for the backward.

    The backward may run inside or after it. Forwards without gradient pass through untouched; so do
    layers below the lowest trained parameter. Several micro-batches, several forwards before a
    backward, forwards that fail or are never followed by a backward leave nothing behind. Entered
    twice, it acts once; of two around one model, the one entered last acts.

    Args:
        model: any module; its layers are found as the `nn.ModuleList` with the most parameters.
        mode: see the module's table; not `auto`, which the trainer's memory plan resolves.
        layers: the layers, in the order in which they run, where finding them is not enough.
        keep_last: so many last layers stay on the device: the backward wants them first.
        in_flight: so many tensors may be on their way out at a time; then compute waits.
        min_bytes: smaller tensors stay.
        offload_dir: a folder for memory-mapped files, in place of (pinned) host memory.
        streams: what orders the copies; None is what the device has.

    Raises:
        ValueError: an unknown mode, no layers, or layers that checkpoint by themselves; and, from
            the forward, a KV cache where layers are checkpointed: they would write it twice.
        RuntimeError: from the forward, a saved tensor was modified in place while it was copied.

    Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost; Rhu et al. 2016, vDNN,
    for the offload and prefetch on a stream of their own.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: Mode = "checkpoint+offload",
        *,
        layers: Sequence[nn.Module] | None = None,
        keep_last: int = 1,
        in_flight: int = 2,
        min_bytes: int = 1 << 20,
        offload_dir: str | Path | None = None,
        streams: Streams | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, came {mode!r}")
        self.mode, self.min_bytes = mode, min_bytes
        self.layers = list(find_layers(model) if layers is None else layers)
        self.kept_from = len(self.layers) - keep_last
        self._settings = {"in_flight": in_flight, "folder": offload_dir, "streams": streams}
        self._stashes: dict[torch.device, Stash] = {}
        self._depth = 0
        self._before: list[Any] = []

    def __enter__(self) -> ActivationOffload:
        if self._depth == 0:
            self._install()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for layer, before in zip(self.layers, self._before, strict=True):
                if before is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.__dict__["forward"] = before

    @property
    def bytes_out(self) -> int:
        """Bytes copied to host memory so far."""
        return sum(stash.bytes_out for stash in self._stashes.values())

    @property
    def bytes_back(self) -> int:
        """Bytes copied back so far."""
        return sum(stash.bytes_back for stash in self._stashes.values())

    @property
    def host_bytes(self) -> int:
        """Host memory that the ring holds; constant once the longest batch has been seen."""
        return sum(stash.ring.nbytes for stash in self._stashes.values())

    def _install(self) -> None:
        if self.mode != "none":
            for layer in self.layers:
                if getattr(layer, "gradient_checkpointing", False):
                    raise ValueError(
                        "the model checkpoints its layers itself; call "
                        "model.gradient_checkpointing_disable() and let mode decide"
                    )
        self._before = [layer.__dict__.get("forward") for layer in self.layers]
        if self.mode != "none":
            for index, layer in enumerate(self.layers):
                layer.__dict__["forward"] = self._wrapped(index, layer, layer.forward)

    def _wrapped(self, index: int, layer: nn.Module, forward: Callable[..., Any]) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if _inside.now or not torch.is_grad_enabled() or not _trains(layer, args, kwargs):
                return forward(*args, **kwargs)
            kept = index >= self.kept_from
            if self.mode == "offload":
                return self._offloaded(layer, forward, args, kwargs, kept=kept)
            return self._checkpointed(forward, args, kwargs, kept=kept)

        return run

    def _checkpointed(
        self, forward: Callable[..., Any], args: Any, kwargs: Any, *, kept: bool
    ) -> Any:
        for name in CACHES:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"activation offloading: mode {self.mode} runs a layer twice, and it would "
                    f"write {name} twice; call the model with use_cache=False"
                )
        group = Group()
        away = self.mode == "checkpoint+offload"

        def put(value: Any, moves: bool) -> Any:
            if not (moves and away and _ordinary(value)):
                return value
            nbytes = value.untyped_storage().nbytes()
            handle = self._stash(value.device).put(
                value, group, keep=kept or nbytes < self.min_bytes
            )
            return _Away(handle, value.requires_grad)

        # Masks and rotary angles come as keywords and are one tensor for all layers: they stay.
        again = _Again(
            forward,
            tuple(put(value, True) for value in args),
            {k: put(v, isinstance(v, Tensor) and v.requires_grad) for k, v in kwargs.items()},
            now=(args, kwargs),
        )
        values = (*args, *kwargs.values())
        tensors = [value for value in values if isinstance(value, Tensor)]
        # checkpoint reads the device, and with it whose random state to keep, off its arguments.
        # It is not given the inputs themselves: how it saves those differs between torch versions.
        anchors = [tensor.detach().new_empty(0) for tensor in tensors[:1]]
        return checkpoint(again, *anchors, use_reentrant=False)

    def _offloaded(
        self, layer: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, *, kept: bool
    ) -> Any:
        group = Group()
        own = (*layer.parameters(), *layer.buffers())
        weights = {tensor.untyped_storage().data_ptr() for tensor in own}

        def pack(tensor: Tensor) -> Tensor | Handle:
            if not _ordinary(tensor):
                return tensor
            storage = tensor.untyped_storage()
            if storage.nbytes() < self.min_bytes or storage.data_ptr() in weights:
                return tensor
            return self._stash(tensor.device).put(tensor, group, keep=kept)

        def unpack(saved: Tensor | Handle) -> Tensor:
            return saved.get() if isinstance(saved, Handle) else saved

        with saved_tensors_hooks(pack, unpack), _within():
            return forward(*args, **kwargs)

    def _stash(self, device: torch.device) -> Stash:
        if device not in self._stashes:
            self._stashes[device] = Stash(device, **self._settings)
        return self._stashes[device]


def wrap(
    model: nn.Module, mode: str, *, offload_dir: str | Path | None = None
) -> ActivationOffload:
    """Enter `mode` for good, or change to it; it stays on the model as `activation_offload`."""
    known = getattr(model, "activation_offload", None)
    if known is not None and known.mode == mode:
        return cast(ActivationOffload, known)
    if known is not None:
        known.__exit__()
    entered = ActivationOffload(model, cast(Mode, mode), offload_dir=offload_dir).__enter__()
    cast(Any, model).activation_offload = entered
    return entered


class _Away:
    """An input of a layer that is away, and whether its gradient is wanted."""

    def __init__(self, handle: Handle, requires_grad: bool) -> None:
        self.handle, self.requires_grad = handle, requires_grad

    def get(self) -> Tensor:
        return self.handle.get().requires_grad_(self.requires_grad)


class _Again:
    """A layer's forward: first with the inputs at hand, then with those fetched back."""

    def __init__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], now: Any
    ) -> None:
        self.forward, self.args, self.kwargs, self.now = forward, args, kwargs, now

    def __call__(self, *_: Tensor) -> Any:
        args, kwargs = self.now or (
            [value.get() if isinstance(value, _Away) else value for value in self.args],
            {k: v.get() if isinstance(v, _Away) else v for k, v in self.kwargs.items()},
        )
        self.now = None
        with _within():
            return self.forward(*args, **kwargs)


def _ordinary(value: Any) -> bool:
    """A dense activation: not a parameter, not a subclass that knows more than its storage."""
    return (
        type(value) is Tensor
        and value.layout == torch.strided
        and value.is_floating_point()
        and not value.is_conj()
        and not value.is_neg()
    )


def _trains(layer: nn.Module, args: Any, kwargs: Any) -> bool:
    values = (*args, *kwargs.values())
    return any(isinstance(value, Tensor) and value.requires_grad for value in values) or any(
        parameter.requires_grad for parameter in layer.parameters()
    )


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The `nn.ModuleList` with the most parameters: the decoder layers of a language model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList; name its layers with layers="
        )
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))
