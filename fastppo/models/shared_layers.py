"""The lowest decoder layers, in which roles have the same frozen weights: run once per rollout.

The first pass over a sequence keeps the hidden states behind the shared layers, by token and
without padding. The later passes of all roles, those of the update included, start from them.

| role                                                      | layers that it can share            |
|-----------------------------------------------------------|-------------------------------------|
| adapters off; a frozen copy of `freeze`                   | those below the first trained one   |
| LoRA (policy, critic, reward) with `lora_layers`          | those below the first adapted one   |
| `freeze` of upper layers                                  | those below the first trained one   |
| LoRA in all layers, lowest layers or embeddings trained   | none: the role runs whole           |
| `full`, `ref_model`, `critic: model`                      | none: the role runs whole           |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from fastppo.models.adapters import adapter_parameters
from fastppo.models.batch import make_batch
from fastppo.models.load import text_model
from fastppo.models.rounding import LIMITS, relative_error
from fastppo.models.shared_states import SharedStates, StatesOfBatch
from fastppo.offload.activations import find_layers
from fastppo.types import Sequences

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastppo.models.batch import Batch
    from fastppo.models.roles import Place, Role, Roles
    from fastppo.models.shared_prompts import SharedPrompts

# What a model raises that does not run with its lowest layers left out.
CANNOT_SKIP = (
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
CHECKED_TOKENS = 16  # of the longest sequence in the comparison at the start


class SkippedLayer(nn.Module):
    """Stands in for a layer that does not run: returns the hidden states that come in, or `states`.

    If the layer returns a tuple of `outputs` items, hidden states first, the others are None.
    All other attributes are the layer's own: models ask their layers for the kind of attention.
    """

    def __init__(self, layer: nn.Module, states: list[Tensor], outputs: int | None) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, states=states, outputs=outputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Popped, so that the tensor lives no longer than the hidden states of another layer.
        hidden = self.states.pop() if self.states else [*args, *kwargs.values()][0]
        return hidden if self.outputs is None else (hidden, *[None] * (self.outputs - 1))


class SharedLayers:
    """The lowest `count` layers of some roles, whose states are kept for a rollout.

    Args:
        layers: role -> all layers of its model; the lowest `count` have the same weights in each.
        count: number of shared layers.
        on_host: keep the states in host memory.
    """

    def __init__(self, layers: dict[str, nn.ModuleList], count: int, *, on_host: bool) -> None:
        self.layers, self.count, self.on_host = layers, count, on_host
        self.outputs: int | None = None  # length of the tuple that a layer returns; None: a tensor

    def new_states(self, lengths: Sequence[int]) -> SharedStates:
        """Room for the states of a rollout with sequences of these lengths."""
        return SharedStates(lengths, on_host=self.on_host)

    def context(
        self, role: str, part: StatesOfBatch, ids_BT: Tensor, prompts: SharedPrompts | None = None
    ) -> AbstractContextManager[None] | None:
        """The context for a forward of `role` over a micro-batch; None if the role runs whole.

        The forward starts from the kept states if those of all tokens are there; otherwise it runs
        whole, and its states are kept. With `prompts` the layers see each prompt once.
        """
        if role not in self.layers:
            return None
        if part.complete:
            states = part.read(ids_BT.shape, ids_BT.device)
            return self._skip(
                self.layers[role], states if prompts is None else prompts.once(states)
            )
        return self._keep(self.layers[role][self.count - 1], part, prompts)

    @contextmanager
    def _skip(self, layers: nn.ModuleList, hidden_BTD: Tensor) -> Iterator[None]:
        """Replace the shared layers: the last of them returns `hidden_BTD`, the others their input.

        The other layers keep their index, by which a model picks masks, windows and rotary angles.
        Hooks of the shared layers do not run, so that they are neither recomputed nor streamed.
        """
        lowest = {str(index): layers[index] for index in range(self.count)}
        states: list[list[Tensor]] = [[] for _ in lowest]
        states[-1].append(hidden_BTD)
        del hidden_BTD
        skipped = {
            name: SkippedLayer(layer, given, self.outputs)
            for (name, layer), given in zip(lowest.items(), states, strict=True)
        }
        with replaced(layers, skipped):
            yield

    @contextmanager
    def _keep(
        self, last: nn.Module, part: StatesOfBatch, prompts: SharedPrompts | None
    ) -> Iterator[None]:
        """Keep what the last shared layer returns."""

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.outputs = len(output) if isinstance(output, tuple) else None
            states = output[0] if isinstance(output, tuple) else output
            part.keep(states if prompts is None else prompts.each(states.detach()))

        handle = last.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def alone(self, role: str) -> Iterator[None]:
        """Inside the block the shared layers run and the upper ones do not."""
        layers = self.layers[role]
        upper = range(self.count, len(layers))
        skipped = {str(i): SkippedLayer(layers[i], [], self.outputs) for i in upper}
        with replaced(layers, skipped):
            yield

    @property
    def words(self) -> str:
        """Which layers they are."""
        return "layer 1" if self.count == 1 else f"layers 1 to {self.count}"

    def describe(self) -> str:
        """One line for the beginning of a run."""
        layers = next(iter(self.layers.values()))
        return f"{self.words} of {len(layers)} run once per rollout, for {', '.join(self.layers)}"


@contextmanager
def replaced(layers: nn.ModuleList, others: dict[str, SkippedLayer]) -> Iterator[None]:
    """Inside the block `others` stand at their numbers in `layers`."""
    before = {number: layers[int(number)] for number in others}
    # All at once: a signal cannot come between two layers.
    try:
        layers._modules.update(others)
        yield
    finally:
        layers._modules.update(before)


def frozen_layers(place: Place, base: Place) -> int:
    """Number of lowest layers that in `place` are the frozen weights of the base and nothing else.

    It is 0 if embeddings, or anything else outside the layers, train, are an adapter's, or are not
    the base's. `base` is a role on the base, whatever its adapter.
    """
    adapters = {id(p) for model in (place.model, base.model) for p in all_adapters(model)}
    own = {id(parameter) for parameter in place.trainable}
    if place.adapter is not None:
        own |= {id(p) for p in adapter_parameters(place.model, place.adapter)}

    def alike(here: Iterable[nn.Parameter], there: Iterable[nn.Parameter]) -> bool:
        ours, theirs = [id(p) for p in here], [id(p) for p in there]
        same = [i for i in ours if i not in adapters] == [i for i in theirs if i not in adapters]
        return same and own.isdisjoint(ours)

    mine, theirs = text_model(place.base), text_model(base.base)
    layers, others = find_layers(mine), find_layers(theirs)
    if not alike(outside(mine, layers), outside(theirs, others)):
        return 0
    for index, (layer, other) in enumerate(zip(layers, others, strict=True)):
        if not alike(layer.parameters(), other.parameters()):
            return index
    return len(layers)


def all_adapters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all adapters of a model."""
    names = model.peft_config if isinstance(model, PeftModel) else ()
    return [parameter for name in names for parameter in adapter_parameters(model, name)]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's kind if it has none."""
    return str(error).partition("\n")[0] or type(error).__name__


