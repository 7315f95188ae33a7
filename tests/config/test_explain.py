"""--explain: every key once, where its value is from, nothing heavy, and no secret."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from fastppo.cli import main
from fastppo.config import Config
from fastppo.config.explain import lines, written
from tests.limits import HANGS
from tests.project import PPO


@pytest.fixture
def run_yaml(project):
    settings = {
        **PPO,
        "learning_rate": 1e-6,
        "target": 3.0,  # TRL's name
        "ddp_backend": "nccl",
        "pure_bf16": False,
        "hf_hub_token": "hf_secret",
        "lf_sampling": True,
        "top_k": 5,
    }
    (project / "run.yaml").write_text(yaml.safe_dump(settings))
    return project / "run.yaml"


def test_every_key_is_there_once_with_its_value_and_where_it_is_from(run_yaml):
    _, found = lines(run_yaml, ["seed=7", "learning_rate=2e-6"])
    by_name = {line.name: line for line in found}
    assert len(by_name) == len(found)
    keys = {name for name, field in Config.model_fields.items() if field.description}
    assert set(by_name) == keys | {"ddp_backend", "pure_bf16"}
    told = {name: tuple(by_name[name][1:3]) for name in by_name}
    assert told["seed"] == ("7", "command line")
    assert told["learning_rate"] == ("2e-06", "command line")
    assert told["ppo_target"] == ("3.0", "file")
    assert told["ppo_epochs"] == ("4", "default")
    assert told["cache_dir"] == ("null", "default")
    assert (told["temperature"], told["top_k"]) == (("0.95", "lf_sampling"), ("5", "file"))
    assert by_name["ddp_backend"].meaning == "Nothing: a process has one device."
    assert by_name["pure_bf16"].meaning.startswith("Nothing with this value")
    assert by_name["calibrate_reward"].meaning.startswith("Nothing in stage ppo. In rm: ")
    assert by_name["ppo_epochs"].meaning == Config.model_fields["ppo_epochs"].description


def test_what_was_set_comes_first(run_yaml):
    order = ["command line", "file", "default", "lf_sampling"]
    sources = [line.source for line in lines(run_yaml, ["seed=7"])[1]]
    groups = [min(order.index(source), 2) for source in sources]
    assert groups == sorted(groups)
    assert set(sources) == set(order)


def test_a_key_without_effect_says_so_and_names_the_one_that_acts(run_yaml):
    def meaning(name, *overrides):
        return {line.name: line.meaning for line in lines(run_yaml, overrides)[1]}[name]

    own = meaning("vf_coef", "critic=adapter")
    assert own.startswith("Here next to no effect with critic: adapter")
    assert "critic_learning_rate" in own
    plain = Config.model_fields["vf_coef"].description
    assert meaning("vf_coef", "critic=shared") == plain
    assert meaning("vf_coef", "critic=adapter", "optim=sgd") == plain
    assert "adap_kl_ctrl: false" in meaning("horizon", "adap_kl_ctrl=false")
    assert meaning("horizon") == Config.model_fields["horizon"].description
    assert "constant_with_warmup" in meaning(
        "warmup_ratio", "warmup_ratio=0.1", "lr_scheduler_type=constant"
    )
    assert meaning("lam", "advantage=reinforce++").startswith("Nothing to advantage: reinforce++")


def test_a_secret_is_not_shown(run_yaml, capsys):
    assert main(["run.yaml", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "hf_secret" not in out
    assert written("swanlab_api_key", "x") == "***"


def test_values_are_written_as_yaml_has_them():
    values = (None, True, 1e-6, (1.0, 2.0), {"min_lr": 1e-7}, "")
    shown = [written("name", value) for value in values]
    assert shown == ["null", "true", "1e-06", "1.0,2.0", "{min_lr: 1e-07}", "''"]


def test_explain_fits_into_a_hundred_columns(run_yaml, capsys):
    assert main(["--explain", "run.yaml", "output_dir=" + "a/long/folder" * 12]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "reward_model_quantization_bit " in out  # names are whole


def test_what_a_run_would_refuse_is_refused(run_yaml, capsys):
    assert main(["run.yaml", "lora_rank=0", "--explain"]) == 2
    assert "lora_rank: 0 is wrong" in capsys.readouterr().err
    assert main(["--explain"]) == 2
    assert "no CONFIG" in capsys.readouterr().err


def test_nothing_heavy_is_imported_and_nothing_written(run_yaml):
    before = sorted(run_yaml.parent.rglob("*"))
    code = (
        "import sys; from fastppo.cli import main; assert main(['--explain', 'run.yaml']) == 0; "
        "heavy = {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=HANGS)
    assert sorted(run_yaml.parent.rglob("*")) == before
