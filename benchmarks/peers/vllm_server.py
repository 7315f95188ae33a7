"""vLLM's server for CPUs in its own environment, on loopback, for as long as a block lasts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from benchmarks.peers.environments import VLLM

HOST = "127.0.0.1"
STARTS_IN, ENDS_IN = 600, 60  # seconds, at most


class NotStarted(Exception):
    """The server is not there, and why."""


@contextmanager
def serving(
    model: Path, log: Path, *, rank: int, length: int, flags: Sequence[str] = ()
) -> Iterator[str]:
    """The address of a server of `model` in float32; it ends with the block.

    Args:
        log: the file that has what the server prints.
        rank: `--max-lora-rank`.
        length: tokens of the longest prompt and response together.
        flags: what else it is started with.

    Raises:
        NotStarted: its environment is not there, it ended, or it did not answer in time.
    """
    if not VLLM.python.exists():
        raise NotStarted(
            "vLLM's environment is not here; run: python -m benchmarks.peers.environments vllm"
        )
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        port = str(taken.getsockname()[1])
    # `vllm serve` asks for the metadata of a package `vllm`, which this build is not.
    command = [str(VLLM.python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--enable-lora", "--max-loras", "1"]
    command += ["--max-lora-rank", str(rank), "--max-model-len", str(length)]
    command += ["--logprobs-mode", "processed_logprobs", "--dtype", "float32"]
    # With LoRA on it compiles nothing on a CPU.
    command += ["--host", HOST, "--port", port, "--enforce-eager", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as printed:
        process = subprocess.Popen(
            command,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        url = f"http://{HOST}:{port}"
        wait_for(url, process, log)
        yield url
    finally:
        end(process)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server answers."""
    until, opener = time.monotonic() + STARTS_IN, build_opener(ProxyHandler({}))
    while process.poll() is None and time.monotonic() < until:
        try:
            with opener.open(f"{url}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    raise NotStarted(f"vLLM's server did not start:\n{log.read_text(errors='replace')[-4000:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End the server and its processes, which are a group of their own."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(ENDS_IN)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
