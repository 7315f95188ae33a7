"""The upload of what a run trained to Hugging Face's hub (`push_to_hub`).

The token is HF_TOKEN of the environment (hf_hub_token is put there) or that of the login.
huggingface_hub reads it; no line and no file of a run has it. No torch here.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from fastppo import __version__
from fastppo.config.downloads import kind
from fastppo.config.rewards import TEXT_RECORD
from fastppo.config.tracking import names_repository
from fastppo.errors import TrainingStopped, UserError

if TYPE_CHECKING:
    from fastppo.config import Config

CARD = "README.md"
# What a model, an adapter and a tokenizer are saved as. Logs, samples, metrics, checkpoints and the
# record of the machine are not uploaded.
PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    TEXT_RECORD,
    CARD,
)


def repository(config: Config) -> str:
    """The repository's name, with its owner if hub_model_id has one."""
    return config.hub_model_id or Path(config.output_dir).resolve().name


def check(config: Config) -> None:
    """Ask the hub whose login this is, before hours of training.

    Raises:
        UserError: the hub cannot be reached, there is no login that may write, or output_dir has a
            name that no repository has.
    """
    if not (config.push_to_hub and config.trains):
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    where = f"{config.source}: push_to_hub:"
    if not names_repository(name := repository(config)):
        raise UserError(
            f"{where} a repository cannot be named {name!r}, as output_dir is; set hub_model_id"
        )
    cure = "set HF_TOKEN in the environment, or run `hf auth login`"
    try:
        user = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise UserError(f"{where} there is no login to the hub here; {cure}") from None
    except HfHubHTTPError as error:
        raise UserError(f"{where} the hub refuses the login ({kind(error)}); {cure}") from None
    except Exception as error:  # whatever a network raises
        raise UserError(
            f"{where} the hub cannot be reached ({kind(error)}); leave it out, and upload the "
            "model later (docs/export.md has the command)"
        ) from None
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"{where} the login's token may only read; {cure} with one that may write")


def patterns(config: Config) -> list[str]:
    """The names of files to upload; with `trust_remote_code` the model's own modules too."""
    return [*PATTERNS, *(["*.py"] if config.trust_remote_code else [])]


def files_to_upload(config: Config) -> list[Path]:
    """The files in output_dir that are the model; nothing of its folders."""
    folder = Path(config.output_dir)
    return sorted(
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_file() and any(path.match(pattern) for pattern in patterns(config))
    )


def command(config: Config, name: str) -> str:
    """The hub's own command that uploads the files of `files_to_upload`, and no others."""
    paths = files_to_upload(config)
    found = [each for each in patterns(config) if any(path.match(each) for path in paths)]
    # The client compares a pattern with the whole path, and its * takes slashes too.
    words = ["hf", "upload", name, config.output_dir, "--exclude", "*/*"]
    words += ["--private"] if config.hub_private_repo else []
    return shlex.join([*words, *(word for each in found for word in ("--include", each))])


def push(config: Config) -> None:
    """Upload a run's model and card if `push_to_hub` asks for it; see `upload`."""
    if config.push_to_hub and config.trains:
        upload(config)


def upload(config: Config) -> None:
    """Upload the model in output_dir and its card as one commit; a missing repository is created.

    Raises:
        UserError: there is no model in output_dir.
        TrainingStopped: the upload failed; the model is in output_dir.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    from fastppo.run import card
    from fastppo.run.console import console

    folder = Path(config.output_dir)
    name = repository(config)
    paths = files_to_upload(config)
    if not any(path.suffix == ".safetensors" for path in paths):
        raise UserError(f"push_to_hub: there is no model in {folder}; train or save it first")
    files: dict[str, str | bytes] = {path.name: str(path) for path in paths}
    if CARD in files:
        text = (folder / CARD).read_text(encoding="utf-8")
    try:
        api = HfApi()
        private = config.hub_private_repo
        name = api.create_repo(name, private=private, exist_ok=True).repo_id
        if CARD in files:
            files[CARD] = card.for_repository(text, folder, name).encode()
        api.create_commit(
            name,
            [CommitOperationAdd(path, content) for path, content in files.items()],
            commit_message=f"Trained with fastppo {__version__}",
        )
    except Exception as error:  # whatever the hub and a network raise
        raise TrainingStopped(
            f"push_to_hub: {name} was not uploaded ({kind(error)}); the model is whole in "
            f"{folder}, and this uploads it: {command(config, name)}"
        ) from None
    console.print(f"  uploaded to {name} on the hub", markup=False)
