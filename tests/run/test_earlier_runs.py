"""overwrite_output_dir: what an earlier run left in the folder is neither gone on from nor deleted.

Without ids the highest checkpoint-N counts, of whatever run: a shorter new run would go on from the
old one's last step, and save_total_limit would delete each new checkpoint as the oldest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastppo import cli
from fastppo.config import config_from_dict
from fastppo.errors import TrainingStopped
from fastppo.ppo import checkpoint
from fastppo.report.read import read_run
from fastppo.rm.trainer import ResumableTrainer
from fastppo.run import durable, save
from tests.reliability import runs

LINE = (
    "{} not of this run: resume_from_checkpoint: true passes over what is not, and "
    "save_total_limit leaves it"
)


def write(out: Path, step: int, identity: dict[str, Any] | None = None) -> Path:
    """A complete checkpoint, as the run in `out` would write it, or one of `identity`."""
    folder = out / f"checkpoint-{step}"
    place = durable.partial_folder(folder)
    (place / durable.TRAINING_STATE).write_text("{}")
    save.note_run(place, {}, identity=durable.identity_of(out) if identity is None else identity)
    durable.publish(place, folder)
    return folder


def steps(out: Path) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in durable.checkpoints(out)]


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def newest(out: Path) -> Path | None:
    return durable.newest_complete(out, hashes=True)[0]


def test_a_new_run_does_not_go_on_from_an_earlier_runs_checkpoint(out, config):
    save.begin(out, {})
    for step in (50, 100, 150):
        write(out, step)
    save.begin(out, {})
    assert newest(out) is None
    folder, (first, second) = durable.checkpoint_to_resume(config(resume_from_checkpoint=True))
    assert folder is None
    assert "the run starts from its beginning" in first
    assert second == LINE.format(f"{out}/checkpoint-150 and 2 more are")
    mine = write(out, 10)
    assert durable.checkpoint_to_resume(config(resume_from_checkpoint=True)) == (mine, [second])
    named = config(resume_from_checkpoint=str(out / "checkpoint-100"))
    assert durable.checkpoint_to_resume(named) == (out / "checkpoint-100", [])


def test_save_total_limit_counts_and_deletes_this_runs_checkpoints_alone(out):
    save.begin(out, {})
    write(out, 150)
    save.begin(out, {})
    for step in (10, 20, 30):
        write(out, step)
        durable.keep_newest(out, 1)
    assert steps(out) == [30, 150]


def test_a_run_that_resumes_keeps_what_it_went_on_from_and_not_what_came_after(out):
    """For a run that goes on from checkpoint-50 the old checkpoint-100 is another future."""
    save.begin(out, {})
    first = [write(out, step) for step in (50, 100)]
    save.begin(out, {}, resumed=first[0])
    assert newest(out) == first[0]
    later = write(out, 60)
    assert newest(out) == later
    save.begin(out, {}, resumed=later)
    assert newest(out) == later
    assert durable.own_checkpoints(out) == [first[0], later]
    durable.keep_newest(out, 1)
    assert steps(out) == [60, 100]


def test_checkpoints_of_versions_without_an_id_go_on_and_stay_apart(out):
    record = json.dumps({"fastppo": "0.1", "decisions": {}})
    (out / durable.RUN).write_text(record)
    old = write(out, 20, {})
    assert newest(out) == old
    save.begin(out, {}, resumed=old)
    assert newest(out) == old
    save.begin(out, {})
    assert newest(out) is None


def test_a_folder_of_checkpoints_alone_is_one_runs(out):
    """Copied without the rest of output_dir."""
    save.begin(out, {})
    kept = write(out, 20)
    (out / durable.RUN).unlink()
    assert newest(out) == kept
    assert durable.others_line(out) == []


def test_a_full_disk_names_no_checkpoint_of_an_earlier_run(out):
    save.begin(out, {})
    write(out, 150)
    save.begin(out, {})
    with pytest.raises(TrainingStopped, match="there is no checkpoint yet"):  # noqa: SIM117
        with durable.stop_on_full_disk(out):
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stage", ["ppo", "rm"])
def test_a_killed_second_run_in_the_folder_resumes_its_own_checkpoint(
    tmp_path, stage, monkeypatch, capsys
):
    """End to end: 6 steps, then another run of 4 that dies at its end, then `true`."""
    quick = {"eval_strategy": "no"} if stage == "ppo" else {}
    settings = {"ppo": runs.ppo, "rm": runs.rm}[stage](tmp_path, **quick)
    settings |= {"save_total_limit": 1, "plot_loss": False, "max_steps": 6, "save_steps": 5}
    out = Path(settings["output_dir"])
    cli.run(config_from_dict(settings))
    (earlier,) = durable.checkpoints(out)
    kept = files(earlier)
    again = {**settings, "overwrite_output_dir": True, "seed": 7, "max_steps": 4, "save_steps": 2}
    owner, name = {
        "ppo": (checkpoint, "replace_final"),
        "rm": (ResumableTrainer, "_finalize_training"),
    }[stage]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        capsys.readouterr()
        with pytest.raises(KeyboardInterrupt):
            cli.run(config_from_dict(again))
    assert unfolded(LINE.format(f"{earlier} is")) in unfolded(capsys.readouterr().out)
    (own,) = durable.own_checkpoints(out)
    assert own in (out / "checkpoint-2", out / "checkpoint-4")
    cli.run(config_from_dict({**again, "resume_from_checkpoint": True}))
    assert unfolded(f"from {own}") in unfolded(capsys.readouterr().out)
    assert read_run(out).status == "finished"
    assert files(earlier) == kept


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unfolded(text: str) -> str:
    """Without the line breaks of a narrow terminal."""
    return "".join(text.split())


def dies(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt
