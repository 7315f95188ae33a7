"""A model or data set on the hub is asked for once: what is said where it cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
import yaml

from tests.project import PPO

TRAIN = "import sys; from fastppo.cli import main; sys.exit(main(['run.yaml']))"
EXPORT = "import sys; from fastppo.export.cli import main; sys.exit(main(['run.yaml']))"
NOWHERE = "http://127.0.0.1:9"
CURES = {
    "GatedRepo": "o/n is gated on the hub; accept its terms on its page, and set HF_TOKEN",
    "RepoNotFound": "no folder o/n here, and none of that name on the hub that is open to you",
    "RevisionNotFound": "o/n has no main on the hub; check model_revision",
}


class Hub(BaseHTTPRequestHandler):
    """Answers every question by the code in the repository's name, as o/GatedRepo."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        code = self.path.removeprefix("/datasets").split("/")[2]
        self.send_response(403 if code == "GatedRepo" else 404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Hub.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def run(project, endpoint: str, code: str = TRAIN, **keys: Any) -> str:
    """The one line of a command that is refused; nothing is written."""
    (project / "run.yaml").write_text(yaml.safe_dump({**(PPO if code == TRAIN else {}), **keys}))
    before = sorted(project.rglob("*"))
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(project / "cache")}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert sorted(project.rglob("*")) == before
    return done.stderr


@pytest.mark.parametrize(
    "keys",
    [
        {"model_name_or_path": "o/n"},
        {"ref_model": "o/n"},
        {"adapter_name_or_path": "o/n"},
        {"reward_model": "o/n", "reward_model_type": "full"},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_without_a_network_one_line_says_how_to_fetch_a_model(project, keys):
    line = run(project, NOWHERE, **keys)
    assert f"{next(iter(keys))}: no folder o/n here, not in the hub's cache" in line
    assert f"and {NOWHERE} does not answer (ConnectError)" in line
    assert "`hf download o/n` (HF_ENDPOINT names a mirror)" in line


@pytest.mark.parametrize("code", CURES)
def test_the_hubs_refusal_is_named_after_one_question(project, server, code):
    line = run(project, server, model_name_or_path=f"o/{code}")
    assert CURES[code].replace("o/n", f"o/{code}") in line
    assert len(Hub.asked) == 1


def test_an_export_asks_once_too(project, server):
    keys = {"code": EXPORT, "model_name_or_path": "o/n", "export_dir": "merged"}
    line = run(project, NOWHERE, **keys)
    assert "model_name_or_path: no folder o/n here, not in the hub's cache" in line
    assert f"and {NOWHERE} does not answer (ConnectError)" in line
    line = run(project, server, **{**keys, "model_name_or_path": "o/RepoNotFound"})
    assert "none of that name on the hub that is open to you; check the name" in line
    assert len(Hub.asked) == 1


@pytest.mark.parametrize("code", ["GatedRepo", "RepoNotFound"])
def test_a_data_set_that_is_not_to_be_had_is_named_after_one_question(project, server, code):
    line = run(project, server, dataset=f"o/{code}", dataset_dir="ONLINE")
    said = {"GatedRepo": CURES["GatedRepo"], "RepoNotFound": "no data set o/n on the hub that is"}
    assert said[code].replace("o/n", f"o/{code}") in line
    assert len(Hub.asked) == 1
