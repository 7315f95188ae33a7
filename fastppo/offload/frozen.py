"""Stream a frozen model that does not fit: its layers are copied to the device when they run.

    reward_model = stream(AutoModel.from_pretrained(...), torch.device("cuda"))
    with torch.no_grad():
        hidden = reward_model(input_ids=ids).last_hidden_state

There are two slots on the device: while a layer computes in one, the next layer is copied into the
other. Embeddings, norms and head stay on the device. accelerate's `cpu_offload` has no such
overlap: it copies each module when it is called, from unpinned memory, on the compute stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastppo.offload.activations import find_layers
from fastppo.offload.streams import Event, HostMemory, Streams, aligned, streams_of


class DeviceSlot:
    """A device buffer for one layer, and the event of the last copy into it."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.room = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.layer: int | None = None
        self.arrived: Event = None


class PackedLayer:
    """A layer's weights and buffers, packed into one host buffer."""

    def __init__(self, layer: nn.Module, memory: HostMemory) -> None:
        self.tensors = [*layer.parameters(), *layer.buffers()]
        sizes = [tensor.numel() * tensor.element_size() for tensor in self.tensors]
        self.offsets, self.nbytes = aligned(sizes)
        self.host = memory.empty(max(1, self.nbytes))
        for tensor, home in zip(self.tensors, self._views(self.host), strict=True):
            home.copy_(tensor.data)
        self.point_to(self.host)

    def point_to(self, room: Tensor) -> None:
        """Make the layer's tensors views of the packed bytes in `room`, a host or device buffer."""
        for tensor, view in zip(self.tensors, self._views(room), strict=True):
            tensor.data = view

    def _views(self, room: Tensor) -> list[Tensor]:
        views = []
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            nbytes = tensor.numel() * tensor.element_size()
            part = room[offset : offset + nbytes].view(tensor.dtype)
            views.append(part.view(tensor.shape))
        return views


class StreamedModel:
    """A frozen model whose layers are streamed from host memory; made by `stream`.

    Attributes:
        bytes_moved: bytes copied to the device so far.
        host_bytes: bytes of the layers in host memory.
        device_bytes: bytes of the two slots on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        layers: Sequence[nn.Module] | None = None,
        offload_dir: str | Path | None = None,
        streams: Streams | None = None,
    ) -> None:
        self.model = model
        self.layers = list(find_layers(model) if layers is None else layers)
        self.streams = streams_of(device) if streams is None else streams
        model.requires_grad_(False).eval()
        memory = HostMemory(device, offload_dir)
        self.packed = [PackedLayer(layer, memory) for layer in self.layers]
        inside = {id(tensor) for packed in self.packed for tensor in packed.tensors}
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in inside:
                tensor.data = tensor.data.to(device)
        largest = max(packed.nbytes for packed in self.packed)
        self.slots = [DeviceSlot(largest, device) for _ in range(2)]
        self.bytes_moved = 0
        self.host_bytes = sum(packed.nbytes for packed in self.packed)
        self.device_bytes = 2 * largest
        self._handles = []
        for index, layer in enumerate(self.layers):
            self._handles += [
                layer.register_forward_pre_hook(self._pre_forward(index), with_kwargs=True),
                layer.register_forward_hook(self._post_forward(index), always_call=True),
            ]

    def close(self) -> None:
        """Remove the hooks; the layers stay in host memory."""
        for handle in self._handles:
            handle.remove()

    def _pre_forward(self, index: int) -> Any:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = (*args, *kwargs.values())
            if torch.is_grad_enabled() and any(
                isinstance(value, Tensor) and value.requires_grad for value in values
            ):
                raise ValueError(
                    "a streamed model has no weights left for a backward; run it under no_grad"
                )
            slot = self._fetch(index, avoid=None)
            self.streams.wait(slot.arrived)
            self.packed[index].point_to(slot.room)
            # All work of the previous layer is queued on the compute stream, so the copy into its
            # slot waits for it. After the last layer comes the first, for the next batch.
            self._fetch((index + 1) % len(self.layers), avoid=slot)

        return enter

    def _post_forward(self, index: int) -> Any:
        def leave(*_: Any) -> None:
            self.packed[index].point_to(self.packed[index].host)

        return leave

    def _fetch(self, index: int, avoid: DeviceSlot | None) -> DeviceSlot:
        """The slot of a layer; starts the layer's copy if necessary, but not into slot `avoid`."""
        for slot in self.slots:
            if slot.layer == index:
                return slot
        slot = next(slot for slot in self.slots if slot is not avoid)
        packed = self.packed[index]
        slot.layer = index
        slot.arrived = self.streams.copy(
            slot.room[: packed.nbytes], packed.host[: packed.nbytes], self.streams.compute_event()
        )
        self.bytes_moved += packed.nbytes
        return slot


def place_frozen(
    model: nn.Module,
    device: torch.device,
    *,
    streamed: bool,
    layers: Sequence[nn.Module] | None = None,
    offload_dir: str | Path | None = None,
) -> nn.Module:
    """Move a frozen model to the device or, with `streamed`, stream its layers; returns it.

    `layers` are those to stream; None is the layers that `find_layers` finds.
    """
    if not streamed:
        return model.requires_grad_(False).eval().to(device)
    # Stored on the model, because it must live as long as the model.
    cast(Any, model).streamed = stream(model, device, layers=layers, offload_dir=offload_dir)
    return model


def stream(
    model: nn.Module,
    device: torch.device,
    *,
    layers: Sequence[nn.Module] | None = None,
    offload_dir: str | Path | None = None,
    streams: Streams | None = None,
) -> StreamedModel:
    """Freeze a model in host memory and stream its layers to `device`; forward only.

    Args:
        model: a model in host memory; its layers are the `nn.ModuleList` with the most parameters.
            Everything outside the layers is moved to the device.
        device: the device that computes.
        layers: the layers in the order in which they run, if they are not found as above.
        offload_dir: a folder for memory-mapped files, used instead of pinned host memory.
        streams: the streams for copies; None uses the device's.

    Raises:
        ValueError: the model has no layers; in the forward, a gradient is required.
    """
    return StreamedModel(model, device, layers=layers, offload_dir=offload_dir, streams=streams)
