"""A reward server on this machine, over real HTTP, that answers as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

S = TypeVar("S", bound=ThreadingHTTPServer)


@dataclass
class Reply:
    """One answer of the server; `body` None scores each message by its length."""

    body: bytes | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0
    trickle: float = 0.0  # seconds between the bytes of the body


def scores(*values: Any) -> Reply:
    return Reply(json.dumps({"scores": list(values)}).encode())


class Server(ThreadingHTTPServer):
    """Gives the replies in `script` one by one, then goes on with plain good ones."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Reply] = []
        self.raw: list[bytes] = []
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.sent = 0  # bytes of bodies that a client took
        self.url = f"http://127.0.0.1:{self.server_port}/v1/score/evaluation"

    def handle_error(self, *_: Any) -> None:
        pass  # a client that hung up


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.raw.append(body)
        self.server.seen.append(json.loads(body))
        self.server.headers.append(dict(self.headers))
        reply = self.server.script.pop(0) if self.server.script else Reply()
        time.sleep(reply.pause)
        data = reply.body
        if data is None:
            lengths = [float(len(text)) for text in self.server.seen[-1]["messages"]]
            data = json.dumps({"id": "x", "model": "model", "scores": lengths}).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(data)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        step = 1 if reply.trickle else 1 << 16
        for i in range(0, len(data), step):
            self.wfile.write(data[i : i + step])
            self.wfile.flush()
            self.server.sent += step
            time.sleep(reply.trickle)

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def running(made: S) -> Iterator[S]:
    """The server answers for as long as the block runs."""
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


def serving() -> AbstractContextManager[Server]:
    """A server for as long as the block runs."""
    return running(Server())
