"""QLoRA, both stages: a run on quantised weights is the run on the same weights dequantised."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from fastppo import toy
from fastppo.config import Config
from fastppo.export.cli import main as export
from fastppo.memory.shapes import from_config
from fastppo.memory.weights import weight_bytes
from fastppo.models.load import load_base
from fastppo.ppo import trainer
from fastppo.ppo.columns import COLUMNS
from fastppo.rm import train as reward_model
from fastppo.run.preflight import check
from tests.memory.test_plan_measured import (
    come_and_go,
    measure,
    plan_for,
    rollout_of,
    tiny_state,
)
from tests.tiny import make_config, preferences

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
WAYS = {
    "nf4": {"quantization_bit": 4},
    "fp4": {"quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False},
    "int8": {"quantization_bit": 8},
}
# Half the widest gap between neighbours of the 4-bit codes, as a share of a block's largest weight.
HALF_A_GAP = {"nf4": (1 - 0.6962) / 2, "fp4": (1 - 0.6667) / 2}
PAIRS = preferences(16)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as wide as a block of 4-bit numbers at least, which is 64."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    toy.write_model(folder, hidden_size=64)
    return folder


def quantised_layers(base: nn.Module) -> dict[str, nn.Module]:
    """The layers of `base` whose weights are in few bits, by name."""
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point()
    }


@pytest.fixture(scope="module")
def dequantised(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By way of quantisation: a plain float32 model whose weights are those after it."""
    folders = {}
    for way, keys in WAYS.items():
        folder = tmp_path_factory.mktemp("dequantised") / "model"
        shutil.copytree(wide, folder)
        settings = make_config(wide, folder.parent, **keys)
        layers = quantised_layers(load_base(settings, CPU, bits=keys["quantization_bit"]))
        plain = AutoModelForCausalLM.from_pretrained(wide)
        with torch.no_grad():
            for name, layer in layers.items():
                plain.get_submodule(name).weight.copy_(dequantize_module_weight(layer))
        assert len(layers) == 7 * plain.config.num_hidden_layers
        plain.save_pretrained(folder)
        folders[way] = folder
    return folders


