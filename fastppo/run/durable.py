"""Write folders atomically, check them by a manifest, and report a full disk.

A checkpoint is written to a temporary folder; each file is flushed to the disk, a manifest with
sizes and hashes is written last, and the folder is renamed. transformers' Trainer writes into the
checkpoint's folder itself, and accepts an incomplete one. No torch here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.errors import TrainingStopped, UserError

if TYPE_CHECKING:
    from fastppo.config import Config

MANIFEST = "manifest.json"
INFO = "fastppo_info.json"  # what fastppo-report shows: settings, machine, outcome
RUN = "fastppo_run.json"  # in output_dir from a run's first peak on, and in checkpoints
Start = tuple[Path | None, list[str]]  # the checkpoint that a run resumes from, and notes
TRAINING_STATE = "training_state.json"  # the half of a checkpoint that only a resume reads
NUMBERED = re.compile(r"checkpoint-(\d+)")
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
# What libraries without an errno say of those: safetensors and tokenizers (Rust), torch.save.
FULL_WORDS = re.compile(r"os error (28|27|122)\b|PytorchStreamWriter|unexpected pos \d+ vs")


def stage_of(folder: Path) -> str | None:
    """The stage of the run that wrote `folder`, by its record; None where there is none."""
    try:
        stage = json.loads((folder / INFO).read_text(encoding="utf-8"))["stage"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return str(stage)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path, renamed to `path` at the end: nobody reads half a file."""
    place = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield place
        place.replace(path)
    finally:
        place.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8 to `path`, completely or not at all."""
    with replace_atomically(path) as place:
        place.write_bytes(text.encode())


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def files_of(folder: Path) -> list[Path]:
    """All files below `folder` except its manifest."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if path != folder / MANIFEST]


def partial_folder(folder: Path) -> Path:
    """Make an empty folder next to `folder`, to be renamed to it once it is complete."""
    place = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place


def publish(place: Path, folder: Path) -> None:
    """Write a manifest into `place`, flush all of its files, and rename it to `folder`."""
    files = {}
    for path in files_of(place):
        sync(path)
        name = path.relative_to(place).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    text = json.dumps({"files": files}, indent=1) + "\n"
    (place / MANIFEST).write_text(text, encoding="utf-8")
    sync(place / MANIFEST)
    for below in sorted(path for path in place.rglob("*") if path.is_dir()):
        sync(below)
    sync(place)
    if folder.exists():
        remove(folder)
    place.rename(folder)
    sync(folder.parent)


def move_into(place: Path, folder: Path) -> None:
    """Move each file of `place` into `folder`; an older one of that name is replaced atomically."""
    for path in files_of(place):
        sync(path)
        target = folder / path.relative_to(place)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    sync(folder)
    shutil.rmtree(place)