def outside(model: nn.Module, layers: nn.Module) -> list[nn.Parameter]:
    """The parameters of a text model that are not in its layers: embeddings, the last norm."""
    inside = {id(parameter) for parameter in layers.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in inside]


def find_shared_layers(
    roles: Roles, *, base: Role = "actor", on_host: bool = False
) -> SharedLayers | None:
    """The layers that roles share; None if that would save no pass.

    It saves one if two roles share layers, or a role that trains: scoring and every epoch of the
    update run it. A role that has no frozen layers runs whole.
    """
    places = dict(roles.places)
    if roles.shares_trunk:
        del places["critic"]  # it has no pass of its own
    depths = {role: frozen_layers(place, places[base]) for role, place in places.items()}
    sharing = [role for role, depth in depths.items() if depth]
    if sum(1 + bool(places[role].trainable) for role in sharing) < 2:
        return None
    layers = {role: find_layers(text_model(places[role].base)) for role in sharing}
    return SharedLayers(layers, min(depths[role] for role in sharing), on_host=on_host)


def share_layers(
    roles: Roles,
    input_ids_T: Sequence[int],
    *,
    base: Role = "actor",
    on_host: bool = False,
    packed: bool = False,
) -> None:
    """Set `roles.shared` to the layers that roles share, if there are any and the model allows it.

    A ragged batch runs once whole in each of these roles and once from kept states. If hidden
    states differ by more than rounding, or the model does not run with its lowest layers left out,
    all roles run whole, and a note says so.

    Args:
        input_ids_T: tokens to compare with, of any number.
        base: a role on the frozen base. With LoRA the actor is on it; with freeze and full, where
            the actor's weights train, the reference, unless that is a model of its own.
        on_host: keep the states in host memory.
        packed: whether micro-batches are packed.
    """
    shared = find_shared_layers(roles, base=base, on_host=on_host)
    if shared is None:
        return
    try:
        problem = compare_with_whole_pass(roles, shared, input_ids_T, packed=packed)
    except CANNOT_SKIP as error:
        problem = first_line(error)
    roles.shared = None if problem else shared
    if problem:
        kind = roles.base.config.model_type
        roles.notes.append(
            f"layers that roles share run anew in each pass: this model ({kind}) does not start "
            f"from kept hidden states ({problem[:120]})"
        )


@torch.no_grad()
def compare_with_whole_pass(
    roles: Roles, shared: SharedLayers, input_ids_T: Sequence[int], *, packed: bool
) -> str:
    """What is wrong with hidden states from kept ones, in words; empty if they are the same."""
    longest = (list(input_ids_T) * CHECKED_TOKENS)[:CHECKED_TOKENS]
    lengths = [CHECKED_TOKENS, CHECKED_TOKENS // 3, CHECKED_TOKENS // 2]
    sequences = Sequences(
        torch.tensor([longest] * len(lengths), device=roles.device),
        prompt_lengths=[1] * len(lengths),
        response_lengths=[length - 1 for length in lengths],
    )
    rows = range(len(lengths))
    roles.shared = None
    whole = make_batch(sequences, rows, packed=packed)
    expected = {role: hidden_states(roles, role, whole) for role in shared.layers}
    roles.shared = shared
    batch = make_batch(roles.with_states(sequences), rows, packed=packed)
    limit = LIMITS[roles.product_precision].log_ratio
    first = next(iter(shared.layers))  # its first pass keeps the states
    for role in (first, *shared.layers):
        found = hidden_states(roles, role, batch)
        error = relative_error(found, expected[role])
        if not error <= limit:
            return f"{role} off by {error:.2g}"
    return ""


def hidden_states(roles: Roles, role: str, batch: Batch) -> Tensor:
    """The last hidden states (N, D) of a micro-batch's tokens in a role, without padding."""
    with roles.use(role):
        return roles.hidden(**batch.inputs)[batch.mask_BT.bool()]
