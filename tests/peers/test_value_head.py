"""Checkpoints with a value head that TRL's own class writes are read here, and the other way."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.environments import TRL
from fastppo import PPOConfig, PPOTrainer
from fastppo.models import build as roles
from fastppo.ppo import trainer as loop
from fastppo.rewards.model import load_full
from fastppo.templates import get_template
from tests.integrations.processes import run
from tests.peers.value_head import IDS
from tests.tiny import make_config

pytestmark = pytest.mark.peers
CPU = torch.device("cpu")


def theirs(*command: str) -> list[float]:
    """Values of IDS that TRL's class gives, in a process of its own."""
    assert TRL.ready, "run: python -m benchmarks.peers.environments trl"
    printed = run(TRL.python, "-m", "tests.peers.value_head", *command)
    found: list[float] = json.loads(printed.splitlines()[-1])
    return found


def ours(made: roles.Roles, role: str) -> list[float]:
    """Values of IDS by a role's model and head."""
    with made.use(role), torch.no_grad():
        hidden = made.hidden(torch.tensor(IDS))
        head = made.reward_heads["reward"] if role == "reward" else made.critic_head
        return head(hidden)[0, :, 0].tolist()


@pytest.mark.parametrize("kind", ["whole", "PEFT"])
def test_what_trl_writes_is_read(model_dir, tmp_path, kind):
    """As a critic, as the policy with its head, and as a reward: the values that TRL gives."""
    folder, adapter = tmp_path / "trl", kind == "PEFT"
    expected = theirs("write", str(folder), str(model_dir), kind)
    assert max(map(abs, expected)) > 0.01
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if not adapter:
        tokenizer.save_pretrained(folder)
    whole = {} if adapter else {"model_name_or_path": str(folder)}
    policy = {"adapter_name_or_path": str(folder)} if adapter else whole
    settings = {
        "critic": {"critic": "model", "critic_model": str(folder)},
        "policy": {"critic": "shared", "value_head_init": "model", **policy},
        "reward": {"reward_model": str(folder), "reward_model_type": "lora"},
    }
    for role, changes in settings.items():
        if role == "reward" and not adapter:
            config = make_config(model_dir, tmp_path, **{**changes, "reward_model_type": "full"})
            reward = load_full(str(folder), config, CPU, get_template("chatml", tokenizer))
            with torch.no_grad():
                ids = torch.tensor(IDS)
                batch = SimpleNamespace(input_ids_BT=ids, mask_BT=torch.ones_like(ids))
                found = reward.head(reward.hidden(batch))[0, :, 0].tolist()
        else:
            made = roles.build(make_config(model_dir, tmp_path, **changes), CPU)
            found = ours(made, "reward" if role == "reward" else "critic")
        assert found == pytest.approx(expected, abs=1e-5), role


@pytest.mark.parametrize("critic", ["shared", "adapter", "model", "all weights"])
def test_what_is_written_here_trl_reads(model_dir, tmp_path, critic):
    """A policy that shares its trunk with the critic, an adapter, a model, and all weights."""
    folder: Path = tmp_path / "trl"
    args = PPOConfig(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        template="chatml",
        **({} if critic == "model" else {"critic": "adapter" if critic == "adapter" else "shared"}),
        per_device_train_batch_size=2,
        max_new_tokens=4,
        max_steps=1,
        learning_rate=1e-2,
        gradient_checkpointing=False,
    )
    made = PPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir),
        args=args,
        reward_funcs="fastppo.toy:vowels",
        train_dataset=[{"messages": [{"role": "user", "content": text}]} for text in ("Hi", "Tea")],
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        value_model=str(model_dir) if critic == "model" else None,
        peft_config=None if critic == "all weights" else LoraConfig(target_modules="all-linear"),
    )
    state = loop.step_update(made._state)
    made.save_value_model(folder)
    expected = ours(state.roles, "critic")
    assert max(map(abs, expected)) > 1e-4
    assert theirs("read", str(folder)) == pytest.approx(expected, abs=1e-5)
