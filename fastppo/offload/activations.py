"""Reduce the device memory of activations: recompute them, move them to host memory, or both.

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

Gradients are bit for bit the same in all modes. Only activations inside the layers are affected;
embeddings, the head and a fused loss keep theirs on the device.
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

from fastppo.offload.host_tensors import HostTensors, LayerGroup, OffloadedTensor
from fastppo.offload.streams import Streams

Mode = Literal["none", "checkpoint", "offload", "checkpoint+offload"]
MODES = ("none", "checkpoint", "offload", "checkpoint+offload")
CACHES = ("past_key_values", "past_key_value", "layer_past")


class _InsideLayer(threading.local):
    """Whether this thread runs a wrapped layer; layers that this layer calls are run unwrapped."""

    now = False


_inside_layer = _InsideLayer()


@contextmanager
def _mark_inside_layer() -> Iterator[None]:
    before, _inside_layer.now = _inside_layer.now, True
    try:
        yield
    finally:
        _inside_layer.now = before


class ActivationOffload:
    """Context manager inside which the model's layers save less on the device for the backward.

    The backward may run inside or after the context. Forwards without gradient are not affected,
    nor are layers below the lowest trainable parameter. Several forwards before a backward are
    allowed; forwards that fail or have no backward leak no memory. Entering the same object twice
    has no further effect; if two objects wrap one model, the one entered last is active.

    Args:
        model: any module; its layers are the `nn.ModuleList` with the most parameters.
        mode: see the module's table; `auto` is not allowed (only the trainer resolves it).
        layers: the layers in the order in which they run, if they are not found as above.
        keep_last: number of last layers whose tensors stay on the device, >= 0: the backward needs
            them first.
        in_flight: largest number of tensors that are being copied to the host, >= 1; then compute
            waits.
        min_bytes: tensors of fewer bytes stay on the device.
        offload_dir: a folder for memory-mapped files, used instead of (pinned) host memory.
        streams: the streams for copies; None uses the device's.

    Raises:
        ValueError: an unknown mode, no layers, or layers that already checkpoint themselves; in the
            forward, a KV cache with checkpointed layers, which would write it twice.
        RuntimeError: in the forward, a saved tensor was modified in place while it was copied.

    Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost (checkpointing); Rhu et
    al. 2016, vDNN (offload and prefetch on a separate stream).
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
        self.keep_from = len(self.layers) - keep_last
        self._settings = {"in_flight": in_flight, "folder": offload_dir, "streams": streams}
        self._host_tensors: dict[torch.device, HostTensors] = {}
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
        return sum(tensors.bytes_out for tensors in self._host_tensors.values())

    @property
    def bytes_back(self) -> int:
        """Bytes copied back to the device so far."""
        return sum(tensors.bytes_back for tensors in self._host_tensors.values())

    @property
    def host_bytes(self) -> int:
        """Bytes of the host buffers; constant after the longest batch."""
        return sum(tensors.ring.nbytes for tensors in self._host_tensors.values())

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
                layer.__dict__["forward"] = self._wrap_forward(index, layer, layer.forward)

    def _wrap_forward(self, index: int, layer: nn.Module, forward: Callable[..., Any]) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if (
                _inside_layer.now
                or not torch.is_grad_enabled()
                or not _needs_gradient(layer, args, kwargs)
            ):
                return forward(*args, **kwargs)
            keep = index >= self.keep_from
            if self.mode == "offload":
                return self._run_offloaded(layer, forward, args, kwargs, keep=keep)
            return self._run_checkpointed(forward, args, kwargs, keep=keep)

        run.without_gradient = forward  # type: ignore[attr-defined]
        return run

    def _run_checkpointed(
        self, forward: Callable[..., Any], args: Any, kwargs: Any, *, keep: bool
    ) -> Any:
        for name in CACHES:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"activation offloading: mode {self.mode} runs a layer twice, and it would "
                    f"write {name} twice; call the model with use_cache=False"
                )
        group = LayerGroup()
        away = self.mode == "checkpoint+offload"

        def offload_input(value: Any, moves: bool) -> Any:
            if not (moves and away and _is_dense_activation(value)):
                return value
            nbytes = value.untyped_storage().nbytes()
            handle = self._tensors_of(value.device).offload(
                value, group, keep=keep or nbytes < self.min_bytes
            )
            return _OffloadedInput(handle, value.requires_grad)

        # Masks and rotary angles are keyword arguments, one tensor for all layers: they stay.
        call = _LayerCall(
            forward,
            tuple(offload_input(value, True) for value in args),
            {
                k: offload_input(v, isinstance(v, Tensor) and v.requires_grad)
                for k, v in kwargs.items()
            },
            now=(args, kwargs),
        )
        values = (*args, *kwargs.values())
        tensors = [value for value in values if isinstance(value, Tensor)]
        # checkpoint finds the device, whose random state it keeps, from its tensor arguments. It
        # does not get the inputs themselves, which torch versions save in different ways.
        anchors = [tensor.detach().new_empty(0) for tensor in tensors[:1]]
        return checkpoint(call, *anchors, use_reentrant=False)

    def _run_offloaded(
        self, layer: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, *, keep: bool
    ) -> Any:
        group = LayerGroup()
        own = (*layer.parameters(), *layer.buffers())
        weights = {tensor.untyped_storage().data_ptr() for tensor in own}

        def pack(tensor: Tensor) -> Tensor | OffloadedTensor:
            if not _is_dense_activation(tensor):
                return tensor
            storage = tensor.untyped_storage()
            if storage.nbytes() < self.min_bytes or storage.data_ptr() in weights:
                return tensor
            return self._tensors_of(tensor.device).offload(tensor, group, keep=keep)

        def unpack(saved: Tensor | OffloadedTensor) -> Tensor:
            return saved.get() if isinstance(saved, OffloadedTensor) else saved

        with saved_tensors_hooks(pack, unpack), _mark_inside_layer():
            return forward(*args, **kwargs)

    def _tensors_of(self, device: torch.device) -> HostTensors:
        if device not in self._host_tensors:
            self._host_tensors[device] = HostTensors(device, **self._settings)
        return self._host_tensors[device]


