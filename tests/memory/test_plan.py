"""The memory plan: arithmetic by hand, what fits which card, and what is proposed if it does not.

Numbers by hand are for Qwen2.5-7B: hidden 3584, 28 layers, 28 query and 4 key heads of 128,
intermediate 18944, vocabulary 152064, head apart from the embedding.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastppo.cli import main
from fastppo.config import Config
from fastppo.errors import UserError
from fastppo.memory import command as command
from fastppo.memory import units
from fastppo.memory.advice import REDUCTIONS, advise, with_reductions
from fastppo.memory.inputs import PlanInputs
from fastppo.memory.peak import PHASES
from fastppo.memory.plan import make_plan
from fastppo.memory.shapes import TABLE, find_shape_and_source, from_config, from_table
from fastppo.memory.units import GIB, RESERVE
from fastppo.memory.weights import Shapes
from tests.memory.plans import plan_inputs

ROOT = Path(__file__).resolve().parents[2]
SEVEN_B = TABLE["Qwen/Qwen2.5-7B"]
PPO = ROOT / "examples" / "qwen2.5-7b-ppo.yaml"
REWARD = ROOT / "examples" / "qwen2.5-7b-reward.yaml"

# Parameters as the hub counts them in the published safetensors (for tied heads once, for Gemma 3
# the language part).
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.3-70B": 70_553_706_496,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.2": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-1b": 999_885_952,
    "google/gemma-3-4b": 3_880_263_168,
    "google/gemma-3-12b": 11_766_034_176,
    "google/gemma-3-27b": 27_009_346_304,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
}


def inputs(**changes: Any) -> PlanInputs:
    """The tutorial's PPO at rank 64 and 2048 tokens."""
    settings = {
        "lora_rank": 64,
        "reward_rank": 64,
        "bf16": True,
        "cutoff_len": 1024,
        "max_new_tokens": 1024,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 8,
        **changes,
    }
    return plan_inputs(**settings)


def gib(rows: dict[str, int], *names: str) -> float:
    return sum(rows.get(name, 0) for name in names) / GIB


def test_every_shape_has_the_published_number_of_parameters():
    assert {name: shape.parameters for name, shape in TABLE.items()} == PUBLISHED


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B"),
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.3-70B"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("google/gemma-3-4b-it", "google/gemma-3-4b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M"),
        ("models/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
    ],
)
def test_variants_map_to_the_same_shape(name, entry):
    assert from_table(name) == (TABLE[entry], entry)


def test_a_variant_with_other_sizes_is_not_guessed():
    assert from_table("Qwen/Qwen2.5-Coder-7B") is None
    assert from_table("Qwen/Qwen3-30B-A3B") is None


CONFIG_JSON = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "torch_dtype": "bfloat16",
}


def test_a_config_json_gives_the_shape_of_the_table():
    assert from_config(CONFIG_JSON, "config.json") == SEVEN_B


def test_a_shape_is_found_in_the_folder_then_the_cache_then_the_table(tmp_path):
    found = find_shape_and_source("Qwen/Qwen2.5-7B", cache_dir=str(tmp_path))
    assert found == (SEVEN_B, "fastppo's table, Qwen/Qwen2.5-7B")
    smaller = {**CONFIG_JSON, "num_hidden_layers": 2}
    repository = tmp_path / "models--Qwen--Qwen2.5-7B"
    for path in (tmp_path / "folder", repository / "snapshots" / "abc"):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(smaller))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    shape, source = find_shape_and_source("Qwen/Qwen2.5-7B", cache_dir=str(tmp_path))
    assert shape.layers == 2
    assert source.startswith("the hub's cache")
    shape, source = find_shape_and_source(str(tmp_path / "folder"))
    assert shape.layers == 2
    assert source == str(tmp_path / "folder" / "config.json")


