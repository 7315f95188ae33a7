"""A small server on this machine that speaks vLLM's protocol, with faults that can be asked for.

Its log-probs are those of a real model: the folder's base with the adapter of the name asked for.
"""

from __future__ import annotations

import json
import threading
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.reward_server import running


class Faults:
    """What is wrong with the server; nothing by default."""

    version = "0.32.0"
    raw = False  # log-probs before temperature
    without_adapters = False  # adapters are accepted and not run
    no_lora_route = False  # VLLM_ALLOW_RUNTIME_LORA_UPDATING is not set
    stale: str | None = None  # "said": an older version, named; "hidden": under the new name
    fails_after: int | None = None  # completions, then HTTP 500
    max_model_len = 512
    key: str | None = None
    other_base = False  # its weights are not the trainer's
    overshoots = 0  # tokens sampled beyond a stop
    forgets = False  # its weights are others after it has slept
    hangs: str | None = None  # "start", "generate" or "add_lora", which then never answers
    hangs_after: int | None = None  # completions, then it never answers


class Policies:
    """A base and the adapters on it that were loaded, whose log-probs are real.

    `loaded` and `folders` are the names and paths of all adapters, `unloaded` names of those that
    were given up.
    """

    def __init__(self, model_dir: Path) -> None:
        self.base: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self.model: Any = None
        self.faults, self.lock = Faults(), threading.Lock()
        self.loaded: list[str] = []
        self.folders: list[Path] = []
        self.unloaded: list[str] = []

    def add(self, name: str, folder: Path) -> None:
        assert name not in self.loaded
        self.folders.append(folder)
        with self.lock:
            if self.model is None:
                self.model = PeftModel.from_pretrained(self.base, folder, adapter_name=name)
            else:
                self.model.load_adapter(folder, adapter_name=name)
            self.model.eval()
        self.loaded.append(name)

    def answering(self, name: str) -> str:
        """The policy that answers for a name: an older one, where that fault is asked for."""
        stale = self.faults.stale and name in self.loaded and len(self.loaded) > 3
        return self.loaded[-2] if stale else name

    @torch.no_grad()
    def draw(self, run: str, body: dict[str, Any]) -> tuple[list[int], list[float], str]:
        generator = torch.Generator().manual_seed(body["seed"])
        ids, logprobs, reason = list[int](), list[float](), "length"
        prompt, over = body["prompt"], self.faults.overshoots
        while len(ids) < body["max_tokens"]:
            logits_V = self.logits(run, [*prompt, *ids])
            scores_V = logits_V / body["temperature"]
            token = int(torch.multinomial(scores_V.softmax(-1), 1, generator=generator))
            shown_V = logits_V if self.faults.raw else scores_V
            ids.append(token)
            logprobs.append(float(shown_V.log_softmax(-1)[token]))
            if reason == "stop" or token in body["stop_token_ids"]:
                reason, over = "stop", over - 1
                if over < 0:
                    break
        return ids, logprobs, reason

    def logits(self, run: str, ids: list[int]) -> torch.Tensor:
        inputs = torch.tensor([ids])
        if self.model is None:
            out_V = self.base(inputs).logits[0, -1]
        elif run not in self.loaded or self.faults.without_adapters:
            with self.model.disable_adapter():
                out_V = self.model(inputs).logits[0, -1]
        else:
            self.model.set_adapter(run)
            out_V = self.model(inputs).logits[0, -1]
        return 1.1 * out_V if self.faults.other_base else out_V


class Server(Policies, ThreadingHTTPServer):
    """Answers as vLLM's API server does; `seen` are the requests."""

    daemon_threads = True

    def __init__(self, model_dir: Path) -> None:
        Policies.__init__(self, model_dir)
        ThreadingHTTPServer.__init__(self, ("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []

    def handle_error(self, *_: Any) -> None:
        pass  # a client that hung up

    def load(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, folder = body["lora_name"], Path(body["lora_path"])
        assert not body.get("load_inplace")
        if name in self.loaded:
            return 400, error(f"The lora adapter '{name}' has already been loaded.")
        if not (folder / "adapter_config.json").is_file():
            return 404, error(f"Loading lora {name} failed: No adapter found for {folder}")
        self.add(name, folder)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.unloaded.append(body["lora_name"])
        return 200, "Success"

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["model"]
        if name != "base" and name not in self.loaded:
            return 404, error(f"The model `{name}` does not exist.")
        if self.faults.fails_after is not None and len(self.seen) > self.faults.fails_after:
            return 500, error("EngineCore encountered an issue.")
        run = self.answering(name)
        with self.lock:
            ids, logprobs, reason = self.draw(run, body)
        choice = {
            "index": 0,
            "text": "",
            "finish_reason": reason,
            "token_ids": ids,
            "logprobs": {"token_logprobs": logprobs, "tokens": [""] * len(ids)},
        }
        said = run if self.faults.stale == "said" else name
        return 200, {"id": "x", "object": "text_completion", "model": said, "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def answer(self, status: int, body: Any) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def allowed(self) -> bool:
        self.server.headers.append(dict(self.headers))
        key = self.server.faults.key
        return key is None or self.headers.get("Authorization") == f"Bearer {key}"

    def do_GET(self) -> None:
        faults = self.server.faults
        if self.path == "/version":
            self.answer(200, {"version": faults.version})
        elif not self.allowed():
            self.answer(401, {"error": "Unauthorized"})
        elif self.path == "/v1/models":
            card = {"id": "base", "parent": None, "max_model_len": faults.max_model_len}
            self.answer(200, {"object": "list", "data": [card]})
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        does = {"/v1/completions": self.server.complete}
        if not self.server.faults.no_lora_route:
            does["/v1/load_lora_adapter"] = self.server.load
            does["/v1/unload_lora_adapter"] = self.server.unload
        if not self.allowed():
            self.answer(401, {"error": "Unauthorized"})
        elif self.path not in does:
            self.answer(404, {"detail": "Not Found"})
        else:
            if self.path == "/v1/completions":
                self.server.seen.append(body)
            self.answer(*does[self.path](body))

    def log_message(self, *_: Any) -> None:
        pass


def error(message: str) -> dict[str, Any]:
    """An error as vLLM writes it."""
    return {"error": {"message": message, "type": "Error", "param": None, "code": 0}}


def serving(model_dir: Path) -> AbstractContextManager[Server]:
    """A server for as long as the block runs."""
    return running(Server(model_dir))
