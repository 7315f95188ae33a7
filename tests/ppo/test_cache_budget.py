"""The cache gets what the plan leaves: reward models lie on the GPU too, streamed layers do not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastppo.ppo import rollout
from fastppo.ppo.sampling import Sampling
from fastppo.ppo.trainer import State
from tests.rewards.test_model import write_classifier

TOTAL = 24 * 2**30


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch):
    """The bytes that a run's rollout gives its cache on a GPU of 24 GiB."""

    def of(run: State) -> float:
        found: list[float] = []

        def noted(prompts: Any, new: Any, token: Any, budget: float, most: Any = None) -> Any:
            found.append(budget)
            raise InterruptedError

        properties = SimpleNamespace(total_memory=TOTAL)
        with monkeypatch.context() as patch:
            patch.setattr(rollout, "number_of_slots", noted)
            patch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
            patch.setattr(run.roles, "device", torch.device("cuda"))
            with pytest.raises(InterruptedError):
                rollout.sample(
                    run.roles,
                    run.prompts,
                    sampling=Sampling.of(run.config),
                    template=run.template,
                    tokenizer=run.tokenizer,
                    seed=0,
                    plan=run.plan,
                )
        return found[0]

    return of


def test_a_reward_model_of_its_own_takes_room_from_the_cache(state, room, tmp_path):
    write_classifier(tmp_path / "c", hidden_size=64, max_position_embeddings=256)
    without = room(state())
    run = state(reward_model=str(tmp_path / "c"), reward_model_type="full")
    (reward,) = run.reward.parts
    weights = sum(p.nbytes for p in reward.model.parameters())
    assert without - room(run) >= 0.79 * weights


def test_a_streamed_reference_leaves_its_layers_room(state, room, model_dir):
    """The toy's two layers fit the two slots; so the plan of a deeper one is looked at."""
    kept = state(ref_model=str(model_dir))
    plan = kept.plan
    assert plan is not None
    streamed = plan.with_changes(stream_frozen=True)
    assert plan.stays_in_rollout - streamed.stays_in_rollout == (
        plan.columns["rollout"].rows["reference weights"]
        - streamed.columns["rollout"].rows["reference weights"]
    )
    assert room(kept) == 0.8 * (TOTAL - plan.stays_in_rollout)
