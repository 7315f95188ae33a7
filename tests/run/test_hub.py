"""push_to_hub: the hub's own client against a server that answers as the hub does."""

from __future__ import annotations

import base64
import json
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import pytest
from click.testing import CliRunner
from huggingface_hub.cli.hf import app

from fastppo.config import Config
from fastppo.errors import TrainingStopped, UserError
from fastppo.run import hub
from fastppo.run.preflight import check

TOKEN = "hf_secret"


class Hub(BaseHTTPRequestHandler):
    """Whose login it is, a repository's creation, and commits; `fails` names what is refused."""

    files: ClassVar[dict[str, bytes]] = {}
    created: ClassVar[list[dict[str, Any]]] = []
    role = "write"
    fails: ClassVar[dict[str, int]] = {}  # part of a path -> HTTP status

    def answer(self, values: object, status: int = 200) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuses(self) -> bool:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "no login"}, 401)
            return True
        for part, status in self.fails.items():
            if part in self.path:
                self.answer({"error": f"refused {TOKEN}"}, status)
                return True
        return False

    def do_GET(self) -> None:
        if self.refuses():
            return
        if "whoami" not in self.path:  # whether there is such a repository
            self.answer({"error": "there is none"}, 404)
        else:
            self.answer({"name": "me", "auth": {"accessToken": {"role": self.role}}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refuses():
            return
        if self.path == "/api/repos/create":
            given = json.loads(body)
            self.created.append(given)
            owner = given.get("organization") or "me"
            host = self.headers["Host"]
            self.answer({"url": f"http://{host}/{owner}/{given['name']}"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            kept = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self.answer({"files": kept})
        elif self.path == "/api/validate-yaml":  # the card's head
            self.answer({"errors": [], "warnings": []})
        else:
            assert "/commit/main" in self.path
            for line in body.splitlines():
                part = json.loads(line)
                if part["key"] == "file":
                    self.files[part["value"]["path"]] = base64.b64decode(part["value"]["content"])
            host = self.headers["Host"]
            where = f"http://{host}/me/out/commit/{'0' * 40}"
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": where})

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The hub in this process; who runs the tests may have a login of their own."""
    made = type("Hub", (Hub,), {"files": {}, "created": [], "fails": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), made) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        address = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made
        running.shutdown()
        thread.join()


def saved(config: Callable[..., Config], **changes: Any) -> Config:
    """A configuration whose output_dir has the files of a finished run, and further ones."""
    made = config(push_to_hub=True, **changes)
    folder = Path(made.output_dir)
    (folder / "checkpoint-3").mkdir(parents=True)
    for name in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "value_head.safetensors",
        "checkpoint-3/adapter_model.safetensors",
        "eval_samples.jsonl",
        "fastppo_info.json",
        "trainer_log.jsonl",
        "modeling_own.py",
    ):
        (folder / name).write_text(name)
    loads = f'PeftModel.from_pretrained(base, "{folder}")'
    (folder / "README.md").write_text(f"{loads}\n# fastppo-export {folder} EXPORT_DIR\n")
    return made


def test_the_model_and_its_card_are_uploaded_and_nothing_else(config, server, capsys):
    settings = saved(config)
    card = (Path(settings.output_dir) / "README.md").read_bytes()
    hub.push(settings)
    weights = ["adapter_model.safetensors", "value_head.safetensors"]
    assert sorted(server.files) == sorted(
        ["README.md", "adapter_config.json", "tokenizer.json", *weights]
    )
    assert server.files["tokenizer.json"] == b"tokenizer.json"
    assert server.files["README.md"].decode() == (
        'PeftModel.from_pretrained(base, "me/out")\n'
        "# hf download me/out --local-dir FOLDER && fastppo-export FOLDER EXPORT_DIR\n"
    )
    assert (Path(settings.output_dir) / "README.md").read_bytes() == card
    out, err = capsys.readouterr()
    assert "uploaded to me/out on the hub" in out
    assert TOKEN not in out + err


def test_hub_model_id_and_hub_private_repo_name_the_repository(config, server):
    hub.push(saved(config, hub_model_id="lab/policy", hub_private_repo=True))
    (made,) = server.created
    assert (made["organization"], made["name"]) == ("lab", "policy")
    assert "private" in (made.get("visibility"), *(name for name in made if made[name] is True))
    assert b'"lab/policy"' in server.files["README.md"]


def test_modules_of_the_models_own_go_with_trust_remote_code(config, server):
    hub.push(saved(config, trust_remote_code=True))
    assert "modeling_own.py" in server.files


def test_nothing_is_uploaded_unless_asked(config, server):
    check(config())
    hub.push(saved(config).model_copy(update={"push_to_hub": False}))
    hub.push(config(push_to_hub=True, do_train=False, do_eval=True, val_size=1))
    assert (server.files, server.created) == ({}, [])


@pytest.mark.parametrize(
    ("token", "role", "fails", "line"),
    [
        (None, "write", {}, "there is no login to the hub here; set HF_TOKEN"),
        ("other", "write", {}, r"the hub refuses the login \(HfHubHTTPError, HTTP 401\); set HF_"),
        (TOKEN, "read", {}, "the login's token may only read; set HF_TOKEN"),
        (TOKEN, "write", {"whoami": 403}, r"the hub refuses the login \(HfHubHTTPError, HTTP 403"),
    ],
)
def test_a_login_that_may_not_write_is_refused_before_training(
    config, server, monkeypatch, token, role, fails, line
):
    monkeypatch.setattr(huggingface_hub.hf_api, "get_token", lambda: token)
    server.role, server.fails = role, fails
    with pytest.raises(UserError, match=f"push_to_hub: {line}") as caught:
        check(config(push_to_hub=True))
    assert TOKEN not in str(caught.value)


def test_a_hub_out_of_reach_is_one_line_before_training(config, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match=r"the hub cannot be reached \(\w+\); leave it out"):
        check(config(push_to_hub=True))


def test_hf_hub_token_is_the_uploads_token(config, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "other")
    check(config(push_to_hub=True, hf_hub_token=TOKEN))
    hub.push(saved(config))
    assert server.files


@pytest.mark.parametrize(("part", "status"), [("repos/create", 403), ("/commit/", 500)])
def test_an_upload_that_fails_says_where_the_model_is(config, server, part, status):
    settings = saved(config)
    server.fails = {part: status}
    with pytest.raises(
        TrainingStopped, match=rf"was not uploaded \(\w+, HTTP {status}\)"
    ) as caught:
        hub.push(settings)
    assert f"the model is whole in {settings.output_dir}" in str(caught.value)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"trust_remote_code": True, "hub_private_repo": True}])
def test_the_command_of_a_failed_upload_uploads_what_it_would_have(
    config, server, tmp_path, changes
):
    """Run by the hub's own client: no log, no sample, no checkpoint, no record of the machine."""
    settings = saved(config, output_dir=str(tmp_path / "my out"), hub_model_id="me/out", **changes)
    server.fails = {"/commit/": 500}
    with pytest.raises(TrainingStopped) as caught:
        hub.push(settings)
    (line,) = re.findall(r"this uploads it: (.*)$", str(caught.value))
    assert line.startswith(f"hf upload me/out '{tmp_path}/my out' --exclude '*/*'")
    server.fails, server.created[:] = {}, []
    done = CliRunner().invoke(app, shlex.split(line)[1:])
    assert done.exit_code == 0, done.output
    wanted = {path.name for path in hub.files_to_upload(settings)}
    assert set(server.files) == wanted > {"README.md", "adapter_model.safetensors"}
    assert ("modeling_own.py" in wanted) == bool(changes)
    private = [
        made.get("private") or made.get("visibility") == "private" for made in server.created
    ]
    assert any(private) == bool(changes)


def test_a_folder_without_a_model_is_not_uploaded(config, server):
    with pytest.raises(UserError, match=r"there is no model in .*; train or save it first"):
        hub.upload(config(push_to_hub=True))
    assert server.created == []


def test_a_run_uploads_what_it_saved(config, server, monkeypatch, tmp_path):
    """The command's own way, with the checks before it."""
    from fastppo import cli

    settings = config(max_steps=1, ppo_epochs=1, push_to_hub=True, hub_model_id="me/vowels")
    monkeypatch.setattr("fastppo.config.load_config", lambda *_: settings)
    cli.train(["run.yaml"])
    folder = tmp_path / "out"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(server.files)
    assert set(server.files) < {path.name for path in folder.iterdir()}
    same = [name for name in server.files if name != "README.md"]
    assert all((folder / name).read_bytes() == server.files[name] for name in same)
    card = server.files["README.md"].decode()
    assert 'PeftModel.from_pretrained(base, "me/vowels")' in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    assert str(folder) not in code[1]


def test_ppo_trainer_uploads_once_more_only_when_called(config, server, monkeypatch):
    from fastppo.trainer.ppo_trainer import PPOTrainer

    settings = saved(config, hub_model_id="me/again")
    PPOTrainer.push_to_hub(SimpleNamespace(config=settings), commit_message="End", tags=["x"])
    assert "adapter_model.safetensors" in server.files
