"""A reward server that fails in mid-run: what passes is waited out, what stays stops the run.

tests/bad/endpoints.yaml has every answer that is refused; here whole runs meet them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fastppo.run import durable
from tests.reliability import runs
from tests.reward_server import Reply, scores

pytestmark = pytest.mark.alone  # half a second without an answer is a fault

PASSING = {
    "HTTP 500": Reply(b"", 500),
    "HTTP 503": Reply(b"", 503),
    "HTTP 429": Reply(b"", 429),
    "a timeout": Reply(pause=0.7),
    "half an answer": Reply(b'{"sc', headers={"Content-Length": "99", "Connection": "close"}),
}
STAYING = {
    "a redirect": Reply(b"", 302, {"Location": "http://127.0.0.1:1/"}),
    "a short list": scores(1.0),
    "NaN": scores(float("nan"), 1.0),
    "HTTP 404": Reply(b"", 404),
    "HTML": Reply(b"<html>\n<body>no</body>"),
    "no UTF-8": Reply(b'{"scores": "\xff\xfe"}'),
    "brackets without end": Reply(b"[" * 200_000),
}


@pytest.fixture
def endpoint(settings, server):
    """A run that asks the server once before it begins, and twice in every step."""

    def make() -> dict:
        return settings(
            "ppo",
            reward_model=server.url,
            reward_model_type="api",
            reward_api_timeout=0.5,
            reward_api_retries=2,
            eval_strategy="no",
            ptx_dataset=None,
            ptx_coef=0.0,
            eval_judge=None,
        )

    return make


@pytest.fixture(scope="session")
def healthy(home):
    """The rows of a run whose server never fails: the same for all, once made."""
    return {}


def expected(healthy, endpoint):
    if "result" not in healthy:
        mine = endpoint()
        mine["output_dir"] += "-healthy"
        mine["metrics_dir"] += "-healthy"
        code, said = runs.run(mine)
        assert code == 0, said
        healthy["result"] = runs.result(mine)
    return healthy["result"]


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_changes_nothing(endpoint, server, healthy, fault):
    wanted = expected(healthy, endpoint)
    server.script = [*[Reply()] * 4, PASSING[fault], Reply(), PASSING[fault], PASSING[fault]]
    mine = endpoint()
    code, said = runs.run(mine)
    assert code == 0, said
    assert runs.differences(runs.result(mine), wanted) == []


@pytest.mark.parametrize("fault", STAYING)
def test_a_permanent_fault_stops_the_run_which_can_be_resumed(endpoint, server, healthy, fault):
    wanted = expected(healthy, endpoint)
    server.script = [*[Reply()] * 6, STAYING[fault]]  # within step 3
    mine = endpoint()
    code, said = runs.run(mine)
    assert code == 1, said
    (line,) = [line for line in said.splitlines() if line.startswith("fastppo-train:")]
    assert line.startswith(f"fastppo-train: stopped: reward_model: {server.url}: ")
    (kept,) = durable.checkpoints(Path(mine["output_dir"]))
    assert (kept.name, durable.checkpoint_fault(kept)) == ("checkpoint-2", None)
    server.script = []
    code, said = runs.resume(mine)
    assert code == 0, said
    assert runs.differences(runs.result(mine), wanted) == []
