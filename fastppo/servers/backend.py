"""What the trainer asks of vLLM, which runs as a server or beside the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)  # of `--max-lora-rank`
MOST_REQUESTS: Final = 256  # at a time; vLLM's own limit of sequences in a batch
# What the comparison with the trainer, or a response, may show to be wrong.
Fault = Literal["base", "adapter", "raw", "room"]


@dataclass(frozen=True)
class Served:
    """The model that vLLM has loaded."""

    name: str
    max_length: int | None  # tokens of prompt and response; None if it does not say


@dataclass(frozen=True)
class Completion:
    """A response: its tokens, the sampler's log-prob of each, and why it ended."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop" or "length"


def lora_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` that an adapter of this rank fits into."""
    return next((size for size in RANKS if size >= rank), RANKS[-1])


class Backend(Protocol):
    """A vLLM that samples; every failure is a UserError, one line that begins with `key`.

    Attributes:
        key: the setting that says where it runs.
        words: what it is, for the first lines of a run.
        sleeps: whether it leaves the device's memory between two rollouts.
    """

    key: str
    words: str
    sleeps: bool

    def served(self) -> Served:
        """The model that it has loaded."""

    def load(self, name: str, folder: Path) -> None:
        """Load the adapter in `folder` under a name that no adapter has had before."""

    def unload(self, name: str) -> None:
        """Forget an adapter."""

    def complete_all(self, bodies: Sequence[dict[str, Any]]) -> list[Completion]:
        """The response to each request, whose fields are those of vLLM's /v1/completions.

        Raises:
            UserError: a response is from another model than the one asked for, or is not whole.
        """

    def sleep(self) -> None:
        """Leave the device's memory, if `sleeps`."""

    def wake(self) -> None:
        """Take the device's memory again after `sleep`."""

    def cure_of(self, fault: Fault, dtype: str) -> str:
        """What a user does about a fault; `dtype` is the trainer's."""

    def close(self, adapter: str | None) -> None:
        """At the end of a run: forget this adapter, and end what the run has started."""
