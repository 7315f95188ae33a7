"""Checkpoints: whole or not at all, read back to the bit, refused where they do not fit."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fastppo import seeds
from fastppo.errors import TrainingStopped, UserError
from fastppo.ppo import checkpoint, trainer
from fastppo.run import durable, save, training_state


def write(output_dir: Path, number: int, text: str = "weights") -> Path:
    """A checkpoint of one file in a folder."""
    folder = output_dir / f"checkpoint-{number}"
    place = durable.partial_folder(folder)
    (place / "below").mkdir()
    (place / "below" / "file").write_text(text)
    (place / durable.TRAINING_STATE).write_text("{}")
    durable.publish(place, folder)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_everything_is_on_the_disk_before_the_rename_and_the_rename_after(tmp_path, monkeypatch):
    events = []
    sync, rename = durable.sync, Path.rename
    monkeypatch.setattr(durable, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(
        Path, "rename", lambda path, to: (events.append(f"-> {to.name}"), rename(path, to))[1]
    )
    write(tmp_path, 1)
    partial = ".checkpoint-1.partial"
    end = ["manifest.json", "below", partial, "-> checkpoint-1", tmp_path.name]
    assert events == ["file", "training_state.json", *end]


def test_a_rewritten_checkpoint_replaces_the_old_one(tmp_path):
    write(tmp_path, 1, "old")
    folder = write(tmp_path, 1, "new")
    assert (folder / "below" / "file").read_text() == "new"
    assert names(tmp_path) == ["checkpoint-1"]
    assert durable.checkpoint_fault(folder) is None


TORN = {
    "cut short": (lambda f: f.write_text("weigh"), "below/file has 5 of 7 bytes"),
    "one byte off": (lambda f: f.write_text("weighzs"), "below/file is not what was written"),
    "gone": (lambda f: f.unlink(), "below/file is missing"),
    "no manifest": (lambda f: (f.parents[1] / "manifest.json").unlink(), "it has no manifest"),
    "half a manifest": (
        lambda f: (f.parents[1] / "manifest.json").write_text('{"files": {"below'),
        "its manifest.json cannot be read",
    ),
    "another manifest": (
        lambda f: (f.parents[1] / "manifest.json").write_text('{"files": [1]}'),
        "its manifest.json cannot be read",
    ),
}


@pytest.mark.parametrize("tear", TORN)
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(tmp_path, config, tear):
    spoil, words = TORN[tear]
    out = tmp_path / "out"
    good, bad = write(out, 2), write(out, 10)
    spoil(bad / "below" / "file")
    folder, notes = durable.checkpoint_to_resume(config(resume_from_checkpoint=True))
    assert folder == good
    (note,) = notes
    assert note.startswith(f"{bad} is torn and passed over: {words}")
    with pytest.raises(UserError, match=f"no whole checkpoint: {words}"):
        durable.checkpoint_to_resume(config(resume_from_checkpoint=str(bad)))


def test_only_incomplete_checkpoints_are_an_error_and_none_yet_is_a_new_start(tmp_path, config):
    resuming = config(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="has no checkpoint-N; leave it out"):
        durable.checkpoint_to_resume(resuming)
    out = tmp_path / "out"
    out.mkdir()
    save.begin(out, {"activation_offloading": "none"})
    folder, (note,) = durable.checkpoint_to_resume(resuming)
    assert folder is None
    assert "the run starts from its beginning" in note
    (write(out, 1) / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"it has no manifest\.json; there is none before it"):
        durable.checkpoint_to_resume(resuming)


def test_save_total_limit_keeps_the_newest(tmp_path):
    for step in (1, 2, 10):
        write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    durable.keep_newest(tmp_path, None)
    durable.keep_newest(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-2", "checkpoint-best"]
    durable.keep_newest(tmp_path, 2)
    assert len(durable.checkpoints(tmp_path)) == 2


def test_temporary_files_of_a_killed_run_are_deleted(tmp_path):
    write(tmp_path, 1)
    for name in (".checkpoint-2.partial", ".checkpoint-0.deleted"):
        (tmp_path / name).mkdir()
    durable.delete_partial(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "x"),
        OSError(errno.EFBIG, "x"),
        OSError(errno.EDQUOT, "x"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
    ids=lambda error: str(error)[-30:],
)
def test_a_full_disk_is_one_line_that_names_the_last_whole_checkpoint(tmp_path, error):
    write(tmp_path, 4)
    (write(tmp_path, 6) / "below" / "file").unlink()
    (tmp_path / ".checkpoint-8.partial").mkdir()
    words = r"no room to write below .*checkpoint-4 is whole"
    with pytest.raises(TrainingStopped, match=words), durable.stop_on_full_disk(tmp_path):
        raise error
    assert not (tmp_path / ".checkpoint-8.partial").exists()


def test_an_error_of_another_kind_is_not_said_to_be_a_full_disk(tmp_path):
    with pytest.raises(PermissionError), durable.stop_on_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "x")


def test_a_tree_is_read_back_as_it_was(tmp_path):
    x = torch.arange(6.0)
    tree = {
        "view": x[2:4],
        "again": [x, x],
        "scalar": torch.tensor(3),
        1: (None, True, "ü", 0.1, float("inf"), -(10**20)),
        "empty": {},
    }
    training_state.write(tree, tmp_path)
    back = training_state.read(tmp_path)
    assert list(back) == list(tree)
    assert back[1] == tree[1]
    assert torch.equal(back["view"], x[2:4])
    assert all(torch.equal(value, x) for value in back["again"])
    assert back["scalar"].dtype == torch.int64
    assert names(tmp_path) == ["training_state.json", "training_state.safetensors"]


def test_every_generator_goes_on_where_it_was(tmp_path):
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002

    draw()
    training_state.write(seeds.random_state(), tmp_path)
    first = draw()
    seeds.set_random_state(training_state.read(tmp_path))
    assert draw() == first


def test_what_no_longer_fits_is_refused_and_what_changed_is_named(state, tmp_path):
    folder = checkpoint.save_to_resume(trainer.step_update(state()), tmp_path)
    with pytest.raises(UserError, match="other shapes; keep lora_rank"):
        checkpoint.resume(state(lora_rank=4), folder)
    with pytest.raises(UserError, match="trained with another learning_rate, which it carries on"):
        checkpoint.resume(state(learning_rate=1e-5), folder)
    changed = checkpoint.resume(state(max_steps=9, seed=3, save_steps=7), folder)
    assert changed == ["max_steps", "seed"]


def test_other_prompts_are_named(state, tmp_path):
    folder = checkpoint.save_to_resume(trainer.step_update(state()), tmp_path)
    other = state()
    other.prompts = other.prompts[:-1]
    assert checkpoint.resume(other, folder) == ["the prompts"]


def test_no_value_of_the_file_is_in_a_checkpoint(state, tmp_path):
    """An URL may have a key in it."""
    run = trainer.step_update(state(seed=5))
    run.config = run.config.model_copy(update={"reward_model": "https://x/?key=s3cret"})
    folder = checkpoint.save_to_resume(run, tmp_path)
    assert not any(b"s3cret" in path.read_bytes() for path in durable.files_of(folder))


def test_auto_is_decided_once(config, tmp_path):
    save.note_run(tmp_path, {"activation_offloading": "checkpoint+offload"})
    auto = config(activation_offloading="auto", disable_gradient_checkpointing=False)
    again = save.with_decisions(auto, tmp_path)
    assert again.activation_offloading == "checkpoint+offload"
    named = config(activation_offloading="none", disable_gradient_checkpointing=False)
    assert save.with_decisions(named, tmp_path).activation_offloading == "none"
    left_open = config(disable_gradient_checkpointing=None)
    assert save.with_decisions(left_open, tmp_path).activation_offloading == "checkpoint+offload"


def test_a_record_of_decisions_that_is_broken_is_one_line(config, tmp_path):
    (tmp_path / "fastppo_run.json").write_text("[1]")
    with pytest.raises(UserError, match=r"fastppo_run\.json cannot be read; start anew"):
        save.with_decisions(config(), tmp_path)


def test_the_last_files_replace_older_ones_one_by_one(tmp_path):
    out = tmp_path / "out"
    (out / "critic").mkdir(parents=True)
    (out / "critic" / "weights").write_text("old")
    (out / "other").write_text("stays")
    place = durable.partial_folder(out / "checkpoint-final")
    (place / "critic").mkdir()
    (place / "critic" / "weights").write_text("new")
    durable.move_into(place, out)
    assert (out / "critic" / "weights").read_text() == "new"
    assert names(out) == ["critic", "other"]


def test_rows_past_the_checkpoint_are_cut_and_another_runs_file_is_moved_aside(state, tmp_path):
    run = trainer.step_update(state())
    folder = checkpoint.save_to_resume(run, tmp_path)
    path = tmp_path / "metrics" / "training_metrics.csv"
    one = path.read_bytes()
    trainer.step_update(run)
    path.write_bytes(path.read_bytes() + b"3,0.5")  # and half a row more, of a kill
    resumed = state()
    checkpoint.resume(resumed, folder)
    assert path.read_bytes() == one
    assert not list(path.parent.glob("previous-*"))
    path.write_bytes(one.replace(b"\n1,", b"\n2,"))
    checkpoint.resume(state(), folder)
    assert path.read_bytes() == one
    (aside,) = path.parent.glob("previous-*")
    assert b"\n2," in (aside / path.name).read_bytes()


def test_a_reward_models_checkpoint_is_refused_in_stage_ppo(state, tmp_path):
    training_state.write({"pairs": 1}, tmp_path)
    with pytest.raises(UserError, match="is of stage rm; name one of stage ppo"):
        checkpoint.resume(state(), tmp_path)


def test_a_checkpoint_has_no_pickle(state, tmp_path):
    folder = checkpoint.save_to_resume(trainer.step_update(state()), tmp_path)
    kinds = {path.suffix for path in durable.files_of(folder)}
    assert kinds <= {".json", ".safetensors", ".jinja", ".md", ".txt"}
    assert json.loads((folder / "manifest.json").read_text())["files"]
    assert os.listdir(tmp_path).count("checkpoint-1") == 1
