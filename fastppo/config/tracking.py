"""Keys of trackers and of the upload to Hugging Face's hub. No torch here."""

from __future__ import annotations

import importlib.util
import re
from typing import Literal

from pydantic import model_validator

from fastppo.config.key import HF, LF, Keys, key

TRACKERS = ("tensorboard", "wandb", "trackio", "swanlab")
TRACKING_LISTS = ("report_to",)


def names_repository(name: str) -> bool:
    """Whether the hub has repositories of such a name, with or without an owner before it."""
    word = r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"
    whole = re.fullmatch(rf"({word}/)?{word}", name) is not None
    return whole and len(name) <= 96 and not re.search(r"--|\.\.|\.git$", name)


class TrackingKeys(Keys):
    """Keys that say where a run's numbers are shown, and where its model is uploaded."""

    title = "Trackers and upload"

    report_to: str = key(
        "none",
        HF,
        "tensorboard, wandb, trackio, swanlab, several of them, all that are installed, or none.",
    )
    run_name: str | None = key(None, HF, "Name of the run in trackers; null is output_dir.")
    project: str | None = key(
        None, HF, "Trackers' project; null is WANDB_PROJECT of the environment, or fastppo."
    )
    logging_dir: str | None = key(
        None, HF, "Where TensorBoard's files go; null is runs in output_dir."
    )
    use_swanlab: bool = key(False, LF, "The same as swanlab in report_to.")
    swanlab_api_key: str | None = key(
        None, LF, "Key for SwanLab; null is SWANLAB_API_KEY of the environment, or the login's."
    )
    swanlab_project: str | None = key(None, LF, "SwanLab's project; null is project.")
    swanlab_workspace: str | None = key(None, LF, "SwanLab's workspace; null is the login's own.")
    swanlab_run_name: str | None = key(
        None, LF, "Name of the run in SwanLab; null is run_name, or output_dir."
    )
    swanlab_mode: Literal["cloud", "local"] = key(
        "cloud", LF, "Whether SwanLab sends the run to its server or keeps it on this machine."
    )
    swanlab_logdir: str | None = key(
        None, LF, "Where SwanLab's files go; null is swanlog in the working directory."
    )
    push_to_hub: bool = key(
        False,
        HF,
        "Upload what was trained and its card to Hugging Face's hub at the end of the run; needs a "
        "login (hf auth login) or HF_TOKEN in the environment.",
    )
    hub_model_id: str | None = key(
        None, HF, "Repository on the hub, owner/name or name; null is the name of output_dir."
    )
    hub_private_repo: bool | None = key(
        None, HF, "Whether a new repository is private; null is the account's default."
    )
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = key(
        "end", HF, "When push_to_hub uploads: only end is supported, once, after training."
    )

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers of report_to without duplicates; `all` means those that are installed."""
        names = [name.strip() for name in self.report_to.split(",")]
        if "all" in names:
            names = [name for name in TRACKERS if importlib.util.find_spec(name) is not None]
        if self.use_swanlab:
            names.append("swanlab")
        return tuple(dict.fromkeys(name for name in names if name not in ("none", "")))

    @model_validator(mode="after")
    def _tracking_belongs_together(self) -> TrackingKeys:
        for name in self.report_to.split(","):
            if name.strip() not in (*TRACKERS, "none", "all", ""):
                raise ValueError(
                    f"report_to: {name.strip()!r} is none of {', '.join(TRACKERS)}, all, none; "
                    "choose one of them"
                )
        if self.push_to_hub and self.hub_strategy != "end":
            raise ValueError(
                f"hub_strategy: {self.hub_strategy} is not supported; use hub_strategy: end, "
                "which uploads once, after training"
            )
        if self.hub_model_id is not None and not names_repository(self.hub_model_id):
            raise ValueError(
                f"hub_model_id: {self.hub_model_id!r} names no repository; write owner/name"
            )
        return self
