"""A small package `vllm` that samples in the process, with faults that can be asked for.

Its log-probs are those of a real model; fields and arguments that vLLM does not have are errors.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fastppo.servers import in_process
from tests.vllm_server import Policies

ARGUMENTS = {
    *("model", "revision", "download_dir", "trust_remote_code", "dtype", "max_model_len", "seed"),
    *("enable_lora", "max_loras", "max_lora_rank", "logprobs_mode", "generation_config"),
    *("gpu_memory_utilization", "enable_sleep_mode", "tensor_parallel_size", "use_tqdm_on_load"),
}


@dataclass
class SamplingParams:
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    ignore_eos: bool
    stop_token_ids: list[int]
    stop: list[str]
    skip_special_tokens: bool
    logprobs: int
    seed: int
    detokenize: bool


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class EngineDeadError(Exception):
    """vLLM's own, where its child process has ended."""


class Package(Policies):
    """The package; `events` are the calls, in their order, and `arguments` those of LLM."""

    def __init__(self, model_dir: Path) -> None:
        super().__init__(model_dir)
        self.events: list[Any] = []
        self.arguments: dict[str, Any] = {}
        self.ids: dict[int, str] = {}
        self.asleep = self.shut = False
        self.released = threading.Event()

    def start(self, **arguments: Any) -> Package:
        assert set(arguments) <= ARGUMENTS, set(arguments) - ARGUMENTS
        self.arguments = arguments
        self.released = threading.Event()
        self.ids, self.shut = {}, False  # another engine's than the last run's
        self.hang("start")
        self.llm_engine = SimpleNamespace(
            add_lora=self.add_lora,
            remove_lora=self.remove_lora,
            engine_core=SimpleNamespace(shutdown=self.shutdown),
        )
        return self

    def add_lora(self, adapter: LoRARequest) -> bool:
        assert not self.asleep
        assert adapter.lora_int_id not in self.ids
        self.hang("add_lora")
        self.ids[adapter.lora_int_id] = adapter.lora_name
        self.add(adapter.lora_name, Path(adapter.lora_path))
        return True

    def remove_lora(self, number: int) -> bool:
        self.unloaded.append(self.ids[number])
        return True

    def shutdown(self, timeout: float) -> None:
        assert timeout > 0
        self.shut = True
        self.released.set()

    def hang(self, where: str) -> None:
        """Where that is asked for: no answer until it is shut down, as a call of a lost child."""
        after = self.faults.hangs_after
        late = after is not None and self.events.count("generate") > after
        if self.faults.hangs == where or (late and where == "generate"):
            self.released.wait()
            raise EngineDeadError("EngineCore encountered an issue.")

    def generate(
        self,
        prompts: list[dict[str, Any]],
        params: list[SamplingParams],
        *,
        lora_request: list[LoRARequest | None],
        use_tqdm: bool,
    ) -> list[Any]:
        assert not self.asleep
        assert not use_tqdm
        self.events.append("generate")
        self.hang("generate")
        fails = self.faults.fails_after
        if fails is not None and self.events.count("generate") > fails:
            raise EngineDeadError("EngineCore encountered an issue.\nIts traceback")
        return [self.one(*each) for each in zip(prompts, params, lora_request, strict=True)]

    def one(self, prompt: dict[str, Any], params: SamplingParams, adapter: Any) -> Any:
        run = self.answering("" if adapter is None else adapter.lora_name)
        body = {**vars(params), "prompt": prompt["prompt_token_ids"]}
        ids, logprobs, reason = self.draw(run, body)
        steps = [{t: SimpleNamespace(logprob=x)} for t, x in zip(ids, logprobs, strict=True)]
        if self.faults.stale == "said" and adapter is not None:
            adapter = LoRARequest(run, 1, "elsewhere")
        response = SimpleNamespace(token_ids=ids, logprobs=steps, finish_reason=reason)
        return SimpleNamespace(outputs=[response], lora_request=adapter)

    def sleep(self, level: int) -> None:
        self.events.append(("sleep", level))
        self.asleep = True

    def wake_up(self) -> None:
        self.events.append("wake")
        self.asleep, self.faults.other_base = False, self.faults.forgets


def install(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """The package in place of vLLM, with the metadata of its version 0.32.0."""
    made = Package(model_dir)
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request")}
    modules["vllm"].__dict__.update(LLM=made.start, SamplingParams=SamplingParams)
    modules["vllm.lora.request"].__dict__.update(LoRARequest=LoRARequest)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = SimpleNamespace(version="0.32.0", requires=["transformers<5.20.0,>=5.16.1", "numpy"])
    monkeypatch.setattr(in_process, "installed", lambda: found)
    monkeypatch.setattr(in_process, "version", lambda _: "5.19.0")
    return made