def test_weights_by_hand():
    # 7,615,616,512 parameters in 2 bytes.
    rows = make_plan(inputs(), Shapes(SEVEN_B)).columns["load"].rows
    assert gib(rows, "base weights") == pytest.approx(14.185, abs=0.001)
    # Linear layers, 28 x 233,046,016 = 6,525,288,448 at 0.5 + 1/64 + 4/(64 x 256) bytes: 3.135 GiB;
    # embedding and head in bf16, 2 x 544,997,376 x 2: 2.030 GiB; norms and biases 0.0008.
    four = make_plan(inputs(quantization_bit=4), Shapes(SEVEN_B)).columns["load"].rows
    assert gib(four, "base weights") == pytest.approx(5.166, abs=0.001)
    # A byte each, 6.077, and a float32 for each of 28 x 50,688 outputs, 0.005.
    eight = make_plan(inputs(quantization_bit=8), Shapes(SEVEN_B)).columns["load"].rows
    assert gib(eight, "base weights") == pytest.approx(8.113, abs=0.001)


def test_an_adapter_of_rank_64_by_hand():
    # Per layer 64 x (7168 + 2 x 4096 + 7168 + 3 x 22528) = 64 x 90,112 = 5,767,168;
    # x 28 = 161,480,704: 4 bytes of weight and gradient, 8 of Adam.
    assert SEVEN_B.lora_parameters(64) == 161_480_704
    rows = make_plan(inputs(), Shapes(SEVEN_B)).columns["update"].rows
    for role in ("actor", "critic"):
        whole = gib(rows, f"{role} adapter", f"{role} gradients", f"{role} optimiser")
        assert whole == pytest.approx(2.406, abs=0.001)
    assert gib(rows, "reward adapter") == pytest.approx(0.301, abs=0.001)  # frozen, in bf16


def test_kv_cache_by_hand():
    # 2 x 4 x 128 x 2 bytes x 28 layers = 56 KiB a token; 8 x 2048 tokens: 0.875 GiB.
    plan = make_plan(inputs(), Shapes(SEVEN_B))
    (last,) = [m for m in plan.peaks if m.name == "the last token of 8 sequences of 2048"]
    assert last.rows["KV cache"] == 8 * 2048 * 56 * 1024
    # Layers with a sliding window cache no more than the window.
    gemma = TABLE["google/gemma-2-2b"]
    assert gemma.cached_tokens(8192) == 13 * 8192 + 13 * 4096


def test_checkpoint_inputs_and_recompute_by_hand():
    plan = make_plan(inputs(), Shapes(SEVEN_B))
    (peak,) = [m for m in plan.peaks if m.name == "the actor's backward"]
    # 27 layers below the top one x 2048 x 3584 x 2 bytes = 0.369, and the hidden states of 1024
    # response tokens, 0.007.
    assert gib(peak.rows, "kept activations") == pytest.approx(0.376, abs=0.001)
    # One layer recomputed: 220 KiB a token kept, which is 0.43 for 2048, and on the way two
    # gradients of the MLP's width, 0.072 each.
    assert gib(peak.rows, "layer at work") == pytest.approx(0.43 + 2 * 0.072, rel=0.05)


def test_activations_without_checkpointing_by_hand():
    plan = make_plan(inputs(disable_gradient_checkpointing=True), Shapes(SEVEN_B))
    (loss,) = [m for m in plan.peaks if m.name == "the actor's loss"]
    # 220 KiB a token and layer: 12.0 GiB for 2048 tokens.
    assert gib(loss.rows, "kept activations") == pytest.approx(12.0, rel=0.04)


def test_head_chunk_by_hand():
    def chunk(**changes: Any) -> float:
        plan = make_plan(inputs(**changes), Shapes(SEVEN_B))
        (loss,) = [m for m in plan.peaks if m.name == "the actor's loss"]
        return loss.rows["head chunk"] / GIB

    # 512 MiB hold 882 rows of 152,064 float32 logits: 1024 response tokens go in 2 chunks of 512.
    # The gradient of the logits in bf16 is half as much again: 512 x 152,064 x 6 bytes. With 4
    # sequences 4096 tokens go in 5 chunks of 820.
    assert chunk() == pytest.approx(0.435, abs=0.001)
    assert chunk(per_device_train_batch_size=4) == pytest.approx(0.697, abs=0.001)
    # Float32 hidden states have their gradient in place of the logits.
    assert chunk(bf16=False, checkpoint_dtype="float32") == pytest.approx(0.290, abs=0.001)