def ppo(model: Path, folder: Path, **keys: Any) -> list[dict[str, float]]:
    """Run stage ppo on `model`; the rows of its CSV, but for clocks."""
    folder.mkdir(exist_ok=True)
    settings = {"max_new_tokens": 16, "max_steps": 3, "critic": "adapter", "lora_rank": 4, **keys}
    config = make_config(model, folder, **settings)
    trainer.run(config, check(config))
    with (folder / "metrics" / "training_metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    clocks = [name for name, text in COLUMNS.items() if text.endswith("(a clock)")]
    return [{k: float(v) for k, v in row.items() if k not in clocks} for row in rows]


def rm(model: Path, folder: Path, **keys: Any) -> list[dict[str, float]]:
    """Run stage rm on `model`; its log entries, but for clocks."""
    folder.mkdir(exist_ok=True)
    (folder / "pairs.json").write_text(json.dumps(PAIRS))
    settings = {
        "stage": "rm",
        "model_name_or_path": str(model),
        "dataset": str(folder / "pairs.json"),
        "val_size": 4,
        "template": "chatml",
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lora_rank": 4,
        "logging_steps": 1,
        "max_steps": 4,
        "eval_strategy": "steps",
        **keys,
    }
    config = Config(**settings)
    reward_model.run(config, check(config))
    log = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    clocks = ("runtime", "second")
    return [{k: v for k, v in row.items() if not any(c in k for c in clocks)} for row in log]


STAGES = {"ppo": ppo, "rm": rm}
# Stage rm loads the base by the same function as stage ppo: there one way of each kind says most.
RUNS = [*((way, "ppo") for way in WAYS), ("nf4", "rm"), ("int8", "rm")]


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_is_off_by_half_a_gap_of_its_code_at_most(wide, dequantised, way):
    exact = AutoModelForCausalLM.from_pretrained(wide).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(dequantised[way]).state_dict().items():
        error, own = (weight - exact[name]).abs(), exact[name].abs()
        if not name.startswith("model.layers") or "norm" in name:
            assert error.max() == 0, name  # embeddings, norms and the head stay whole
            continue
        assert error.max() > 0, name
        if way == "int8":  # a step of largest / 127 a row; rounded by way of float16
            bound = own.amax(1, keepdim=True) * (0.5 / 127 + 2.0**-11)
            assert (error <= bound).all(), name
            continue
        largest = own.reshape(-1, 64).amax(1, keepdim=True)
        # Doubly quantised, a block's largest is off by half a gap of its own 8-bit code.
        off = 0.5 * 0.9 / 64 * (largest - largest.mean()).abs().max() if way == "nf4" else 0.0
        assert (error.reshape(-1, 64) <= 1.01 * HALF_A_GAP[way] * largest + off).all(), name


def same(mine: dict[str, float], other: dict[str, float]) -> bool:
    """Whether two log entries, or rows, say the same but for float32's rounding."""
    # Rounding itself; and what is common to all scores, the head's bias: a pair's loss has no
    # gradient for it but rounding, and Adam scales that to a whole step.
    apart = {"sampler_gap", "sampler_gap_abs", "eval_chosen_score", "eval_rejected_score"}
    # A KL is the difference of two log-probs of a response, of some 50 nats: off by 1e-6 of those.
    small = dict.fromkeys(("kl", "kl_controlled", "eval_kl"), 5e-5)
    assert mine.keys() == other.keys()
    return all(
        mine[k] == pytest.approx(other[k], rel=1e-3, abs=small.get(k, 1e-5))
        for k in mine.keys() - apart
    )


@pytest.mark.parametrize(("way", "stage"), RUNS)
def test_a_quantised_run_is_the_run_on_its_weights_dequantised(
    wide, dequantised, tmp_path, way, stage
):
    """Every number of the log, in float32: scores, KL, losses, gradient norms, evaluations."""
    quantised = STAGES[stage](wide, tmp_path / "quantised", **WAYS[way])
    plain = STAGES[stage](dequantised[way], tmp_path / "plain")
    whole = STAGES[stage](wide, tmp_path / "whole")
    assert len(quantised) == len(plain) > 2
    assert all(same(mine, other) for mine, other in zip(quantised, plain, strict=True))
    assert not same(quantised[0], whole[0])


def logprobs(made: Any, rollout: Any) -> torch.Tensor:
    """Log-probs of the rollout's tokens by a plain causal language model, with gradients."""
    ids_BT = rollout.input_ids_BT
    found_BTV = made(input_ids=ids_BT).logits.log_softmax(-1)
    rows = zip(rollout.prompt_lengths, rollout.response_lengths, strict=True)
    return torch.cat(
        [
            found_BTV[i, p - 1 : p + n - 1].gather(1, ids_BT[i, p : p + n, None])[:, 0]
            for i, (p, n) in enumerate(rows)
        ]
    )


@pytest.mark.parametrize("way", WAYS)
def test_the_distance_to_float32_is_what_the_weights_rounding_makes(
    wide, dequantised, tmp_path, way, rollout
):
    """The mean log-prob moves by the gradient times the weights' error, to higher orders of it.

    In 8 bits the error is so small that the mean of the gradients at both ends says how far, to the
    third order. In 4 bits it is not; no order then moves it by more than the first does where every
    weight's error has the gradient's sign.
    """
    weights = [
        AutoModelForCausalLM.from_pretrained(folder).double().state_dict()
        for folder in (wide, dequantised[way])
    ]
    made = AutoModelForCausalLM.from_pretrained(wide).double()
    error = {name: weights[1][name] - weights[0][name] for name in weights[0]}
    found, moved, most = [], [], []
    for state_dict in weights:
        made.load_state_dict(state_dict)
        made.zero_grad()
        mean = logprobs(made, rollout).mean()
        mean.backward()
        products = [p.grad * error[name] for name, p in made.named_parameters()]
        found.append(mean.item())
        moved.append(sum(x.sum().item() for x in products))
        most.append(sum(x.abs().sum().item() for x in products))
    state = trainer.init_state(make_config(wide, tmp_path, **WAYS[way]))
    with state.roles.use("reference"), torch.no_grad():
        mine = logprobs(state.roles.base, rollout).mean().item()
    assert mine == pytest.approx(found[1], abs=1e-5), "the float32 model that has these weights"
    assert 0 < abs(mine - found[0]) <= max(most)
    if way == "int8":
        assert mine - found[0] == pytest.approx(sum(moved) / 2, rel=0.02)


def bytes_of(made: nn.Module) -> int:
    """Storages of a model's weights, of their scales and tables of codes."""
    tensors = list(made.parameters())
    for weight in made.parameters():
        state = getattr(weight, "quant_state", None)
        tensors += [x for x in (getattr(weight, "SCB", None),) if x is not None]
        if state is not None:
            tensors += [state.absmax, state.code]
        if state is not None and state.nested:
            tensors += [state.offset, state.state2.absmax, state.state2.code]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("way", WAYS)
def test_the_plan_counts_a_quantised_models_bytes(wide, tmp_path, way, bf16):
    keys = {**WAYS[way], "bf16": bf16}
    base = load_base(make_config(wide, tmp_path, **keys), CPU, bits=keys["quantization_bit"])
    shape = from_config(base.config.to_dict(), "the model's own")
    double = keys.get("double_quantization", True)
    planned = weight_bytes(shape, 2 if bf16 else 4, keys["quantization_bit"], double=double)
    assert planned == bytes_of(base)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_plan_of_a_quantised_run_is_within_10_percent_of_what_is_allocated(
    tmp_path, template, way, recomputed
):
    """Of 8 bits too: their layers hold no input in the graph, so checkpointing frees it."""
    toy.write_model(tmp_path / "model", hidden_size=64, layers=4)
    keys = {**WAYS[way], "disable_gradient_checkpointing": not recomputed}
    prompts = [90, 61, 40, 83]
    state = tiny_state(tmp_path, len(prompts), **keys)
    shape = from_config(state.roles.base.config.to_dict(), "the model's own")
    plan = plan_for(state, shape, prompts, 60)
    measured = measure(state, rollout_of(prompts, 60, shape.vocab, template))
    for phase, peak in measured.items():
        assert come_and_go(plan, phase) == pytest.approx(peak, rel=0.1), phase


# State in 8 bits is for parameters of 4096 numbers at least: 64 x 64 here.
MORE = {"8-bit AdamW": {"quantization_bit": 4, "optim": "paged_adamw_8bit", "lora_rank": 64}}


@pytest.mark.parametrize(("way", "stage"), [*RUNS, ("8-bit AdamW", "ppo"), ("8-bit AdamW", "rm")])
def test_a_quantised_run_resumes_to_the_bit(wide, tmp_path, way, stage):
    keys = {**WAYS, **MORE}[way]
    unbroken = STAGES[stage](wide, tmp_path / "run", save_steps=2, **keys)
    out = tmp_path / "run" / "out"
    resumed = STAGES[stage](
        wide, tmp_path / "on", resume_from_checkpoint=str(out / "checkpoint-2"), **keys
    )
    assert resumed == unbroken
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        mine, other = (load_file(folder / name) for folder in (tmp_path / "on" / "out", out))
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[k], other[k]) for k in mine)


@pytest.mark.parametrize("way", WAYS)
def test_what_trained_on_quantised_weights_is_exported_onto_whole_ones(
    wide, dequantised, tmp_path, way, rollout
):
    """Onto the base by default; onto the dequantised one it is the policy that trained."""
    ppo(wide, tmp_path / "run", learning_rate=1e-2, **WAYS[way])
    out = tmp_path / "run" / "out"
    assert export([str(out), str(tmp_path / "whole")]) == 0
    given = f"model_name_or_path={dequantised[way]}"
    assert export([str(out), str(tmp_path / "near"), given]) == 0
    settings = make_config(wide, tmp_path, **WAYS[way])
    base = load_base(settings, CPU, bits=settings.quantization_bit)
    policy = PeftModel.from_pretrained(base, str(out))
    with torch.no_grad():
        mine = logprobs(policy, rollout)
        with policy.disable_adapter():
            assert (logprobs(policy, rollout) - mine).abs().max() > 0.01, "it has learnt"
        exported = {
            name: logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / name), rollout)
            for name in ("whole", "near")
        }
    torch.testing.assert_close(exported["near"], mine, atol=1e-4, rtol=1e-4)
    assert (exported["whole"] - mine).abs().max() > 1e-3, "quantised weights are other weights"
