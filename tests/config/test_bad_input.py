"""Everything wrong that a user can hand in: one line that names it and the cure, exit code 2.

Nothing is written, and nothing heavy is imported first. The cases are in tests/bad.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fastppo.cli import main
from tests.bad import AREAS, LIGHT, Case, cases
from tests.bad.cure import cured, written_cures
from tests.bad.page import ALWAYS, page
from tests.limits import HANGS
from tests.project import PPO, RM, write_head, write_json

ROOT = Path(__file__).resolve().parents[2]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, and every folder."""
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("case", cases(*LIGHT), ids=lambda case: f"{case.area}-{case.wrong}")
def test_bad_input(project, capsys, monkeypatch, tmp_path_factory, case: Case):
    case.hide_packages(monkeypatch)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    good = RM if case.stage == "rm" else PPO
    # Readers of tables write into a cache, which is no part of the project.
    argv = case.spoil(project, {**good, "cache_dir": str(tmp_path_factory.mktemp("cache"))})
    for folder, size in case.heads.items():
        write_head(project / folder, size)
    before = tree(project)
    code = case.run(argv)
    out, err = capsys.readouterr()
    assert code == 2, (out, err)
    assert err.count("\n") == 1
    line = err.removeprefix(f"{case.command}: error: ").rstrip("\n")
    assert case.is_said(line), line
    assert "Traceback" not in out
    assert not case.secret or case.secret not in out + err
    assert tree(project) == before


WRITTEN = written_cures()
CURED = [(case, found) for case in cases(*LIGHT) if (found := cured(case, WRITTEN)) is not None]


@pytest.mark.parametrize(
    ("case", "found"), CURED, ids=[f"{case.area}-{case.wrong}" for case, _ in CURED]
)
def test_the_cure_of_a_line_cures(project, monkeypatch, tmp_path_factory, case: Case, found: Case):
    """Followed once, as a user would: the same run is refused for nothing any more."""
    from fastppo.config import load_config
    from fastppo.run.preflight import check

    case.hide_packages(monkeypatch)
    good = RM if case.stage == "rm" else PPO
    found.spoil(project, {**good, "cache_dir": str(tmp_path_factory.mktemp("cache"))})
    for folder, size in found.heads.items():
        write_head(project / folder, size)
    assert check(load_config("run.yaml")).train


def test_cures_are_followed_for_a_good_part_of_the_table():
    everything = {(case.area, case.wrong) for case in cases(*LIGHT)}
    assert set(WRITTEN) <= everything
    assert len(CURED) >= 100


def test_the_table_is_whole():
    everything = cases(*AREAS)
    assert len(everything) >= 120
    assert len({(case.area, case.wrong) for case in everything}) == len(everything)
    assert all(area in {case.area for case in everything} for area in AREAS)


def test_docs_bad_input_md_is_what_the_table_says():
    assert (ROOT / "docs" / "bad_input.md").read_text(encoding="utf-8") == page()


def test_what_the_page_promises_of_every_input_is_tested():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    assert all(f"def {name}(" in tests for name in ALWAYS.values())


def test_paths_in_the_yaml_may_lead_anywhere(project, tmp_path_factory):
    """Its author may name any file; only what data names stays in the data's folder."""
    from fastppo.config import config_from_dict
    from fastppo.data import read_records

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("prompts.json", "dataset_info.json"):
        (elsewhere / name).write_bytes((project / "data" / name).read_bytes())
    (project / "linked").symlink_to(elsewhere)
    (project / "link.json").symlink_to(elsewhere / "prompts.json")
    climbing = f"../{project.name}/data/prompts.json"
    for name in (str(elsewhere / "prompts.json"), climbing, "link.json", "linked/prompts.json"):
        assert len(read_records(config_from_dict({**PPO, "dataset": name})).train) == 4
    for folder in (str(elsewhere), "linked", f"../{project.name}/data"):
        assert len(read_records(config_from_dict({**PPO, "dataset_dir": folder})).train) == 4


def test_a_head_in_a_bin_file_is_enough_for_the_first_look(project):
    from fastppo.config import config_from_dict
    from fastppo.run.preflight import check

    head = project / "reward" / "value_head.safetensors"
    head.rename(head.with_suffix(".bin"))
    assert check(config_from_dict({**PPO})).train


def test_two_rewards_of_one_folder_are_two():
    from fastppo.config import config_from_dict

    specs = config_from_dict({**PPO, "reward_model": "reward, reward"}).rewards
    assert [spec.name for spec in specs] == ["reward", "reward_2"]


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


@pytest.mark.alone
@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["run.yaml"]])
def test_help_and_errors_answer_in_under_a_second_without_torch(project, argv):
    (project / "run.yaml").write_text(yaml.safe_dump({**PPO, "lora_rnk": 1}))
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


def test_help_is_answered_without_building_the_configuration():
    code = (
        "import sys; from fastppo import cli; from fastppo.export import cli as export; "
        "assert cli.main(['--help']) == 0; "
        "assert export.main(['-h']) == 0; assert not {'pydantic', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=HANGS)


def test_options_may_stand_anywhere_and_train_may_come_first(project, capsys):
    (project / "run.yaml").write_text(yaml.safe_dump(PPO))
    shown = set()
    for argv in (
        ["run.yaml", "seed=7", "lora_rank=3", "--explain"],
        ["--explain", "run.yaml", "seed=7", "lora_rank=3"],
        ["train", "run.yaml", "seed=7", "--explain", "lora_rank=3"],
    ):
        assert main(argv) == 0
        shown.add(capsys.readouterr().out)
    (page,) = shown
    assert {"7", "3"} <= {line.split()[1] for line in page.splitlines() if "command line" in line}


def test_bad_records_are_refused_without_torch_too(project):
    write_json(project / "data" / "prompts.json", [{"output": "x"}])
    (project / "run.yaml").write_text(yaml.safe_dump(PPO))
    code = (
        "import sys; from fastppo.cli import main; main(['run.yaml']); "
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "has no 'instruction'" in done.stderr
    assert json.loads(done.stdout.replace("'", '"')) == []


def test_python_m_fastppo_is_the_command(project):
    done = subprocess.run(
        [sys.executable, "-m", "fastppo"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fastppo-train: error: no CONFIG; name a YAML file")
