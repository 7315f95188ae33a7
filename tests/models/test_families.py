"""A matrix: each family through rm, ppo, resume, export and reload, held against transformers' own.

The oracle is the whole model's own forward on one sequence at a time: its logits, and what its
output head is given, which is the hidden state that value heads read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastppo.cli import main
from fastppo.config import load_config
from fastppo.export.cli import main as export
from fastppo.models.load import causal_lm
from fastppo.ppo import trainer
from fastppo.ppo.rollout import Sampling, sample
from fastppo.ppo.score import score
from fastppo.ppo.state import init_state
from tests import zoo
from tests.families import NO_CLASSIFIER, page
from tests.tiny import stir

ROOT = Path(__file__).resolve().parents[2]
RUN = {
    "dataset": "prompts.json",
    "template": "chatml",
    "default_system": "",
    "cutoff_len": 64,
    "learning_rate": 1e-2,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "overwrite_output_dir": True,
}
RM = {**RUN, "stage": "rm", "dataset": "pairs.json"}
PPO = {
    **RUN,
    "stage": "ppo",
    "max_new_tokens": 12,
    "ppo_epochs": 2,
    "do_eval": False,
    "save_steps": 1,
}
SPREAD = {"reward_model": "tests.zoo:spread", "reward_model_type": "function"}
# Longer and shorter than the sliding windows of 8 tokens, and of four lengths.
PROMPTS = ["Hi", "What is rain?", "A line on tea, please.", "Tell me of the sea and of bread."]
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable[..., None]:
    """Run a stage in a folder with prompts and pairs; it has to end well."""
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": text} for text in PROMPTS]
    pairs = [{**row, "chosen": "yes, and more", "rejected": "no"} for row in rows]
    Path("prompts.json").write_text(json.dumps(rows))
    Path("pairs.json").write_text(json.dumps(pairs))

    def go(settings: dict[str, Any], out: str, *words: str, **changes: Any) -> None:
        where = {"output_dir": out}
        if settings["stage"] == "ppo":
            where["metrics_dir"] = f"{out}/metrics"
        Path(f"{out}.yaml").write_text(json.dumps({**settings, **where, **changes}))
        assert main([f"{out}.yaml", *words]) == 0

    return go


def oracle(model: Any, ids: list[int]) -> tuple[Tensor, Tensor]:
    """The model's own log-probs (T, V), and what its head is given (T, D), of one sequence."""
    seen: list[Tensor] = []
    head = causal_lm(model).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([ids])).logits[0]
    finally:
        hook.remove()
    return logits.float().log_softmax(-1), seen[0][0].float()


def value(folder: str, hidden_D: Tensor) -> Tensor:
    """What the value head in `folder` gives of hidden states."""
    head = load_file(f"{folder}/value_head.safetensors")
    return hidden_D @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"]


def check_scoring(settings: str) -> None:
    """Log-probs of sampler, actor and reference, and values, are the models' own forwards'."""
    state = init_state(load_config(settings))
    roles = state.roles
    stir([p for p in roles.trainable_parameters("actor") if min(p.shape) == 8], 0, 0.3)
    for head in (roles.critic_head, *roles.reward_heads.values()):
        if head is not None:
            stir([head.weight], 1, 1.0)
    how = {"sampling": Sampling.of(state.config), "template": state.template}
    prompts = trainer.next_prompts(state)
    rollout = sample(roles, prompts, tokenizer=state.tokenizer, seed=0, **how)
    scored = score(
        roles, rollout, state.reward(rollout), temperature=1.0, budget=state.budgets.scoring
    )
    rows = zip(rollout.input_ids_BT.tolist(), rollout.prompt_lengths, rollout.lengths, strict=True)
    own, values = {"actor": [], "reference": []}, []
    for row, prompt, length in rows:
        ids = row[:length]
        states = torch.arange(prompt - 1, length - 1)
        for role in own:
            with roles.use(role):
                logprobs, hidden = oracle(roles.base, ids)
            own[role].append(logprobs[states, torch.tensor(ids[prompt:])])
            if role == "actor" and roles.shares_trunk:
                values.append(roles.critic_head(hidden[states]).squeeze(-1))
        if not roles.shares_trunk:
            with roles.use("critic"):
                hidden = oracle(roles.base, ids)[1]
            values.append(roles.critic_head(hidden[states]).squeeze(-1))
    assert torch.allclose(scored.logprob_N, torch.cat(own["actor"]), **CLOSE)
    assert torch.allclose(scored.ref_logprob_N, torch.cat(own["reference"]), **CLOSE)
    assert torch.allclose(rollout.sampler_logprob_N, torch.cat(own["actor"]), **CLOSE)
    assert torch.allclose(scored.value_N, torch.cat(values).detach(), **CLOSE)


def check_reward(family: str, capsys: Any) -> None:
    """The exported classifier gives the score of base, adapter and head; or there is one line."""
    from fastppo.templates import get_template

    code = export(["rm", "rm_exported"])
    if family in NO_CLASSIFIER:
        assert code == 2
        line = capsys.readouterr().err.strip()
        assert f"transformers has no classifier of {family} that reads the last token" in line
        return
    assert code == 0
    template = get_template("chatml", zoo.TOKENIZER)
    turn = {"role": "user", "content": PROMPTS[2]}
    ids = template.encode_prompt([turn], "") + template.encode_response("yes, and more")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "rm")
    trained = value("rm", oracle(model, ids)[1][-1])
    classifier = AutoModelForSequenceClassification.from_pretrained("rm_exported").eval()
    with torch.no_grad():
        found = (
            classifier(input_ids=torch.tensor([ids])).logits[0, 0] + classifier.config.score_bias
        )
    assert torch.allclose(found, trained, **CLOSE)


def check_export(family: str) -> None:
    """The exported policy is base and adapter; a policy that trained whole is as it was saved."""
    ids = list(range(40, 64))
    assert export(["lora", "lora_exported"]) == 0
    base = AutoModelForCausalLM.from_pretrained("model")
    untrained = oracle(base, ids)[0]
    trained = oracle(PeftModel.from_pretrained(base, "lora"), ids)[0]
    assert not torch.allclose(trained, untrained, atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained("lora_exported")
    assert type(merged) is type(base)
    assert torch.allclose(oracle(merged, ids)[0], trained, **CLOSE)
    whole = oracle(AutoModelForCausalLM.from_pretrained("full"), ids)[0]
    assert not torch.allclose(whole, untrained, atol=1e-4)


def weights(folder: str) -> dict[str, Tensor]:
    paths = sorted(Path(folder).glob("*.safetensors"))
    return {f"{path.name} {k}": x for path in paths for k, x in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_family_goes_all_the_way(family, run, capsys):
    zoo.write(family, Path("model"))
    model = {"model_name_or_path": "model"}
    run({**RM, **model}, "rm")
    check_reward(family, capsys)
    run({**PPO, **model}, "lora", reward_model="rm", reward_model_type="lora")
    check_scoring("lora.yaml")
    run({**PPO, **model, **SPREAD}, "full", finetuning_type="full", critic="shared")
    check_scoring("full.yaml")
    check_export(family)
    before = weights("lora")
    run({**PPO, **model}, "lora", "resume_from_checkpoint=lora/checkpoint-1", reward_model="rm")
    after = weights("lora")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_docs_models_md_is_what_the_families_say():
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == page()
