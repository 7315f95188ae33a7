"""The lowest layers of a reward model, in which nothing trains: run once a text, not once an epoch.

With `lora_layers` or `freeze` they give the same hidden states in every epoch. Before training, one
pass over all texts writes these states to a temporary file, from which every later pass starts.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor, nn

from fastppo.models.load import text_model
from fastppo.models.rounding import LIMITS, product_precision, relative_error
from fastppo.models.shared_layers import (
    CANNOT_SKIP,
    CHECKED_TOKENS,
    SharedLayers,
    first_line,
    outside,
)
from fastppo.models.shared_states import SharedStates, StatesOfBatch
from fastppo.offload.activations import find_layers
from fastppo.rm.pairs import pad

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.rm.model import RewardModel
    from fastppo.rm.pairs import Pairs
    from fastppo.run.world import World

Text = tuple[int, ...]
ROLE: Final = "reward"
LEAST_PASSES: Final = 2
DISK_SHARE: Final = 0.25  # the most of the free disk that the states take
MIB: Final = 2**20


class LowerLayers:
    """The lowest layers, and what they give for each text.

    Args:
        shared: which layers they are.
        texts: the tokens of prompt and answer, each once; best with similar lengths together.
        dtype: the dtype of the residual stream.
        size: numbers of a hidden state.
        folder: where the temporary file goes.
    """

    def __init__(
        self,
        shared: SharedLayers,
        texts: Sequence[Text],
        *,
        dtype: torch.dtype,
        size: int,
        folder: Path,
    ) -> None:
        self.shared, self.texts = shared, texts
        self.dtype, self.size, self.folder = dtype, size, folder
        self.number = {text: i for i, text in enumerate(texts)}
        self.states: SharedStates | None = None  # of all texts, once they are written

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return sum(map(len, self.texts)) * self.size * self.dtype.itemsize

    def describe(self) -> str:
        """One line for the beginning of a run."""
        layers = self.shared.layers[ROLE]
        return (
            f"{self.shared.words} of {len(layers)} run once, before the first epoch: their states "
            f"take {self.nbytes / MIB:,.0f} MiB in a temporary file in {self.folder}"
        )

    def context(self, input_ids_BT: Tensor, mask_BT: Tensor) -> AbstractContextManager[None]:
        """The context for a forward: it starts from the states of these texts if all are known."""
        if self.states is None:
            return nullcontext()
        lengths = mask_BT.sum(1).tolist()
        rows = zip(input_ids_BT.tolist(), lengths, strict=True)
        numbers = [self.number.get(tuple(ids[:n]), -1) for ids, n in rows]
        if -1 in numbers:
            return nullcontext()
        part = part_of_batch(self.states, numbers, lengths, input_ids_BT)
        return self.shared.context(ROLE, part, input_ids_BT) or nullcontext()

    @torch.no_grad()
    def write(self, model: RewardModel, rows: int) -> None:
        """Run the layers on all texts, `rows` of them at a time, in their order."""
        model.eval()
        with tempfile.TemporaryFile(dir=self.folder) as file:  # gone with the run, however it ends
            for start in range(0, len(self.texts), rows):
                states_ND = self.run(model, self.texts[start : start + rows])
                file.write(states_ND.contiguous().view(torch.uint8).numpy())
            file.flush()
            raw = torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="c"))
        states = SharedStates([len(text) for text in self.texts], on_host=True)
        states.state_ND = raw.view(self.dtype).view(-1, self.size)
        states.known = [True] * len(self.texts)
        self.states = states

    def run(self, model: RewardModel, texts: Sequence[Text]) -> Tensor:
        """The states of these texts, (N, D), by a pass of the lowest layers alone."""
        ids_BT, mask_BT = batch_of(texts, model.head.weight.device)
        lengths = [len(text) for text in texts]
        states = SharedStates(lengths, on_host=True)
        part = part_of_batch(states, range(len(texts)), lengths, ids_BT)
        keeping = self.shared.context(ROLE, part, ids_BT) or nullcontext()
        with self.shared.alone(ROLE), keeping:
            model(ids_BT, mask_BT)
        assert states.state_ND is not None
        return states.state_ND


def part_of_batch(
    states: SharedStates, rows: Sequence[int], lengths: Sequence[int], ids_BT: Tensor
) -> StatesOfBatch:
    """The states of a right-padded batch."""
    width = ids_BT.shape[1]
    return states.part(rows, lengths, range(0, ids_BT.numel(), width), ids_BT.numel())


def batch_of(texts: Sequence[Text], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T), padded with any token, as it is masked."""
    ids_BT, mask_BT = pad(texts, pad_id=texts[0][0]).values()
    return ids_BT.to(device), mask_BT.to(device)


