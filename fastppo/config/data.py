"""Keys of the data and its template, and checks of how they go together. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from fastppo.config.key import LF, OWN, Keys, NonNegative, Positive, key

DATA_LISTS = ("dataset", "eval_dataset", "interleave_probs")


class DataKeys(Keys):
    """Keys of the training data and its format."""

    title = "Data"

    dataset: str = key(
        ...,
        LF,
        "Names in dataset_info.json, or paths of files; comma separated. docs/data.md.",
        first=True,
    )
    eval_dataset: str | None = key(None, LF, "Data sets for evaluation, named like dataset.")
    dataset_dir: str = key(
        "data",
        LF,
        "Folder of dataset_info.json and its files; with ONLINE the names are names on the hub.",
    )
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = key(
        "concat",
        LF,
        "How to mix several data sets: concatenate them, or alternate until the first (under) "
        "or the last (over; once repeats no row) is used up.",
    )
    interleave_probs: str | None = key(
        None, LF, "Shares of the data sets in an interleaved mix, comma separated."
    )
    val_size: NonNegative = key(
        0.0, LF, "Held out from dataset for evaluation: a share below 1, or a number of records."
    )
    cutoff_len: Positive = key(
        2048, LF, "Largest number of tokens in a prompt (ppo) or in prompt and answer (rm)."
    )
    max_samples: Positive | None = key(
        None, LF, "Use only the first records of each data set, up to this number."
    )
    lf_truncation: bool = key(
        False,
        OWN,
        "Truncate a prompt that is too long as LLaMA-Factory does, which cuts off its "
        "generation header.",
    )
    template: str | None = key(
        None, LF, "Chat template by name; null is the tokenizer's own.", first=True
    )
    enable_thinking: bool = key(
        True, LF, "false writes an empty thought before every answer of a reasoning template."
    )
    preserve_thinking: bool = key(
        False, LF, "Keep the thoughts of earlier turns; reasoning templates remove them."
    )
    default_system: str | None = key(None, LF, "System prompt instead of the template's.")

    @property
    def mixing_probabilities(self) -> list[float] | None:
        """interleave_probs as a list of numbers."""
        text = self.interleave_probs
        return None if text is None else [float(part) for part in text.split(",")]

    @model_validator(mode="after")
    def _data_belongs_together(self) -> DataKeys:
        if self.val_size and self.eval_dataset:
            raise ValueError(
                "val_size: leave it out where eval_dataset is given, or the other way round"
            )
        if self.val_size > 1 and self.val_size != int(self.val_size):
            raise ValueError("val_size: above 1 it is a count of records; give a whole number")
        if self.interleave_probs is None:
            return self
        if self.mix_strategy == "concat":
            raise ValueError(
                "interleave_probs: means nothing to mix_strategy: concat; leave it out, or "
                "interleave"
            )
        try:
            shares = self.mixing_probabilities or []
        except ValueError:
            shares = []
        if not shares or min(shares) < 0 or not abs(sum(shares) - 1) <= 1e-6:
            raise ValueError(
                f"interleave_probs: '{self.interleave_probs}' is no list of shares that add up to "
                "1; write for example 0.7,0.3"
            )
        return self
