"""vLLM's server: adapters are loaded by name, and prompts of token ids completed."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from fastppo.config.engine import TOKEN
from fastppo.errors import UserError
from fastppo.servers.backend import MOST_REQUESTS, Completion, Fault, Served, lora_rank
from fastppo.servers.client import Client, TransientError

OLDEST = (0, 11)  # before it, answers have no token ids
RETRIES = 3
LARGEST = 64 << 20  # bytes of an answer; a token takes about 200
FLAGS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora"


class Refusal(UserError):
    """The server has understood a request and refuses it; `reason` is what it says."""

    def __init__(self, message: str, status: int, reason: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class VLLMServer(Client):
    """A running vLLM server; every failure is one line that begins with its URL.

    Args:
        url: its address, without a path.
        timeout: seconds in which an attempt must have the whole answer.
        retries: number of attempts after the first.
        rank: of the adapters that are sent, for the flags that a message names.
    """

    sleeps = False

    def __init__(self, url: str, *, timeout: float, retries: int = RETRIES, rank: int = 8) -> None:
        super().__init__(
            f"vllm_server_base_url: {url}",
            url.rstrip("/"),
            timeout=timeout,
            retries=retries,
            token=TOKEN,
            cure=f"start it with {FLAGS} (docs/rollouts.md), or raise vllm_server_timeout",
            largest=LARGEST,
            wanted="a response's tokens",
        )
        self.flags = f"{FLAGS} --max-lora-rank {lora_rank(rank)}"
        self.words = f"vLLM at {self.url}"

    def status_error(self, status: int, answer: Any) -> Exception:
        """As for any server, but a refusal has the reason that vLLM gives."""
        if status not in (400, 404, 405, 422, 500):
            return super().status_error(status, answer)
        try:
            reason = reason_of(answer.read(1 << 16))
        except OSError:
            reason = ""
        if status == 500 and not reason:
            return TransientError(f"answers HTTP {status}")
        shown = f", {self.quote(reason, 300)}" if reason else ""
        return Refusal(f"{self.key}: refuses (HTTP {status}{shown})", status, reason)

    def ask_json(self, path: str, body: Any = None) -> dict[str, Any]:
        """The JSON object that the server answers."""
        answer = self.ask(body, path)
        try:
            found = json.loads(answer)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UserError(
                f"{self.key}: answers {self.quote(answer)} to {path}, which is no JSON object; "
                "name a vLLM server"
            )
        return found

    def check_version(self) -> str:
        """Its version; raises UserError for a server that is too old, or is no vLLM server."""
        try:
            version = str(self.ask_json("/version").get("version", ""))
        except Refusal as error:
            raise UserError(
                f"{self.key}: has no /version (HTTP {error.status}), so it is no vLLM server; name "
                "the address of one"
            ) from None
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise UserError(
                f"{self.key}: is vLLM {self.quote(version)}, whose answers have no token ids; it "
                f"needs {oldest} or newer"
            )
        self.words = f"vLLM {version} at {self.url}"
        return version

    def served(self) -> Served:
        """The model that the server was started with."""
        models = self.ask_json("/v1/models").get("data")
        for model in models if isinstance(models, list) else ():
            if isinstance(model, dict) and model.get("parent") is None and "id" in model:
                length = model.get("max_model_len")
                return Served(str(model["id"]), length if isinstance(length, int) else None)
        raise UserError(f"{self.key}: its /v1/models names no model; start it with {self.flags}")

    def load(self, name: str, folder: Path) -> None:
        """Load the adapter in `folder` under a name that no adapter has had before."""
        try:
            self.ask({"lora_name": name, "lora_path": str(folder)}, "/v1/load_lora_adapter")
        except Refusal as error:
            if "already been loaded" in error.reason:  # by an attempt whose answer was lost
                return
            if "adapter" in error.reason.lower() and error.status == 404:
                raise UserError(
                    f"{self.key}: does not find the adapter in {folder}; set vllm_adapter_dir to a "
                    "folder that server and trainer both see under the same path"
                ) from None
            raise UserError(f"{error}, the adapter; start it with {self.flags}") from None

    def unload(self, name: str) -> None:
        """Forget an adapter."""
        self.ask({"lora_name": name}, "/v1/unload_lora_adapter")

    def sleep(self) -> None:
        """A server keeps its memory."""

    def wake(self) -> None:
        """A server has its memory."""

    def cure_of(self, fault: Fault, dtype: str) -> str:
        """The flags to start it with, or the model to serve."""
        return {
            "base": "serve the model that trains: the same weights with the same adapters merged, "
            f"quantisation, vocabulary and rope scaling, in the same dtype (--dtype {dtype})",
            "adapter": f"start it with {self.flags} --dtype {dtype}",
            "raw": "start it with --logprobs-mode processed_logprobs",
            "room": "raise its --max-model-len",
        }[fault]

    def close(self, adapter: str | None) -> None:
        """Forget the run's adapter, without waiting long for a server that may be gone."""
        self.retries, self.timeout = 0, min(self.timeout, 5.0)
        if adapter is not None:
            with suppress(UserError):
                self.unload(adapter)

    def complete(self, body: dict[str, Any]) -> Completion:
        """The response to one prompt.

        Raises:
            UserError: the answer is from another model than the one asked for, or is not whole.
        """
        answer = self.ask_json("/v1/completions", body)
        if answer.get("model") != body["model"]:
            raise UserError(
                f"{self.key}: answers with {self.quote(str(answer.get('model')))} where "
                f"{body['model']} was asked for, so the rollout is refused; let no proxy or second "
                "API server stand between"
            )
        try:
            (choice,) = answer["choices"]
            ids, reason = choice["token_ids"], choice["finish_reason"]
            logprobs = choice["logprobs"]["token_logprobs"]
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.key}: its answer has no token ids or log-probs; it needs vLLM "
                f"{'.'.join(map(str, OLDEST))} or newer"
            ) from None
        if not are_numbers(ids, int) or not are_numbers(logprobs, int | float):
            raise UserError(f"{self.key}: its token ids or log-probs are no numbers")
        if not ids or len(ids) != len(logprobs):
            raise UserError(
                f"{self.key}: answers {len(ids)} tokens with {len(logprobs)} log-probs; there "
                "should be one for each"
            )
        return Completion(ids, [float(x) for x in logprobs], str(reason))

    def complete_all(self, bodies: Sequence[dict[str, Any]]) -> list[Completion]:
        """The responses to all prompts; each is a request, as a request has one seed.

        The first failure ends all. The threads are daemons: a signal need not wait for them.
        """
        found: dict[int, Completion] = {}
        failures: list[BaseException] = []
        numbers, stopped = count(), threading.Event()

        def work() -> None:
            while not stopped.is_set() and (number := next(numbers)) < len(bodies):
                try:
                    found[number] = self.complete(bodies[number])
                except BaseException as error:  # raised again in the main thread
                    failures.append(error)
                    stopped.set()

        size = min(len(bodies), MOST_REQUESTS)
        threads = [threading.Thread(target=work, daemon=True) for _ in range(size)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            stopped.set()
        if failures:
            raise failures[0]
        return [found[number] for number in range(len(bodies))]


def are_numbers(values: Any, kind: Any) -> bool:
    """Whether `values` is a list of finite numbers."""
    return isinstance(values, list) and all(
        isinstance(x, kind) and not isinstance(x, bool) and math.isfinite(x) for x in values
    )


def reason_of(answer: bytes) -> str:
    """What an error of the server says: vLLM's `error.message`, or FastAPI's `detail`."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(found, dict):
        return ""
    inner = found.get("error")
    reason = inner.get("message") if isinstance(inner, dict) else found.get("message")
    return " ".join(str(reason or found.get("detail") or "").split())
