"""A reward server over real HTTP: what is sent, what is taken, and every way that it can fail."""

from __future__ import annotations

import json
import socket
import time

import pytest

from fastppo.cli import main
from fastppo.errors import UserError
from fastppo.rewards.server import TOKEN, ApiReward
from fastppo.servers import client
from tests.reward_server import Reply, scores, serving


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(TOKEN, raising=False)
    with serving() as made:
        yield made


@pytest.fixture
def reward(server, tokenizer):
    return ApiReward(server.url, tokenizer, timeout=5.0, retries=2, batch_size=4)


def test_sends_the_texts_that_llamafactory_sends(reward, server, rollout, tokenizer):
    values = reward(rollout).tolist()
    ids = [row[:n] for row, n in zip(rollout.input_ids_BT.tolist(), rollout.lengths, strict=True)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=False)
    assert server.seen == [{"model": "model", "messages": texts}]
    assert texts[0] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
    assert not any("<|endoftext|>" in text for text in texts), "padding was sent"
    assert values == [len(text) for text in texts]
    # requests.post(url, json=...), which LLaMA-Factory calls, writes these bytes.
    assert server.raw[0] == json.dumps({"model": "model", "messages": texts}).encode()
    assert server.headers[0]["Content-Type"] == "application/json"
    assert "Authorization" not in server.headers[0]


def test_a_request_has_no_more_texts_than_a_micro_batch(reward, server, rollout):
    together = reward(rollout)
    reward.batch_size = 3
    assert reward(rollout).tolist() == together.tolist()
    assert [len(seen["messages"]) for seen in server.seen] == [4, 3, 1]


def test_the_token_comes_from_the_environment_and_is_in_no_message(
    reward, server, monkeypatch, capsys
):
    monkeypatch.setenv(TOKEN, "s3cret")
    reward.scores(["a"])
    assert server.headers[-1]["Authorization"] == "Bearer s3cret"
    server.script = [Reply(b"", 401)]
    with pytest.raises(UserError, match=f"HTTP 401; set the environment variable {TOKEN}") as error:
        reward.scores(["a"])
    monkeypatch.setenv(TOKEN, "s3cret\nHost: evil")
    with pytest.raises(UserError, match="a character no header can have") as other:
        reward.scores(["a"])
    said = str(error.value) + str(other.value) + "".join(capsys.readouterr())
    assert "s3cret" not in said


def test_a_query_is_sent_and_never_shown(server, tokenizer):
    url = f"{server.url}?key=s3cret"
    made = ApiReward(url, tokenizer, timeout=5.0, retries=0, batch_size=4)
    server.script = [Reply(b"no")]
    with pytest.raises(UserError) as error:
        made.scores(["a"])
    assert "s3cret" not in str(error.value)


def test_an_answer_that_echoes_its_request_is_quoted_without_the_secrets(
    server, tokenizer, monkeypatch
):
    monkeypatch.setenv(TOKEN, "t0ken")
    made = ApiReward(f"{server.url}?key=qu3ry", tokenizer, timeout=5.0, retries=0, batch_size=4)
    server.script = [Reply(b"POST /?key=qu3ry Bearer t0ken"), scores("t0ken")]
    for words in (r"POST /\?\*\*\* Bearer \*\*\*", r"answers '\*\*\*' as a score"):
        with pytest.raises(UserError, match=words) as error:
            made.scores(["a"])
        assert "t0ken" not in str(error.value)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_failures_that_pass_are_tried_again(reward, server, status):
    server.script = [Reply(b"", status), Reply(b"", status), scores(0.5)]
    assert reward.scores(["a"]) == [0.5]
    assert len(server.seen) == 3