def test_the_whole_by_hand():
    # Base and reward adapter, actor and critic: 14.185 + 0.301 + 2 x 2.406 = 19.30. On top of that
    # inputs 0.38 and one layer 0.58 to 0.64: 20.3, and the reserve.
    update = make_plan(inputs(), Shapes(SEVEN_B)).columns["update"]
    assert (update.total - RESERVE) / GIB == pytest.approx(20.3, abs=0.1)
    # A shared critic is a head: 2.4 less.
    shared = make_plan(inputs(critic="shared"), Shapes(SEVEN_B)).columns["update"]
    assert (update.total - shared.total) / GIB == pytest.approx(2.41, abs=0.03)
    # 4 bits: 5.17 + 2.41 + 0.30 + 1.2 + a tile of 18944 x 3584 x 2 bytes, 0.13.
    four = make_plan(inputs(critic="shared", quantization_bit=4), Shapes(SEVEN_B))
    assert (four.columns["update"].total - RESERVE) / GIB == pytest.approx(9.0, abs=0.1)


def test_a_separate_critic_at_2048_tokens_fits_22_and_a_half_gib():
    assert make_plan(inputs(), Shapes(SEVEN_B)).fits(int(22.5 * GIB))


def test_offloading_takes_the_inputs_of_8192_tokens_off_the_device():
    long = inputs(cutoff_len=4096, max_new_tokens=4096)
    kept = make_plan(long, Shapes(SEVEN_B))
    moved = make_plan(
        long.with_changes(activation_offloading="checkpoint+offload"), Shapes(SEVEN_B)
    )
    # 28 layers x 8192 x 3584 x 2 bytes = 1.53 GiB, of which one stays on the way.
    assert moved.host_bytes / GIB == pytest.approx(1.53, abs=0.01)
    assert kept.host_bytes == 0
    saved = kept.columns["update"].total - moved.columns["update"].total
    assert saved / GIB == pytest.approx(1.53 * 26 / 28, abs=0.01)


def test_a_full_finetune_has_16_bytes_a_parameter_and_a_frozen_copy():
    full = inputs(finetuning_type="full", critic="model", rewards=("full",))
    rows = make_plan(full, Shapes(SEVEN_B)).columns["update"].rows
    actor = gib(rows, "base weights", "actor gradients", "actor optimiser")
    critic = gib(rows, "critic weights", "critic gradients", "critic optimiser")
    # 2 x 16 x 7.6156e9 = 227 GiB; the reference's and the reward model's bf16, 14.2 and 13.2.
    assert actor + critic == pytest.approx(227, abs=0.5)
    assert gib(rows, "reference weights") == pytest.approx(14.19, abs=0.01)
    assert gib(rows, "reward weights") == pytest.approx(13.17, abs=0.01)


def test_frozen_layers_keep_nothing_for_the_backward():
    frozen = inputs(finetuning_type="freeze", freeze_trainable_layers=2, rewards=("function",))
    plan = make_plan(frozen, Shapes(SEVEN_B))
    (peak,) = [m for m in plan.peaks if m.name == "the actor's backward"]
    assert peak.rows["kept activations"] == (2048 + 1024) * 3584 * 2  # one layer below, the head
    rows = plan.columns["update"].rows
    assert gib(rows, "actor gradients") == pytest.approx(2 * 233_057_792 * 4 / GIB, abs=0.001)


@pytest.mark.parametrize("kind", ["function", "api"])
def test_a_server_or_function_reward_takes_no_memory(kind):
    rows = make_plan(inputs(rewards=(kind,)), Shapes(SEVEN_B)).peak.rows
    assert not [row for row in rows if row.startswith("reward")]


def test_a_reference_model_of_its_own_is_counted():
    small = TABLE["Qwen/Qwen2.5-1.5B"]
    plan = make_plan(inputs(ref_model="x"), Shapes(SEVEN_B, reference=small))
    assert plan.peak.rows["reference weights"] == small.parameters * 2