def remove(folder: Path) -> None:
    """Delete a checkpoint, its manifest first: after a kill in between it is incomplete."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def delete_partial(output_dir: Path) -> None:
    """Delete the temporary files that a killed run left behind."""
    for pattern in (".checkpoint-*.partial", ".checkpoint-*.deleted"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def checkpoint_fault(folder: Path, *, hashes: bool = True) -> str | None:
    """Return why `folder` is no complete checkpoint, in words, or None if it is one."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, wanted in listed.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != wanted["bytes"]:
                return f"{name} has {size} of {wanted['bytes']} bytes"
            if hashes and sha256(path) != wanted["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders checkpoint-N in `output_dir`, of whatever run, the lowest N first."""
    numbered = [(NUMBERED.fullmatch(path.name), path) for path in output_dir.glob("checkpoint-*")]
    return [path for _, path in sorted((int(m[1]), path) for m, path in numbered if m)]


def read_run(folder: Path) -> dict[str, Any] | None:
    """The record of the run in output_dir or a checkpoint; None if it has none that can be read."""
    try:
        found = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def new_identity(resumed: Path | None) -> dict[str, Any]:
    """What tells the checkpoints of a run that starts now from those of others in output_dir.

    `run` is its id, and `before` has the last step that counts of each run that it goes on from:
    a run that resumes from checkpoint-50 does not have that run's checkpoint-100. Runs of versions
    without an id have the empty one.
    """
    record = None if resumed is None else read_run(resumed)
    before: dict[str, Any] = {}
    if resumed is not None and record is not None:
        numbered = NUMBERED.fullmatch(resumed.name)
        last = int(numbered[1]) if numbered else 0
        before = {**record.get("before", {}), record.get("run", ""): last}
    return {"run": secrets.token_hex(4), "before": before}


def identity_of(output_dir: Path) -> dict[str, Any]:
    """The identity of the run in `output_dir`, for its checkpoints."""
    record = read_run(output_dir) or {}
    return {key: record[key] for key in ("run", "before") if key in record}


def is_own(folder: Path, output_dir: Path) -> bool:
    """Whether the checkpoint in `folder` is of the run in `output_dir`; if nothing tells, it is."""
    own, record = read_run(output_dir), read_run(folder)
    if own is None or record is None:
        return True
    name = record.get("run", "")
    if name == own.get("run", ""):
        return True
    last, numbered = own.get("before", {}).get(name), NUMBERED.fullmatch(folder.name)
    return last is not None and numbered is not None and int(numbered[1]) <= last


def own_checkpoints(output_dir: Path) -> list[Path]:
    """The folders checkpoint-N of the run in `output_dir`, the oldest first.

    With `overwrite_output_dir` those of earlier runs stay in the folder, whatever their number.
    """
    return [folder for folder in checkpoints(output_dir) if is_own(folder, output_dir)]


def others_line(output_dir: Path) -> list[str]:
    """A line on the checkpoints in `output_dir` that are not of its run, if there are any."""
    own = own_checkpoints(output_dir)
    others = [folder for folder in checkpoints(output_dir) if folder not in own]
    if not others:
        return []
    more = f" and {len(others) - 1} more are" if len(others) > 1 else " is"
    return [
        f"{others[-1]}{more} not of this run: resume_from_checkpoint: true passes over what is "
        "not, and save_total_limit leaves it"
    ]


def keep_newest(output_dir: Path, limit: int | None, keep: int | None = None) -> None:
    """Delete the run's oldest checkpoint-N past `save_total_limit`, but not that of step `keep`."""
    if limit is not None:
        for path in own_checkpoints(output_dir)[:-limit]:
            if path.name != f"checkpoint-{keep}":
                remove(path)


def resume_fault(folder: Path, *, hashes: bool) -> str | None:
    """Return why `folder` cannot be resumed from, or None; it also needs the training state."""
    wrong = checkpoint_fault(folder, hashes=hashes)
    if wrong is None and not (folder / TRAINING_STATE).is_file():
        return f"it has no {TRAINING_STATE} (save_only_model)"
    return wrong


def newest_complete(output_dir: Path, *, hashes: bool) -> Start:
    """The run's newest complete checkpoint-N, or None; and a note on each that is passed over."""
    passed: list[str] = []
    for folder in reversed(own_checkpoints(output_dir)):
        wrong = resume_fault(folder, hashes=hashes)
        if wrong is None:
            return folder, passed
        passed.append(f"{folder} is torn and passed over: {wrong}")
    return None, passed


def checkpoint_to_resume(config: Config, *, hashes: bool = True) -> Start:
    """The checkpoint that `resume_from_checkpoint` names, and notes on those that were skipped.

    True means the newest complete one of the run in `output_dir`; the result is None if that was
    killed before its first checkpoint.

    Raises:
        UserError: a named folder is no complete checkpoint, or there is nothing to resume.
    """
    wanted = config.resume_from_checkpoint
    if not wanted:
        return None, []
    key = f"{config.source}: resume_from_checkpoint"
    if wanted is not True:
        folder = Path(wanted)
        if not folder.is_dir():
            raise UserError(f"{key}: no folder {folder}; name a checkpoint-N folder")
        wrong = resume_fault(folder, hashes=hashes)
        if wrong is not None:
            raise UserError(
                f"{key}: {folder} is no whole checkpoint: {wrong}; name another checkpoint-N"
            )
        return folder, []
    output_dir = Path(config.output_dir)
    newest, passed = newest_complete(output_dir, hashes=hashes)
    others = others_line(output_dir)
    if newest is not None:
        return newest, passed + others
    if passed:
        raise UserError(f"{key}: {passed[0]}; there is none before it; start anew without this key")
    if not (output_dir / RUN).is_file():
        raise UserError(f"{key}: {output_dir} has no checkpoint-N; leave it out")
    return None, [f"{output_dir} has no checkpoint yet: the run starts from its beginning", *others]


def disk_full_message(error: BaseException) -> str | None:
    """Return a message if the error is a full disk, quota or size limit, else None."""
    if isinstance(error, OSError) and error.errno in FULL:
        return os.strerror(error.errno)
    if FULL_WORDS.search(str(error)):
        return " ".join(str(error).split())[:120]
    return None


@contextmanager
def stop_on_full_disk(output_dir: Path) -> Iterator[None]:
    """Inside the block a full disk stops the run with a one-line message; complete files stay.

    Raises:
        TrainingStopped: replaces the error, and names the last complete checkpoint.
    """
    try:
        yield
    except Exception as error:
        reason = disk_full_message(error)
        if reason is None:
            raise
        delete_partial(output_dir)  # gives back what the half-written one took
        own = own_checkpoints(output_dir)
        whole = [path for path in own if checkpoint_fault(path, hashes=False) is None]
        kept = (
            f"{whole[-1]} is whole: free some space, then set resume_from_checkpoint: true"
            if whole
            else "there is no checkpoint yet: free some space, then start anew"
        )
        raise TrainingStopped(f"no room to write below {output_dir} ({reason}); {kept}") from None
