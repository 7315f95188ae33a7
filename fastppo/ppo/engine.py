"""Rollouts by vLLM, which is sent the actor's adapter whenever that has changed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastppo.errors import TrainingStopped, UserError
from fastppo.ppo.sampling import Answer, Stops
from fastppo.run import durable
from fastppo.run.save import save_weights
from fastppo.seeds import seed_of
from fastppo.servers.backend import Backend, Completion

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.models.build import Roles
    from fastppo.ppo.sampling import Sampling
    from fastppo.templates import Template
    from fastppo.types import Prompt

WEIGHTS = "adapter_model.safetensors"
MEMORY = Path("/dev/shm")


class EngineLost(TrainingStopped):
    """The engine failed after it had worked; the steps that are done can be saved."""


@dataclass(frozen=True)
class Version:
    """The adapter as it is in the engine: its name there, its folder, the digest of its weights."""

    name: str
    folder: Path
    digest: str


class Engine:
    """Samples responses by vLLM.

    Each version of the adapter has a new name and a new folder: vLLM keeps keys and values of
    prompts by the adapter's name and path, and under an old name it would reuse those of an earlier
    policy. A version's folder is deleted once the next one is in.

    Args:
        server: vLLM, running as a server or beside the trainer.
        parent: the folder in which the versions are saved, in a folder of this run.
        shared: whether other users may read that one, as a server on another host may be one.
    """

    def __init__(self, server: Backend, parent: Path, *, shared: bool = False) -> None:
        self.server, self.model = server, server.served()
        self.run = uuid.uuid4().hex[:8]
        self.folder = parent / f"fastppo-{self.run}"
        self.folder.mkdir(mode=0o777 if shared else 0o700)
        self.delete = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.current: Version | None = None
        self.sent = 0
        self.words = ""  # for the first lines of a run

    def serves(self, roles: Roles) -> bool:
        """Whether the active role is the actor, or the base that the engine has."""
        place = roles.place
        return place.model is roles.model and place.adapter in (None, "default")

    def send(self, model: Any) -> str:
        """The engine's name of the adapter as it is now, which is loaded unless it is there."""
        name = f"fastppo-{self.run}-{self.sent + 1}"
        folder = self.folder / name
        save_weights(model, folder)
        digest = durable.sha256(folder / WEIGHTS)
        if self.current is not None and self.current.digest == digest:
            shutil.rmtree(folder)
            return self.current.name
        self.sent += 1
        self.server.load(name, folder)
        self.drop()
        self.current = Version(name, folder, digest)
        return name

    def drop(self) -> None:
        """Unload the current version and delete its folder."""
        if self.current is not None:
            with contextlib.suppress(UserError):  # the next request finds out if it is gone
                self.server.unload(self.current.name)
            shutil.rmtree(self.current.folder, ignore_errors=True)
            self.current = None

    def close(self) -> None:
        """Unload the adapter, delete the run's folder, and end what the run has started."""
        self.server.close(None if self.current is None else self.current.name)
        self.current = None
        self.delete()

    def complete(
        self,
        roles: Roles,
        prompts: Sequence[Prompt],
        *,
        sampling: Sampling,
        seeds: Sequence[int],
        stop_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
    ) -> list[Completion]:
        """The active role's response to each prompt, by a request with a seed of its own."""
        adapter = roles.place.adapter is not None
        model = self.send(roles.model) if adapter else self.model.name
        common = request_fields(sampling, stop_ids, stop_strings)
        return self.server.complete_all(
            [
                {**common, "model": model, "prompt": prompt.ids, "seed": seed}
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
        )

    def sample(
        self,
        roles: Roles,
        prompts: list[Prompt],
        *,
        sampling: Sampling,
        template: Template,
        tokenizer: Any,
        seed: int,
        first_row: int,
    ) -> list[Answer]:
        """The active role's response to each prompt; then the engine leaves the device's memory.

        Raises:
            EngineLost: the engine did not answer, or not with this version of the policy.
        """
        try:
            self.server.wake()
            found = self.complete(
                roles,
                prompts,
                sampling=sampling,
                seeds=[seed_of(seed, "row", first_row + row) for row in range(len(prompts))],
                stop_ids=template.stop_ids,
                stop_strings=template.stop_strings,
            )
            self.server.sleep()
            stops = Stops(sampling, template, tokenizer)
            return [
                self.answer(prompt, each, stops, roles.device)
                for prompt, each in zip(prompts, found, strict=True)
            ]
        except UserError as error:
            raise EngineLost(str(error)) from None

    def answer(
        self, prompt: Prompt, found: Completion, stops: Stops, device: torch.device
    ) -> Answer:
        """The response up to its first stop, as the trainer's own sampler would end it."""
        ids, terminated = found.ids, found.finish_reason == "stop"
        lengths = list(range(1, len(ids) + 1))
        if stops.strings is None:  # only a token can end it
            lengths = [next((n for n in lengths if ids[n - 1] in stops.ids), len(ids))]
        ends = stops.ended([(prompt.ids, ids[:n]) for n in lengths])
        for n, ended in zip(lengths, ends, strict=True):
            if ended is not None:
                ids, terminated = ids[:n], ended
                break
        else:
            if not terminated:
                raise UserError(
                    f"{self.server.key}: ended a response after {len(ids)} of "
                    f"{stops.sampling.max_new_tokens} tokens; {self.server.cure_of('room', '')}"
                )
        logprob_N = torch.tensor(found.logprobs[: len(ids)], dtype=torch.float32, device=device)
        return Answer(ids, terminated, logprob_N)


def request_fields(
    sampling: Sampling, stop_ids: Sequence[int] = (), stop_strings: Sequence[str] = ()
) -> dict[str, Any]:
    """A request's fields but for its model, prompt and seed.

    Everything that vLLM has a default for is named: by itself a server takes the model's
    generation_config.json.
    """
    return {
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "temperature": sampling.temperature if sampling.do_sample else 0.0,
        "top_p": sampling.top_p if sampling.do_sample else 1.0,
        "top_k": sampling.top_k if sampling.do_sample else 0,
        "min_p": 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,  # stop_token_ids has it
        "stop_token_ids": list(stop_ids),
        "stop": list(stop_strings),
        "skip_special_tokens": False,  # a stop string may have one
        "add_special_tokens": False,
        "logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,
    }


def adapter_folder(config: Config, size: int) -> Path:
    """The folder in which versions of the adapter, of `size` bytes, are saved for the engine.

    Without `vllm_adapter_dir` it is in memory if there is room: a container's /dev/shm may have
    64 MiB, and two versions are there at a time.
    """
    if config.vllm_adapter_dir is None:
        room = shutil.disk_usage(MEMORY).free if MEMORY.is_dir() else 0
        return MEMORY if room > 4 * size else Path(tempfile.gettempdir())
    folder = Path(config.vllm_adapter_dir).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{config.source}: vllm_adapter_dir: {folder}: {error.strerror}; choose another"
        ) from None
    return folder


@contextlib.contextmanager
def closing(engine: Engine | None) -> Iterator[None]:
    """At the end of the block the engine forgets the run's adapter."""
    try:
        yield
    finally:
        if engine is not None:
            engine.close()
