"""What a model takes: tokens with a row in its embeddings, and as many as it was trained for.

A tokenizer can have a token that its model has no row for: somebody added [PAD] to it and did not
resize the embeddings. Looking its row up fails, on a GPU without a word that says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.errors import UserError
from fastppo.models.load import load_config, load_tokenizer
from fastppo.models.weights import vocabulary_size

if TYPE_CHECKING:
    from fastppo.config import Config

CURE = "give the model a row for it (resize_token_embeddings) and save it"


def embedding_rows(config: Config) -> int:
    """Rows of the base's embeddings, from its config.json: tokens that it can take."""
    return vocabulary_size(load_config(config))


def drop_pad_without_row(tokenizer: Any, rows: int) -> str | None:
    """Take away a padding token that has no row; a template then pads with EOS.

    Padding reaches no loss, so any token with a row will do.

    Returns:
        A note on it, or None where nothing is changed.
    """
    pad = tokenizer.pad_token_id
    if pad is None or pad < rows:
        return None
    name, tokenizer.pad_token = tokenizer.pad_token, None
    return (
        f"the tokenizer pads with {name} (id {pad}), and the model's embeddings have {rows} rows, "
        "none for it: EOS pads instead, here and in what is saved"
    )


def note_beyond_training(config: Config, longest: int) -> str | None:
    """A note where a sequence can be longer than the base was trained for; None where none is.

    Rotary positions go on, and the model gets worse; with their scaling set (YaRN and the like)
    nobody but its author knows from where on.

    Args:
        longest: tokens of the longest sequence that the data can give.
    """
    own = load_config(config).get_text_config()
    most = getattr(own, "max_position_embeddings", None)
    rope = getattr(own, "rope_parameters", None) or {}
    scaled = isinstance(rope, dict) and rope.get("rope_type", "default") != "default"
    if not isinstance(most, int) or scaled or longest <= most:
        return None
    return (
        f"a sequence can have {longest} tokens, and {config.model_name_or_path} was trained for "
        f"{most} (max_position_embeddings); lower cutoff_len"
        + (" or max_new_tokens" if config.stage == "ppo" else "")
    )


def check_rows(
    tokenizer: Any, rows: int, sequences: Iterable[Sequence[int]], key: str, what: str
) -> None:
    """Refuse sequences with a token that the embeddings have no row for.

    Args:
        rows: rows of the embeddings.
        sequences: token ids.
        key: the setting that they are from.
        what: what they are.
    """
    highest = max((max(ids, default=0) for ids in sequences), default=0)
    if highest >= rows:
        raise UserError(
            f"{key}: {what} has the token {tokenizer.convert_ids_to_tokens(highest)} (id "
            f"{highest}), and the model's embeddings have {rows} rows, none for it; {CURE}, or "
            "take the token out"
        )


def check_reward_tokens(config: Config, tokenizer: Any) -> None:
    """Refuse a LoRA reward whose folder has another tokenizer than the policy's, if it has one.

    It is given the policy's token ids. Tokens that only one of the two has are no fault: a token
    for padding may have been added.
    """
    own = tokenizer.get_vocab()
    for folder in config.reward_adapters.values():
        if not (Path(folder) / "tokenizer_config.json").is_file():
            continue
        try:
            theirs = load_tokenizer(config, folder).get_vocab()
        except UserError:  # only its weights are needed
            continue
        other = next((t for t, i in theirs.items() if own.get(t, i) != i), None)
        if other is not None:
            raise UserError(
                f"reward_model: {folder} was trained with another tokenizer than "
                f"{config.model_name_or_path} has: {other} is token {theirs[other]} there and "
                f"{own[other]} here; train it on the same base"
            )


def check_reference_vocabulary(config: Config) -> None:
    """Refuse the KL over the whole vocabulary with a `ref_model` that has more or fewer logits.

    Models of one family and tokenizer can differ in that: their embeddings are padded.
    """
    if config.kl_penalty != "full" or config.ref_model is None:
        return
    own = embedding_rows(config)
    given = config.objects.ref_model
    reference = load_config(config, config.ref_model) if given is None else given.config
    theirs = vocabulary_size(reference)
    if theirs != own:
        raise UserError(
            f"kl_penalty: full: ref_model {config.ref_model} has {theirs} logits and "
            f"{config.model_name_or_path} {own}, and a KL over the whole vocabulary needs the "
            "same; use kl_penalty: kl"
        )
