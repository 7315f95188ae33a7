"""Is a model, an adapter or a data set on Hugging Face's hub? Asked once, before its libraries ask.

transformers asks for several files, each six times over half a minute, and prints every try;
`datasets` asks six times too. No torch here.
"""

from __future__ import annotations

from fastppo.errors import UserError

MIRROR = " (HF_ENDPOINT names a mirror)"


def check_download(
    where: str,
    name: str,
    file: str = "config.json",
    *,
    revision: str = "main",
    cache_dir: str | None = None,
    token: str | None = None,
) -> None:
    """Ask the hub once for `file` of the model `name`, unless its cache has it.

    Args:
        where: what a line begins with: the file, and the key that names the model.
        token: None is that of the environment or of the login.

    Raises:
        UserError: the hub does not answer, or has nothing of this name for this user.
    """
    import huggingface_hub as hub

    if hub.try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision):
        return
    if why := ask(where, name, file, "model", revision, token):
        raise UserError(
            f"{where} no folder {name} here, not in the hub's cache, and {why}; check the path, or "
            f"fetch it where there is a network: `hf download {name}`{MIRROR}"
        )


def check_dataset(where: str, name: str) -> str | None:
    """Ask the hub once for the data set `name`; None, or in words why only the cache can help.

    Raises:
        UserError: the hub has nothing of this name for this user.
    """
    return ask(where, name, "README.md", "dataset", "main", None)


def ask(
    where: str, name: str, file: str, kind_of: str, revision: str, token: str | None
) -> str | None:
    """One question to the hub; returns why there is no answer, or None if there is one.

    Raises:
        UserError: the answer is that there is nothing of this name for this user.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    thing = f"no folder {name} here, and none of that name"
    if kind_of == "dataset":
        thing = f"no data set {name}"
    url = hub.hf_hub_url(name, file, revision=revision, repo_type=kind_of)
    try:
        hub.get_hf_file_metadata(url, token=token)
    except errors.GatedRepoError:
        raise UserError(
            f"{where} {name} is gated on the hub; accept its terms on its page, and set HF_TOKEN "
            "(or hf_hub_token)"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{where} {name} has no {revision} on the hub; check model_revision"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"{where} {thing} on the hub that is open to you; "
            "check the name; for a private one set HF_TOKEN (or hf_hub_token)"
        ) from None
    except errors.OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except (errors.HfHubHTTPError, errors.FileMetadataError):
        return None  # no such file, a mirror's own ways, or a busy hub: the libraries know more
    except Exception as error:  # whatever a network raises
        return f"{constants.ENDPOINT} does not answer ({kind(error)})"
    return None


def kind(error: Exception) -> str:
    """An error by its class and the HTTP status; its text could name what is nobody's business."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return type(error).__name__ + (f", HTTP {status}" if status else "")