def wrap(
    model: nn.Module,
    mode: str,
    *,
    layers: Sequence[nn.Module] | None = None,
    offload_dir: str | Path | None = None,
) -> ActivationOffload:
    """Set a model's mode until the next call of `wrap`.

    Args:
        layers: its layers, where finding them is not enough.

    Returns:
        The ActivationOffload, already entered; it is also stored as `model.activation_offload`.
    """
    known = getattr(model, "activation_offload", None)
    if known is not None and known.mode == mode:
        return cast(ActivationOffload, known)
    if known is not None:
        known.__exit__()
    entered = ActivationOffload(
        model, cast(Mode, mode), layers=layers, offload_dir=offload_dir
    ).__enter__()
    cast(Any, model).activation_offload = entered
    return entered


class _OffloadedInput:
    """An offloaded input of a layer, and whether it requires a gradient."""

    def __init__(self, handle: OffloadedTensor, requires_grad: bool) -> None:
        self.handle, self.requires_grad = handle, requires_grad

    def get(self) -> Tensor:
        return self.handle.get().requires_grad_(self.requires_grad)


class _LayerCall:
    """A layer's forward: the first call uses the given inputs, later calls fetch the offloaded."""

    def __init__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], now: Any
    ) -> None:
        self.forward, self.args, self.kwargs, self.now = forward, args, kwargs, now

    def __call__(self, *_: Tensor) -> Any:
        args, kwargs = self.now or (
            [value.get() if isinstance(value, _OffloadedInput) else value for value in self.args],
            {k: v.get() if isinstance(v, _OffloadedInput) else v for k, v in self.kwargs.items()},
        )
        self.now = None
        with _mark_inside_layer():
            return self.forward(*args, **kwargs)


def _is_dense_activation(value: Any) -> bool:
    """Whether a value is a dense floating-point tensor, not a parameter and not a subclass."""
    return (
        type(value) is Tensor
        and value.layout == torch.strided
        and value.is_floating_point()
        and not value.is_conj()
        and not value.is_neg()
    )


def _needs_gradient(layer: nn.Module, args: Any, kwargs: Any) -> bool:
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
