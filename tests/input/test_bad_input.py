"""Everything wrong that a user can hand in: one line that names it and the cure, exit code 2.

Nothing is written, and nothing heavy is imported first. All in one process, through main(argv).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastppo.cli import main

from .conftest import PPO, PROMPTS, RM, write_head, write_json


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def refused(
    argv: list[str], project: Path, capsys: pytest.CaptureFixture[str], *words: str
) -> None:
    before = tree(project)
    code = main(argv)
    out, err = capsys.readouterr()
    assert code == 2, (out, err)
    assert err.startswith("fastppo-train: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err + out
    for word in words:
        assert word in err, err
    assert tree(project) == before


def write(project: Path, settings: Any, name: str = "run.yaml") -> list[str]:
    text = settings if isinstance(settings, str) else yaml.safe_dump(settings, allow_unicode=True)
    (project / name).write_text(text, encoding="utf-8")
    return [name]


COMMAND_LINES: list[tuple[list[str], tuple[str, ...]]] = [
    ([], ("no CONFIG", "name a YAML file")),
    (["--fast"], ("unknown option '--fast'", "key=value")),
    (["absent.yaml"], ("absent.yaml: no such file", "name a YAML file")),
    (["data"], ("data: is a folder", "name the YAML file in it")),
    (["good.yaml", "learning_rate"], ("'learning_rate': not key=value", "learning_rate=2e-5")),
    (["good.yaml", "=3"], ("'=3': not key=value",)),
    (["good.yaml", "lora_rnk=3"], ("unknown key 'lora_rnk'", "did you mean 'lora_rank'?")),
    (["good.yaml", "lora_rank=x"], ("lora_rank: 'x' is wrong", "a valid integer")),
]


@pytest.mark.parametrize(("argv", "words"), COMMAND_LINES, ids=lambda value: str(value)[:40])
def test_command_lines(project, capsys, argv, words):
    write(project, PPO, "good.yaml")
    refused(argv, project, capsys, *words)


FILES: list[tuple[str | bytes, tuple[str, ...]]] = [
    ("", ("run.yaml: is empty", "stage, model_name_or_path, dataset, output_dir")),
    ("# only a comment\n", ("run.yaml: is empty",)),
    ("- stage\n- ppo\n", ("run.yaml: is a list, not a mapping", "key: value")),
    ("just words", ("run.yaml: is a str, not a mapping",)),
    ("stage: ppo\nlora_rank: [1, 2\n", ("run.yaml: not YAML, line", "mend the line")),
    ("stage: ppo\n\tseed: 1\n", ("run.yaml: not YAML, line 2",)),
    ("stage: ppo\nseed: 1\nseed: 2\n", ("run.yaml: line 3: 'seed' is given twice; keep one",)),
    ("stage: !!python/object/apply:os.system [ls]\n", ("run.yaml: not YAML, line 1",)),
    (b"stage: ppo\nseed: \xff\xfe\n", ("run.yaml: not UTF-8 at byte 17", "save it as UTF-8")),
]


@pytest.mark.parametrize(("content", "words"), FILES, ids=lambda value: repr(value)[:40])
def test_files(project, capsys, content, words):
    data = content if isinstance(content, bytes) else content.encode()
    (project / "run.yaml").write_bytes(data)
    refused(["run.yaml"], project, capsys, *words)


def test_a_json_file_that_is_none(project, capsys):
    (project / "run.json").write_text('{"stage": "ppo",\n "seed": }')
    refused(["run.json"], project, capsys, "run.json: not JSON, line 2")


VALUES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"per_device_batch_size": 1}, ("unknown key 'per_device_batch_size'", "did you mean")),
    ({"zzzz": 1}, ("unknown key 'zzzz'", "docs/config.md")),
    ({"ppo_epochs": "many"}, ("ppo_epochs: 'many' is wrong", "a valid integer")),
    ({"ppo_epochs": 1.5}, ("ppo_epochs: 1.5 is wrong", "integer")),
    ({"ppo_epochs": 0}, ("ppo_epochs: 0 is wrong", "greater than or equal to 1")),
    ({"ppo_epochs": [4]}, ("ppo_epochs: [4] is wrong",)),
    ({"learning_rate": "fast"}, ("learning_rate: 'fast' is wrong", "a valid number")),
    ({"learning_rate": -1e-5}, ("learning_rate: -1e-05 is wrong", "greater than or equal to 0")),
    ({"learning_rate": float("nan")}, ("learning_rate: nan is wrong",)),
    ({"learning_rate": float("inf")}, ("learning_rate: inf is wrong", "finite")),
    ({"bf16": "perhaps"}, ("bf16: 'perhaps' is wrong", "a valid boolean")),
    ({"template": 5}, ("template: 5 is wrong", "a valid string")),
    ({"output_dir": ["a"]}, ("output_dir: ['a'] is wrong",)),
    ({"per_device_train_batch_size": 0}, ("per_device_train_batch_size: 0 is wrong",)),
    ({"top_p": 0}, ("top_p: 0 is wrong", "greater than 0")),
    ({"top_p": 2}, ("top_p: 2 is wrong", "less than or equal to 1")),
    ({"top_k": -1}, ("top_k: -1 is wrong",)),
    ({"temperature": 0}, ("temperature: 0 is wrong", "greater than 0")),
    ({"repetition_penalty": 0}, ("repetition_penalty: 0 is wrong",)),
    ({"cliprange": 0}, ("cliprange: 0 is wrong",)),
    ({"lam": 1.5}, ("lam: 1.5 is wrong", "less than or equal to 1")),
    ({"gamma": -1}, ("gamma: -1 is wrong", "greater than or equal to 0")),
    ({"horizon": 0}, ("horizon: 0 is wrong",)),
    ({"ppo_target": 0}, ("ppo_target: 0 is wrong",)),
    ({"init_kl_coef": -0.1}, ("init_kl_coef: -0.1 is wrong",)),
    ({"val_size": -1}, ("val_size: -1 is wrong",)),
    ({"val_size": 1.5}, ("val_size: above 1 it is a count", "whole number")),
    ({"val_size": 4}, ("val_size: holds out 4 of 4 records", "lower it")),
    ({"val_size": 1, "eval_dataset": "prompts"}, ("val_size: leave it out where eval_dataset",)),
    ({"lora_rank": 0}, ("lora_rank: 0 is wrong",)),
    ({"lora_dropout": 1.0}, ("lora_dropout: 1.0 is wrong", "less than 1")),
    ({"max_new_tokens": 0}, ("max_new_tokens: 0 is wrong",)),
    ({"max_new_tokens": 4, "min_new_tokens": 5}, ("min_new_tokens: is above max_new_tokens",)),
    ({"seed": -1}, ("seed: -1 is wrong",)),
    ({"stage": "sft"}, ("stage: sft", "trains stage rm and stage ppo")),
    ({"stage": "dpo"}, ("stage: dpo", "trains stage rm and stage ppo")),
    ({"stage": "ppoo"}, ("stage: 'ppoo' is none of rm or ppo", "did you mean ppo?")),
    ({"do_train": False}, ("do_train: false leaves nothing to do", "true or leave it out")),
    ({"do_predict": True}, ("do_predict: there is no predict here",)),
    ({"finetuning_type": "oft"}, ("finetuning_type: oft: not supported", "use finetuning_type")),
    ({"critic": "both"}, ("critic: 'both' is none of adapter, shared or model",)),
    ({"kl_penalty": "k1"}, ("kl_penalty: 'k1' is none of kl, abs, mse, low_var_kl",)),
    ({"lr_scheduler_type": "cosin"}, ("lr_scheduler_type: 'cosin'", "did you mean cosine?")),
    ({"report_to": "mlflow"}, ("report_to: 'mlflow' is none of", "choose one of them")),
    ({"flash_attn": "fa9"}, ("flash_attn: 'fa9' is none of", "did you mean fa2?")),
    ({"fp16": True}, ("fp16: not supported", "use bf16: true")),
    ({"pure_bf16": True}, ("pure_bf16: not supported", "use bf16: true")),
    ({"deepspeed": "ds.json"}, ("deepspeed: not supported", "leave it out")),
    ({"pissa_init": True}, ("pissa_init: not supported", "leave it out")),
    ({"quantization_method": "gptq"}, ("quantization_method: gptq: not supported", "use bnb")),
    ({"streaming": True}, ("streaming: not supported",)),
    ({"template": "qwem"}, ("template: 'qwem' is unknown", "did you mean 'qwen'?")),
    ({"template": "klingon"}, ("template: 'klingon' is unknown", "there are default")),
    ({"model_name_or_path": "./absent"}, ("model_name_or_path: no folder ./absent", "owner/name")),
    ({"model_name_or_path": "data"}, ("model_name_or_path: data has no config.json",)),
    ({"dataset": "promts"}, ("dataset: data/dataset_info.json names no 'promts'", "'prompts'?")),
    ({"dataset": "xyz"}, ("names no 'xyz'", "it has prompts, pairs")),
    ({"dataset": "gone"}, ("'gone' names data/gone.json, which is not there", "check file_name")),
    ({"dataset": "mine.json"}, ("dataset: no file mine.json", "check the path")),
    (
        {"dataset_dir": "elsewhere"},
        ("dataset_dir: no elsewhere/dataset_info.json", "set dataset_dir"),
    ),
    ({"eval_dataset": "nope"}, ("eval_dataset: data/dataset_info.json names no 'nope'",)),
    ({"dataset": "pairs"}, ("stage ppo learns from prompts, and 'pairs' is a set of pairs",)),
    ({"reward_model": "absent"}, ("reward_model: no folder absent", "stage: rm")),
    ({"reward_model": None}, ("reward_model: stage ppo needs one", "stage rm")),
    ({"output_dir": "data"}, ("output_dir: data is not empty", "overwrite_output_dir: true")),
    ({"output_dir": "run.yaml"}, ("output_dir: run.yaml is a file", "name a folder")),
]


@pytest.mark.parametrize(("change", "words"), VALUES, ids=lambda value: str(value)[:50])
def test_values(project, capsys, change, words):
    refused(
        write(project, {**PPO, **change}),
        project,
        capsys,
        "run.yaml: " if "dataset" not in change or "gone" not in str(change) else "gone",
        *words,
    )


@pytest.mark.parametrize(
    "key", ["stage", "model_name_or_path", "dataset", "output_dir", "reward_model"]
)
def test_a_key_that_is_needed_is_missing(project, capsys, key):
    settings = {k: v for k, v in PPO.items() if k != key}
    refused(write(project, settings), project, capsys, "run.yaml: ", f"{key}:")
    if key != "reward_model":
        refused(write(project, {**settings, key: None}), project, capsys, f"{key}: has no value")


def test_prompts_for_a_reward_model(project, capsys):
    words = ("stage rm learns from pairs, and 'prompts' is not marked", "chosen, rejected")
    refused(write(project, {**RM, "dataset": "prompts"}), project, capsys, *words)


def test_resuming_a_reward_model(project, capsys):
    settings = {**RM, "resume_from_checkpoint": True}
    refused(
        write(project, settings), project, capsys, "resume_from_checkpoint: only stage ppo resumes"
    )


RECORDS: list[tuple[str, Any, tuple[str, ...]]] = [
    ("prompts", [], ("'prompts' (data/prompts.json) has no records", "add some")),
    (
        "prompts",
        [{"input": ""}, *PROMPTS[:1], {"output": "x"}],
        (
            "data/prompts.json: 2 of 3 rows are bad (row 1: has no 'instruction'; row 3: has no "
            "'instruction'); mend them, or what describes them",
        ),
    ),
    (
        "prompts",
        [{"instruction": i} for i in range(9)],
        ("9 of 9 rows are bad (row 1: ", "row 3: 'instruction' is a int, not text; ...)"),
    ),
    ("prompts", [{"instruction": ""}], ("row 1: has no 'instruction'",)),
    ("prompts", [{"instruction": 7}], ("row 1: 'instruction' is a int, not text", "mend them")),
    ("prompts", ["text"], ("row 1: is a str, not an object",)),
    (
        "pairs",
        [{"instruction": "a", "chosen": "b"}],
        ("row 1: has no 'rejected'", "mend them"),
    ),
    ("pairs", [{"instruction": "a", "rejected": "b"}], ("row 1: has no 'chosen'",)),
    ("chats", [{"conversations": []}], ("row 1: has no 'conversations'",)),
    (
        "chats",
        [{"conversations": [{"from": "gpt", "value": "x"}]}],
        ("row 1: turns are", "alternate"),
    ),
    (
        "chats",
        [{"conversations": [{"from": "human", "value": "x"}] * 2}],
        ("turns are user, user", "must alternate"),
    ),
    (
        "chats",
        [{"conversations": [{"from": "cat", "value": "x"}]}],
        ("a turn by nobody known", "human"),
    ),
]


@pytest.mark.parametrize(("name", "rows", "words"), RECORDS, ids=lambda value: str(value)[:40])
def test_records(project, capsys, name, rows, words):
    write_json(project / "data" / f"{name}.json", rows)
    settings = {**(RM if name == "pairs" else PPO), "dataset": name}
    refused(write(project, settings), project, capsys, f"data/{name}.json", *words)


def broken(name: str, content: str) -> Callable[[Path], None]:
    return lambda project: (project / name).write_text(content) and None


BROKEN: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (broken("data/prompts.json", '[\n {"instruction": "a"},\n {"b" 1}\n]'), ("not JSON, line 3",)),
    (
        broken("data/prompts.json", '{"instruction" "a"}\n{"instruction" "b"}\n'),
        ("2 of 2 rows are bad (row 1: not JSON (Expecting ':' delimiter)", "mend them"),
    ),
    (broken("data/dataset_info.json", "{"), ("data/dataset_info.json: not JSON", "mend it")),
    (
        broken("data/dataset_info.json", '{"prompts": {}}'),
        ("'prompts' has no file_name", "add one"),
    ),
    (broken("model/config.json", "{"), ("model/config.json cannot be read", "replace it")),
    (broken("reward/value_head.safetensors", "x"), ("has no v_head.summary.weight", "stage: rm")),
    (lambda p: (p / "reward/value_head.safetensors").unlink(), ("has no value head",)),
    (
        lambda p: (p / "reward/adapter_config.json").unlink(),
        ("has no adapter (adapter_config.json)",),
    ),
    (
        lambda p: (p / "reward/adapter_model.safetensors").unlink(),
        ("has no adapter (adapter_model",),
    ),
    (lambda p: write_head(p / "reward", 48), ("hidden size 48, and ./model has 32", "same base")),
]


@pytest.mark.parametrize(("damage", "words"), BROKEN, ids=lambda value: str(value)[:40])
def test_damaged_files(project, capsys, damage, words):
    damage(project)
    refused(write(project, PPO), project, capsys, *words)


@pytest.mark.parametrize(
    ("key", "asked", "extra"),
    [("report_to", "wandb", "tracking"), ("flash_attn", "fa2", "flash-attn")],
)
def test_a_package_that_is_not_installed(project, capsys, monkeypatch, key, asked, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = (f"{key}: {asked} needs a package", f"pip install 'fastppo[{extra}]'")
    refused(write(project, {**PPO, key: asked}), project, capsys, *words)


MORE: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"lora_rank": True}, ("lora_rank: true is wrong",)),
    ({"seed": 10**30}, ("seed: ", "is wrong")),
    ({"output_dir": " "}, ("output_dir: is empty or no path",)),
    ({"output_dir": "run.yaml/out"}, ("output_dir: run.yaml is a file",)),
    ({"metrics_dir": "run.yaml"}, ("metrics_dir: run.yaml is a file", "name a folder")),
    ({"output_dir": "model", "overwrite_output_dir": True}, ("is model_name_or_path itself",)),
    ({"output_dir": "reward", "overwrite_output_dir": True}, ("is reward_model itself",)),
    ({"reward_model_type": "function"}, ("reward_model: 'reward' is not module:function",)),
    ({"eval_judge": "x"}, ("eval_judge: 'x' is not module:function", "mine.rewards:short")),
    ({"model_gguf_file": "m.gguf"}, ("model_gguf_file: no m.gguf in ./model",)),
    ({"model_name_or_path": "./" + "x" * 5000}, ("File name too long", "check the path")),
    ({"resume_from_checkpoint": "gone"}, ("no training_state.pt in gone", "checkpoint-N")),
    ({"resume_from_checkpoint": True}, ("out has no checkpoint-N", "leave it out")),
    ({"dataset": "prompts,,chats"}, ("dataset: names nothing between two commas",)),
    ({"dataset": "mine.parquet"}, ("dataset: no file mine.parquet", "check the path")),
    ({"dataset_dir": "REMOTE:a/b"}, ("dataset_dir: REMOTE: is not supported", "download")),
    ({"mix_strategy": "mixed"}, ("mix_strategy: 'mixed' is none of concat",)),
    ({"interleave_probs": "0.5,0.5"}, ("means nothing to mix_strategy: concat",)),
    (
        {"mix_strategy": "interleave_under", "interleave_probs": "0.5,x"},
        ("interleave_probs: '0.5,x' is no list of shares",),
    ),
    (
        {"mix_strategy": "interleave_under", "interleave_probs": [0.5, 0.6]},
        ("interleave_probs: '0.5,0.6'", "add up to 1"),
    ),
    (
        {
            "mix_strategy": "interleave_under",
            "interleave_probs": "1.0",
            "dataset": "prompts,chats",
        },
        ("interleave_probs: has 1 numbers for 2 data sets",),
    ),
    ({"tool_format": "qwen"}, ("tool_format: not supported",)),
    ({"eval_on_each_dataset": True}, ("eval_on_each_dataset: not supported", "one set a run")),
    ({"dataset": "data/pairs.json"}, ("stage ppo learns from prompts", "set of pairs")),
]


@pytest.mark.parametrize(("change", "words"), MORE, ids=lambda value: str(value)[:50])
def test_values_that_only_the_disk_or_another_key_shows_wrong(project, capsys, change, words):
    refused(write(project, {**PPO, **change}), project, capsys, "run.yaml: ", *words)


ENTRIES: list[tuple[Any, tuple[str, ...]]] = [
    ([1], ("is not an object of data sets by name",)),
    ({"d": "prompts.json"}, ("'d' is a str, not an object",)),
    ({"d": {"file_name": 5}}, ("file_name is not text",)),
    (
        {"d": {"file_name": "prompts.json", "columns": ["a"]}},
        ("columns is not an object of names",),
    ),
    ({"d": {"file_name": "prompts.json", "columns": {"prompt": ["a"]}}}, ("columns is not an",)),
    ({"d": {"file_name": "prompts.json", "tags": ["a"]}}, ("tags is not an object of names",)),
    ({"d": {"file_name": "prompts.json", "formatting": "chat"}}, ("alpaca, sharegpt or openai",)),
    ({"d": {"file_name": "prompts.json", "ranking": "yes"}}, ("ranking is 'yes'", "true or false")),
    ({"d": {"file_name": "prompts.json", "num_samples": 0}}, ("num_samples is 0", "a count")),
    (
        {"d": {"file_name": "prompts.json", "columns": {"response": "output"}}},
        ("columns names no prompt", "none has a default"),
    ),
    (
        {"d": {"file_name": "chats.json", "formatting": "openai", "columns": {"system": "s"}}},
        ("columns names no messages",),
    ),
    (
        {"d": {"file_name": "prompts.json", "columns": {"prompt": "a", "images": "i"}}},
        ("has pictures (columns: images)", "learns from text"),
    ),
    (
        {"d": {"file_name": "prompts.json", "columns": {"prompt": "a", "kto_tag": "label"}}},
        ("(KTO) (columns: kto_tag)", "pairs of answers"),
    ),
    ({"d": {"ms_hub_url": "a/b"}}, ("is on ModelScope (ms_hub_url)", "give a file_name")),
    ({"d": {"om_hub_url": "a/b"}}, ("is on openMind (om_hub_url)",)),
    ({"d": {"script_url": "load.py", "file_name": "x"}}, ("is a script to run (script_url)",)),
    ({"d": {"cloud_file_name": "s3://a/b.json"}}, ("in a cloud's storage (cloud_file_name)",)),
    ({"d": {"file_name": "../run.yaml"}}, ("file_name ../run.yaml leads out of data", "move the")),
    ({"d": {"file_name": "/etc/hostname"}}, ("file_name /etc/hostname leads out of data",)),
    ({"d": {"file_name": "link.json"}}, ("file_name link.json leads out of data",)),
    ({"d": {"file_name": "mixed"}}, ("data/mixed: holds csv, json files", "one type")),
    ({"d": {"file_name": "notes.md"}}, ("data/notes.md: holds no json, jsonl, csv",)),
    ({"d": {"file_name": "prompts.json", "split": "test"}}, ("prompts.json: cannot be read",)),
    ({"d": {"file_name": "empty"}}, ("data/empty: holds no json, jsonl, csv, parquet",)),
    ({"d": {"file_name": "bad.parquet"}}, ("data/bad.parquet: cannot be read", "replace it")),
]


@pytest.mark.parametrize(("info", "words"), ENTRIES, ids=lambda value: str(value)[:50])
def test_entries_of_dataset_info_of_another_shape(project, capsys, tmp_path_factory, info, words):
    for name in ("empty", "mixed"):
        (project / "data" / name).mkdir()
    for name in ("mixed/a.json", "mixed/b.csv", "notes.md"):
        (project / "data" / name).write_text("[]")
    (project / "data" / "link.json").symlink_to(project / "model" / "config.json")
    (project / "data" / "bad.parquet").write_bytes(b"x")
    write_json(project / "data" / "dataset_info.json", info)
    settings = {**PPO, "dataset": "d", "cache_dir": str(tmp_path_factory.mktemp("cache"))}
    refused(write(project, settings), project, capsys, *words)


CONTENT: list[tuple[str, tuple[str, ...]]] = [
    ('[{"instruction": "  "}]', ("row 1: 'instruction' is blank",)),
    ('[{"instruction": "\\ud800"}]', ("row 1: 'instruction' holds half a character",)),
    ('[{"instruction": "a", "output": "\\ud800"}]', ("row 1: 'output' holds half a character",)),
    ('[{"instruction": ' + "1" * 5000 + "}]", ("data/prompts.json: cannot be read",)),
    ("[" * 100_000, ("data/prompts.json: cannot be read",)),
]


@pytest.mark.parametrize(("content", "words"), CONTENT, ids=lambda value: str(value)[:30])
def test_data_that_json_or_unicode_cannot_hold(project, capsys, content, words):
    (project / "data" / "prompts.json").write_text(content)
    refused(write(project, PPO), project, capsys, *words)


@pytest.mark.parametrize("history", [5, [5], [["a"]], [["a", None]]], ids=str)
def test_a_history_that_is_no_list_of_turns(project, capsys, history):
    info = {
        "d": {"file_name": "prompts.json", "columns": {"prompt": "instruction", "history": "past"}}
    }
    write_json(project / "data" / "dataset_info.json", info)
    write_json(project / "data" / "prompts.json", [{"instruction": "a", "past": history}])
    words = ("row 1: history is not a list of [question, answer]",)
    refused(write(project, {**PPO, "dataset": "d"}), project, capsys, *words)


def test_keys_that_are_no_text_or_given_twice(project, capsys):
    base = yaml.safe_dump(PPO)
    refused(write(project, base + "? [a]\n: 1\n"), project, capsys, "a key is not text")
    (project / "run.json").write_text('{"stage": "ppo", "stage": "rm"}')
    refused(["run.json"], project, capsys, "run.json: 'stage' is given twice; keep one")


def test_a_stopped_run_is_exit_code_1_and_ctrl_c_130(project, capsys, monkeypatch):
    from fastppo import cli
    from fastppo.errors import TrainingStopped

    for error, code, word in (
        (TrainingStopped("why"), 1, "stopped: why"),
        (KeyboardInterrupt(), 130, "inter"),
    ):

        def fail(_arguments, error=error):
            raise error

        monkeypatch.setattr(cli, "train", fail)
        assert main(["x"]) == code
        assert word in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["run.yaml"]])
def test_help_and_errors_answer_in_under_a_second_without_torch(project, argv):
    write(project, {**PPO, "lora_rnk": 1})
    code = (
        "import sys; from fastppo.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules); "
        "print('heavy', sorted(heavy)); sys.exit(code)"
    )
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False
        )
        seconds.append(time.perf_counter() - began)
        assert "heavy []" in done.stdout, done.stdout + done.stderr
        assert done.returncode == (2 if argv == ["run.yaml"] else 0)
    assert min(seconds) < 1.0


def test_bad_records_are_refused_without_torch_too(project):
    write_json(project / "data" / "prompts.json", [{"output": "x"}])
    write(project, PPO)
    code = (
        "import sys; from fastppo.cli import main; main(['run.yaml']); "
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "has no 'instruction'" in done.stderr
    assert json.loads(done.stdout.replace("'", '"')) == []