def test_waits_double_from_one_attempt_to_the_next(reward, server, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    monkeypatch.setattr(client, "FIRST_WAIT", 0.5)
    monkeypatch.setattr(client, "LONGEST_WAIT", 3.0)
    reward.client.retries = 5
    reward.client.url = f"http://127.0.0.1:{free_port()}/"
    with pytest.raises(UserError, match=r"no connection .*, attempt 6 of 6; check the server"):
        reward.scores(["a"])
    assert waits == [0.5, 1.0, 2.0, 3.0, 3.0]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_a_failure_that_stays_ends_in_one_line(reward, server):
    server.script = [Reply(b"", 500)] * 3
    with pytest.raises(UserError, match="answers HTTP 500, attempt 3 of 3; check the serv"):
        reward.scores(["a"])


@pytest.mark.alone
@pytest.mark.parametrize(
    "reply", [Reply(pause=3.0), Reply(trickle=0.1)], ids=["silence", "trickle"]
)
def test_a_slow_answer_is_a_failed_attempt(reward, server, reply):
    reward.client.timeout, reward.client.retries = 0.2, 0
    server.script = [reply]
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no answer in 0\.2 s, attempt 1 of 1"):
        reward.scores(["a"])
    assert time.monotonic() - began < 2.5, "the answer was not waited for"
    reward.client.timeout, reward.client.retries = 5.0, 1
    assert reward.scores(["a"]) == [1.0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(reward, server, status):
    server.script = [Reply(b"", status, {"Location": server.url})]
    with pytest.raises(UserError, match=f"redirects elsewhere .HTTP {status}., which is not foll"):
        reward.scores(["a"])
    assert len(server.seen) == 1


def test_other_refusals_are_not_tried_again(reward, server):
    server.script = [Reply(b"", 404)]
    with pytest.raises(UserError, match="HTTP 404; check the URL"):
        reward.scores(["a"])
    assert len(server.seen) == 1


def test_a_connection_that_breaks_within_an_answer_is_tried_again(reward, server):
    server.script = [Reply(b'{"scores"', headers={"Content-Length": "99", "Connection": "close"})]
    assert reward.scores(["a"]) == [1.0]
    assert len(server.seen) == 2


def test_a_bad_answer_is_refused_at_once(reward, server):
    server.script = [scores(1.0), scores(10**400, 1)]
    for words in ("answers 1 scores for 2", "answers 1000"):
        with pytest.raises(UserError, match=words) as error:
            reward.scores(["a", "b"])
        assert len(str(error.value)) < 300
    assert len(server.seen) == 2


def test_integers_are_numbers(reward, server):
    server.script = [scores(2, -1)]
    assert reward.scores(["a", "b"]) == [2.0, -1.0]


def command(config, tmp_path, **changes) -> list[str]:
    settings = config(reward_model_type="api", **changes).model_dump(exclude_none=True)
    (tmp_path / "run.json").write_text(json.dumps(settings))
    return [str(tmp_path / "run.json")]


def test_a_server_that_is_wrong_is_noticed_before_anything_is_written(
    config, tmp_path, server, capsys
):
    server.script = [Reply(b"<html>")]
    argv = command(config, tmp_path, reward_model=server.url)
    before = {*tmp_path.iterdir()}
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fastppo-train: error: reward_model: {server.url}: answers b'<html>'")
    assert err.count("\n") == 1
    assert {*tmp_path.iterdir()} == before


def test_a_server_that_fails_in_mid_run_stops_it(config, tmp_path, server, capsys):
    # The probe before the run and the first step are answered; the second step is not.
    server.script = [Reply(), Reply(), Reply(b"", 404)]
    argv = command(config, tmp_path, reward_model=server.url, max_steps=3)
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert err == f"fastppo-train: stopped: reward_model: {server.url}: HTTP 404; check the URL\n"
    lines = (tmp_path / "metrics" / "training_metrics.csv").read_text().splitlines()
    assert len(lines) == 2


def test_a_run_on_a_server_that_stumbles_once(config, tmp_path, server, capsys):
    server.script = [Reply(b"", 503)]
    assert main(command(config, tmp_path, reward_model=server.url, max_steps=1)) == 0
    assert "server 'api'" in capsys.readouterr().out
    summary = json.loads((tmp_path / "metrics" / "summary.json").read_text())
    assert summary["reward_after"] > 0