def frozen_lowest_layers(model: nn.Module) -> int:
    """How many layers, from the first, give the same in every epoch, as nothing before them trains.

    It is 0 if embeddings or anything else outside the layers train.
    """
    text = text_model(model)
    layers = find_layers(text)
    if any(parameter.requires_grad for parameter in outside(text, layers)):
        return 0
    trains = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    return trains.index(True) if True in trains else 0


def passes_over(config: Config, pairs: int) -> float:
    """How many epochs the training has."""
    if config.max_steps <= 0:
        return config.num_train_epochs
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return config.max_steps * step / max(pairs, 1)


def find_lower_layers(
    config: Config, model: RewardModel, train: Pairs, held_out: Pairs, world: World
) -> tuple[LowerLayers | None, list[str]]:
    """The layers to run once, or None; and a note if they are run in each epoch all the same."""
    count = frozen_lowest_layers(model.model)
    wanted = config.keep_lower_states and passes_over(config, len(train)) >= LEAST_PASSES
    if not (wanted and count):
        return None, []
    shared = SharedLayers({ROLE: find_layers(text_model(model.model))}, count, on_host=True)
    every = f"{shared.words} {'runs' if count == 1 else 'run'} in every epoch:"
    if world.size > 1:
        return None, [f"{every} only a run of one process keeps their states"]
    if config.quantization_bit == 8:
        return None, [f"{every} the base is in 8 bits, whose products depend on the batch"]
    texts = {
        (*pair.prompt_ids, *answer)
        for pair in (*train.pairs, *held_out.pairs)
        for answer in (pair.chosen_ids, pair.rejected_ids)
    }
    try:
        states_ND, problem = compare(model, shared, max(texts, key=len))
    except CANNOT_SKIP as error:
        problem = first_line(error)
    if problem:
        return None, [f"{every} {problem[:120]}"]
    folder = Path(config.output_dir)
    in_order = sorted(texts, key=lambda text: (len(text), text))
    dtype, size = states_ND.dtype, states_ND.shape[1]
    found = LowerLayers(shared, in_order, dtype=dtype, size=size, folder=folder)
    place = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if found.nbytes > DISK_SHARE * free:
        return None, [
            f"{every} their states would take {found.nbytes / MIB:,.0f} MiB, and "
            f"{folder} has {free / MIB:,.0f} MiB free, of which they may take a quarter"
        ]
    return found, []


@torch.no_grad()
def compare(model: RewardModel, shared: SharedLayers, text: Text) -> tuple[Tensor, str]:
    """The states of a ragged batch behind the layers; and what is wrong with them, in words.

    A pass from the states must give what the whole pass gives, and the layers must give the same in
    training: experts with noise in their router do not.
    """
    longest = (text * CHECKED_TOKENS)[:CHECKED_TOKENS]
    texts = [longest, longest[: CHECKED_TOKENS // 3], longest[: CHECKED_TOKENS // 2]]
    device = model.head.weight.device
    ids_BT, mask_BT = batch_of(texts, device)
    lengths = [len(own) for own in texts]
    live_BT = mask_BT.bool()

    def run(part: StatesOfBatch, training: bool = False) -> Tensor:
        """The first pass over a part runs whole and keeps its states; the next starts there."""
        model.train(training)
        with shared.context(ROLE, part, ids_BT) or nullcontext():
            return model.hidden(ids_BT, mask_BT)[live_BT]

    evaluated, trained = (
        part_of_batch(SharedStates(lengths, on_host=True), range(len(texts)), lengths, ids_BT)
        for _ in range(2)
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        run(trained, training=True)
    whole_ND, found_ND = run(evaluated), run(evaluated)
    in_eval, in_training = evaluated.states.state_ND, trained.states.state_ND
    assert in_eval is not None
    assert in_training is not None
    limit = LIMITS[product_precision(device, autocast=model.autocast)].log_ratio
    off = relative_error(found_ND, whole_ND)
    if not off <= limit:
        return in_eval, f"a pass from their states is off by {off:.2g}"
    off = relative_error(in_training, in_eval)
    if not off <= limit:
        return in_eval, f"in training they give something else (off by {off:.2g})"
    return in_eval, ""
