"""The code of docs/integrations.md runs as it stands there, on tiny models."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import peers
from benchmarks.peers.environments import VERL
from fastppo import integrations
from tests import zoo
from tests.integrations.processes import run
from tests.peers import theirs

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
# What TRL's users have, and what must be true once the page's code has run.
TRL = """
import sys
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

model, out = sys.argv[1:]
reward = lambda completions, **_: [len(text) for text in completions]
args = GRPOConfig(
    output_dir=out, max_steps=1, per_device_train_batch_size=2, num_generations=2,
    max_completion_length=4, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
)
dataset = Dataset.from_dict({"prompt": ["a b", "c d"]})
peft_config = LoraConfig(r=4, target_modules="all-linear")
import fastppo.integrations.trl as ours
own, calls = ours.logprobs_and_entropy, []
ours.logprobs_and_entropy = lambda *x, **named: calls.append(1) or own(*x, **named)

CODE
assert calls and trainer.state.global_step == 1
"""
# What the first two lines on the page set is what this process has as a run of verl has it.
RUN_OF_VERL = """
import sys
from hydra import compose, initialize_config_module
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.experimental.torch_functional import FusedLinearForPPO

with initialize_config_module("verl.trainer.config", version_base=None):
    model = compose("ppo_trainer", overrides=sys.argv[1:]).actor_rollout_ref
assert model.model.use_fused_kernels is True
head = FusedLinearForPPO(impl_backend=model.model.fused_kernel_options.impl_backend)
assert type(head).forward.__module__ == "fastppo.integrations.verl" and head.impl_backend == "torch"
loss = get_policy_loss_fn(model.actor.policy_loss.loss_mode)
assert loss.func.__module__ == "fastppo.integrations.verl"
"""


def code(heading: str, language: str = "python") -> str:
    """The first block of code in a section."""
    section = PAGE.partition(f"\n## {heading}")[2].partition("\n## ")[0]
    found = re.search(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def execute(heading: str, **given: object) -> dict[str, object]:
    exec(compile(code(heading), "docs/integrations.md", "exec"), given)
    return given


def test_transformers():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(zoo.config_of("llama"))
    own = model.forward
    ids = torch.randint(5, 60, (2, 9))
    given = execute("transformers", model=model, ids=ids, labels=ids, mask=torch.ones_like(ids))
    assert given["out"].logprob.shape == (2, 8)
    assert model.forward == own


def test_liger():
    torch.manual_seed(0)
    given = execute(
        "Liger-Kernel",
        hidden=torch.randn(2, 5, 8),
        lm_head=torch.nn.Linear(8, 13),
        completion_ids=torch.randint(13, (2, 5)),
        completion_mask=torch.ones(2, 5),
        advantages=torch.tensor([1.0, -1.0]),
        ref=-torch.rand(2, 5) - 2,
    )
    given["loss"].backward()
    assert [x.shape for x in given["metrics"]] == [(), ()]
    assert given["lm_head"].weight.grad.abs().max() > 0


@pytest.mark.peers
def test_trl(tmp_path):
    model = str(zoo.write("qwen2", tmp_path / "model"))
    script = TRL.replace("CODE", code("TRL"))
    run(sys.executable, "-c", script, model, str(tmp_path / "out"), path=peers.SITE)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:fastppo.integrations was tried")  # a module has no version
def test_openrlhf(monkeypatch):
    """Its two modules, loaded without the package around them, have our functions then."""
    loss, utils = theirs.openrlhf("loss"), theirs.openrlhf("utils")
    for module in (loss, utils):  # monkeypatch puts them back
        for name in ("PolicyLoss", "ValueLoss", "log_probs_from_logits"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(module, name))
    execute("OpenRLHF")
    for found in (loss.PolicyLoss, loss.ValueLoss, utils.log_probs_from_logits):
        assert found.__module__ == "fastppo.integrations.openrlhf"


@pytest.mark.peers
def test_verl(monkeypatch):
    """verl's configuration has every key, and a process with the variable has our functions."""
    assert VERL.ready, "run: python -m benchmarks.peers.environments verl"
    variable, *command = code("verl", "").replace("\\\n", " ").splitlines()
    name, _, value = variable.removeprefix("export ").partition("=")
    monkeypatch.setenv(name, value)
    overrides = command[0].split()[3:]
    assert len(overrides) == 3
    run(VERL.python, "-c", RUN_OF_VERL, *overrides)


def test_every_adapter_has_a_section():
    modules = {path.stem for path in Path(*integrations.__path__).glob("*.py")}
    sections = re.findall(r"^## (\S+)", PAGE, re.MULTILINE)
    shared = {"__init__", "grpo", "head", "patching"}
    assert modules - shared <= {name.lower().partition("-")[0] for name in sections}
