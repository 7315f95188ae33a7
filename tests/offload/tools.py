"""A model for the offload tests, and streams that show what was asked for and how it could fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, HIDDEN, BATCH, TOKENS = 5, 32, 2, 12
INPUT_BYTES = BATCH * TOKENS * HIDDEN * 4  # of one layer, float32


def llama(layers: int = LAYERS, *, lora: bool = True, **extra: Any) -> nn.Module:
    """A tiny Llama, frozen, with LoRA on every linear layer; adapters far from 0."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        **extra,
    )
    model: Any = LlamaForCausalLM(config)
    if lora:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
    return model.train()


def ids(seed: int = 0, batch: int = BATCH, tokens: int = TOKENS) -> Tensor:
    return torch.randint(0, 64, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    return model(input_ids=input_ids, use_cache=False).logits.float().square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """What was accumulated; taken away, so that the next test of the model starts clean."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return (
        bool(one) and one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    )


class LateStreams:
    """A device whose copies run at the last peak that is allowed: when compute waits for them.

    A copy is remembered by the memory it reads and writes, not by the tensors: memory that was let
    go of before the copy's event was waited for is garbage, and is reported in `broken`.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []
        self.broken: list[str] = []
        self._queue: list[tuple[int, StorageWeakRef, StorageWeakRef, int]] = []
        self._events = 0

    def compute_event(self) -> int:
        self._events += 1
        self.log.append(("record", self._events))
        return self._events

    def copy(self, target: Tensor, source: Tensor, after: int) -> int:
        self._events += 1
        self.log.append(("copy", (self._events, after)))
        refs = (StorageWeakRef(target.untyped_storage()), StorageWeakRef(source.untyped_storage()))
        assert not target.storage_offset() | source.storage_offset()
        self._queue.append((self._events, *refs, source.numel()))
        return self._events

    def wait(self, event: int) -> None:
        self.log.append(("wait", event))
        while self._queue and self._queue[0][0] <= event:
            number, to, of, n = self._queue.pop(0)
            both = [torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in (to, of)]
            if None in both:
                self.broken.append(f"copy {number}: memory let go of before it was over")
                continue
            target, source = (torch.empty(0, dtype=torch.uint8).set_(s)[:n] for s in both)
            target.copy_(source)

    def pending(self) -> int:
        """Copies that nobody has waited for."""
        return len(self._queue)


class Live(TorchDispatchMode):
    """Counts the bytes of all storages made inside it that still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {tensor.untyped_storage()._cdata for tensor in _tensors(args)}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.storages and storage._cdata not in inputs:
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.peak = max(self.peak, self.nbytes())
        return result

    def nbytes(self) -> int:
        gone = [key for key, (ref, _) in self.storages.items() if ref.expired()]
        for key in gone:
            del self.storages[key]
        return sum(nbytes for _, nbytes in self.storages.values())


def _tensors(value: Any) -> list[Tensor]:
    flat, _ = torch.utils._pytree.tree_flatten(value)
    return [item for item in flat if isinstance(item, Tensor)]