def test_rows_add_up_and_every_phase_is_there():
    for stage in ("ppo", "rm"):
        plan = make_plan(inputs(stage=stage, rewards=("lora",)), Shapes(SEVEN_B))
        assert list(plan.columns) == [p for p in PHASES if stage == "ppo" or p != "rollout"]
        lines = command.table(plan)
        for index, peak in enumerate(plan.columns.values()):
            assert peak.total == sum(peak.rows.values())
            column = [line[20 + 10 * index : 30 + 10 * index].strip() for line in lines]
            numbers = [float(x) for x in column[1 : len(lines) - len(plan.columns)] if x != "-"]
            assert numbers[-1] == pytest.approx(sum(numbers[:-1]), abs=0.06)


@pytest.mark.parametrize(
    ("file", "card", "code"),
    [
        (PPO, 16, 3),  # the base in bf16 is 14.2
        (PPO, 24, 0),
        (PPO, 48, 0),
        (PPO, 80, 0),  # keeps its activations
        (REWARD, 16, 3),
        (REWARD, 24, 3),  # 16 sequences of 2048 in a micro-batch, 31.6
        (REWARD, 48, 0),
        (REWARD, 80, 0),
    ],
)
def test_the_examples_on_four_cards(file, card, code, capsys):
    assert main([str(file), "--plan", "--gpu", f"{card}GiB"]) == code
    out = capsys.readouterr().out
    assert ("does not fit" in out) == bool(code)
    assert "fastppo's table, Qwen/Qwen2.5-7B" in out
    peak = {PPO: "38.28" if card == 80 else "22.01", REWARD: "31.55"}[file]
    assert f"peak {peak} GiB" in out
    assert f"activations are {'kept' if peak == '38.28' else 'recomputed'}: " in out


@pytest.mark.parametrize(("file", "card"), [(PPO, "21.9GiB"), (REWARD, "24GiB")])
def test_the_advised_changes_make_the_run_fit(file, card, capsys):
    assert main([str(file), "--plan", "--gpu", card]) == 3
    out = capsys.readouterr().out
    proposed = out[out.index("the smallest changes") :].splitlines()[1:]
    overrides = [word for line in proposed for word in line.split() if "=" in word]
    assert overrides
    assert main([str(file), *overrides, "--plan", "--gpu", card]) == 0
    last = float(proposed[-1].split()[-2])
    assert f"peak {last:.2f} GiB" in capsys.readouterr().out


KEYS = set(Config.model_fields)


@pytest.mark.parametrize("stage", ["ppo", "rm"])
@pytest.mark.parametrize("card", [8, 12, 16, 20, 24, 32])
def test_proposals_fit_and_none_of_them_is_idle(stage, card):
    plan = make_plan(
        inputs(stage=stage, per_device_eval_batch_size=8, reward_source="assumed"),
        Shapes(SEVEN_B),
    )
    advice = advise(plan, card * GIB, KEYS)
    assert advice.fits
    taken = {i: step.settings for i, step in enumerate(advice.steps)}
    assert with_reductions(plan, taken).fits(card * GIB)
    for left_out in list(taken)[:-1]:
        fewer = {i: settings for i, settings in taken.items() if i != left_out}
        assert not with_reductions(plan, fewer).fits(card * GIB)


def test_no_key_is_proposed_that_a_config_does_not_have(capsys):
    known = set(Config.model_fields)
    plan = make_plan(inputs(), Shapes(SEVEN_B))
    assert set(advise(plan, 4 * GIB, known).settings) <= known
    assert main([str(PPO), "--plan", "--gpu", "4GiB"]) == 3
    assert "no change of settings makes it fit" in capsys.readouterr().out


def test_no_bits_are_proposed_for_what_trains_whole():
    plan = make_plan(inputs(finetuning_type="full", rewards=("function",)), Shapes(SEVEN_B))
    assert not any("quantization_bit" in reduction(plan) for reduction in REDUCTIONS)


