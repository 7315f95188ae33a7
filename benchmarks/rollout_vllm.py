"""vLLM as a contender of `rollout`: started as `vllm_mode: colocate` does, with the adapter loaded.

On a CPU vLLM 0.32 compiles nothing while LoRA is on, so it is timed without compilation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastppo import toy
from fastppo.config import config_from_dict
from fastppo.errors import UserError
from fastppo.models.roles import Roles
from fastppo.ppo.engine import request_fields
from fastppo.ppo.sampling import Sampling
from fastppo.servers.in_process import VLLMInProcess, check_packages
from fastppo.types import Prompt

NAME = "vllm"
LENGTH = 512  # tokens of a prompt and its response
MEMORY = 0.25  # of the machine's


def why_left_out(quick: bool) -> str | None:
    """Why vLLM is not timed here, or None."""
    if quick:
        return "its kernels for CPUs take no heads as narrow as the toy's"
    try:
        check_packages()
    except UserError as error:
        return str(error)
    return None


@contextmanager
def started(roles: Roles, model: Path) -> Iterator[Callable[[list[Prompt], list[int]], int]]:
    """vLLM with this policy; a call samples a rollout and returns the number of its tokens."""
    peft: Any = roles.place.model
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peft.save_pretrained(folder / "adapter")
        if not (model / "model.safetensors").is_file():  # random weights
            model = folder / "model"
            weights = {
                key.removeprefix("base_model.model.").replace(".base_layer", ""): weight
                for key, weight in peft.state_dict().items()
                if "lora_" not in key
            }
            peft.get_base_model().save_pretrained(model, state_dict=weights)
            toy.byte_tokenizer().save_pretrained(model)
        vllm = VLLMInProcess(settings(model), rank=8, length=LENGTH, dtype="float32")
        try:
            vllm.load("policy", folder / "adapter")
            yield lambda prompts, lengths: sample(vllm, prompts, lengths)
        finally:
            vllm.close("policy")


def settings(model: Path) -> Any:
    """The keys of a run that say how vLLM is started."""
    return config_from_dict(
        {
            "stage": "ppo",
            "model_name_or_path": str(model),
            "reward_model": "fastppo.toy:vowels",
            "reward_model_type": "function",
            "dataset": "none",
            "output_dir": "none",
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": MEMORY,
        }
    )


def sample(vllm: VLLMInProcess, prompts: list[Prompt], lengths: list[int]) -> int:
    """A rollout of these lengths; vLLM schedules all of it, as it does for the trainer."""
    bodies = [
        {**request_fields(Sampling(n)), "model": "policy", "prompt": prompt.ids, "seed": seed}
        for seed, (prompt, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    tokens = sum(len(each.ids) for each in vllm.complete_all(bodies))
    assert tokens == sum(lengths), f"{tokens} of {sum(lengths)} tokens"
    return tokens
