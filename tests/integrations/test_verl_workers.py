"""verl's own workers, in two processes that verl starts, load our module and train as before."""

from __future__ import annotations

import json

import pytest

from benchmarks.peers.environments import VERL
from tests import zoo
from tests.integrations.processes import run

pytestmark = pytest.mark.peers


def test_two_workers_of_verl_over_gloo(tmp_path):
    """verl's TrainingWorker in two Ray processes; its engine shares the model by FSDP.

    The policy loss is found by its name, which verl knows only if each worker has imported our
    module. Losses are divided by counts of the global batch, and the gradient is of both ranks.
    """
    assert VERL.ready, "run: python -m benchmarks.peers.environments verl"
    model = str(zoo.write("qwen2", tmp_path / "model"))
    command = ("-m", "tests.integrations.verl_run", model)
    theirs, ours = (
        [
            json.loads(line)
            for line in run(VERL.python, *command, *given).splitlines()
            if line.startswith(('["', '{"'))
        ]
        for given in (("vanilla",), ("fastppo_ppo_clip", "fastppo.integrations.verl"))
    )
    assert theirs[0] == ["verl.utils.experimental.torch_functional"] * 2
    assert ours[0] == ["fastppo.integrations.verl"] * 2
    assert len(theirs) == len(ours) == 4
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert other["grad_norm"][0] > 0.1
        for name, value in other.items():
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