def test_which_dtype_is_assumed_is_said(capsys):
    assert main([str(REWARD), "--plan", "--gpu", "80GiB"]) == 0
    out = capsys.readouterr().out
    assert "base in bfloat16 (bf16 is not set: the checkpoint's own on a GPU)" in out
    assert plan_inputs(device="cpu").dtype == "float32"
    assert plan_inputs(checkpoint_dtype="float32").dtype == "float32"


def test_float16_takes_what_bfloat16_does(capsys):
    """Its gradients are float32 as well, and the loss scaler is two numbers."""
    assert main([str(REWARD), "--plan", "--gpu", "80GiB", "fp16=true"]) == 0
    assert "base in float16 (fp16: true)" in capsys.readouterr().out
    half = inputs(bf16=False, fp16=True, checkpoint_dtype="float32")
    plans = [make_plan(each, Shapes(SEVEN_B)) for each in (half, inputs())]
    assert [peak.rows for peak in plans[0].peaks] == [peak.rows for peak in plans[1].peaks]
    assert all(reduction(plans[0]).get("bf16") is None for reduction in REDUCTIONS)


def test_without_a_gpu_there_is_nothing_to_fit_into(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_gpu", lambda: None)
    assert main([str(PPO), "--plan"]) == 0
    assert "no GPU here" in capsys.readouterr().out


def test_without_a_size_the_plan_is_compared_with_the_machines_gpu(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_gpu", lambda: (22 * GIB, "RTX 2080 Ti"))
    assert main([str(PPO), "--plan"]) == 3
    assert "does not fit the RTX 2080 Ti here, 22.0 GiB" in capsys.readouterr().out


def test_rank_of_the_reward_adapter_is_read_where_it_is(project, capsys):
    adapter = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    (project / "reward" / "adapter_config.json").write_text(json.dumps(adapter))
    (project / "model" / "config.json").write_text(json.dumps(CONFIG_JSON))
    (project / "ppo.yaml").write_text(
        "stage: ppo\nmodel_name_or_path: ./model\nreward_model: reward\ndataset: prompts\n"
        "output_dir: out\n"
    )
    assert main(["ppo.yaml", "--plan", "--gpu", "80GiB"]) == 0
    assert "reward adapter of rank 4 (reward/adapter_config.json)" in capsys.readouterr().out
    assert not (project / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plan", "--gpu", "24"], "--gpu: '24' is no size; write for example 24GiB"),
        (["--plan", "--gpu"], "--gpu: '' is no size"),
        (["--plan", "--gpu=-1GiB"], "is no size"),
        (["--gpu", "24GiB"], "--gpu: is the size that --plan has to fit into"),
        (["--plan", "model_name_or_path=nobody/knows-it"], "the shape of nobody/knows-it"),
        (["--plan", "--cards"], "unknown option '--cards'"),
    ],
)
def test_bad_plans_are_one_line_and_code_2(arguments, words, capsys):
    assert main([str(PPO), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_config_json_without_sizes_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="does not say how large"):
        find_shape_and_source(str(tmp_path))


def test_sizes_are_exact():
    assert command.parse_size("24GiB") == 24 * 2**30
    assert command.parse_size("24GB") == 24 * 10**9
    assert command.parse_size("0.5 gib") == 2**29
    assert command.parse_size("24576MiB") == 24 * 2**30


HEAVY = {"torch", "transformers", "peft", "numpy"}


def test_a_plan_imports_no_torch():
    code = (
        "import sys; from fastppo.cli import main; "
        f"code = main([{str(PPO)!r}, '--plan', '--gpu', '80GiB']); "
        f"heavy = {HEAVY} & set(sys.modules); "
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


RUNS_TORCH = {"auto", "retry"}  # they ask a device what is free, and catch what it raises


def test_no_module_of_the_plan_imports_torch():
    """One process for all, which names the first module after whose import torch is there."""
    names = sorted({path.stem for path in Path(units.__file__).parent.glob("*.py")} - RUNS_TORCH)
    assert len(names) > 10
    code = (
        f"import importlib, sys\nfor name in {names}:\n"
        "    importlib.import_module('fastppo.memory.' + name)\n"
        f"    heavy = {HEAVY} & set(sys.modules)\n"
        "    assert not heavy, f'{name} imported {heavy}'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
