"""Sizes that a model's config.json publishes, whatever its family calls them. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from fastppo.config.memory import longest_sequence
from fastppo.errors import UserError

if TYPE_CHECKING:
    from fastppo.config.schema import Config

# Families whose positions end: a table of so many rows, learned or computed once. model_type -> the
# keys that may hold their number, and what it is where config.json is silent. Rotary families and
# most with ALiBi go on past what they were trained for.
POSITIONS: Final[dict[str, tuple[tuple[str, ...], int]]] = {
    "biogpt": (("max_position_embeddings",), 1024),
    "codegen": (("n_positions",), 2048),
    "ctrl": (("n_positions",), 256),
    "gpt2": (("n_positions", "max_position_embeddings"), 1024),
    "gpt_bigcode": (("n_positions", "max_position_embeddings"), 1024),
    "gpt_neo": (("max_position_embeddings",), 2048),
    "gptj": (("n_positions", "max_position_embeddings"), 2048),
    "mpt": (("max_seq_len",), 2048),  # ALiBi, computed once
    "openai-gpt": (("n_positions",), 512),
    "opt": (("max_position_embeddings",), 2048),
}


def text_part(data: dict[str, Any]) -> dict[str, Any]:
    """The text model's part of a config.json; of a text model that is all of it."""
    inner = data.get("text_config")
    return {**data, **inner} if isinstance(inner, dict) else data


def hidden_width(data: dict[str, Any]) -> Any:
    """Width of the last hidden state, which a value head takes; None where it is not said."""
    own = text_part(data)
    names = ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model")  # OPT's has two widths
    return next((own[name] for name in names if own.get(name) is not None), None)


def last_position(data: dict[str, Any]) -> tuple[str, int] | None:
    """Tokens that the longest sequence may have, and the key that says so.

    None for families whose positions do not end.
    """
    own = text_part(data)
    keys, default = POSITIONS.get(str(own.get("model_type")), ((), 0))
    if not keys:
        return None
    for name in keys:
        if isinstance(own.get(name), int):
            return name, own[name]
    return keys[0], default


def check_last_position(config: Config, key: str, name: str, data: dict[str, Any]) -> None:
    """Refuse sequences that are longer than the model with this config.json has positions for.

    Past the last one there is no row in its table, and the forward fails: on a GPU without a word
    that says why.

    Args:
        key: the setting that names the model.
        name: its folder or hub name.
        data: its config.json.
    """
    last, asked = last_position(data), longest_sequence(config)
    if last is None or asked <= last[1]:
        return
    field, most = last
    words, left = f"cutoff_len {config.cutoff_len}", most
    if config.stage == "ppo":
        words += f" + max_new_tokens {config.max_new_tokens}"
        left -= config.max_new_tokens
    cure = f"lower cutoff_len to {left} or less"
    if left < 2:
        cure = f"lower max_new_tokens, so that both together are {most} or less"
    raise UserError(
        f"{config.source}: a sequence can have {asked} tokens ({words}), and {key} {name} has "
        f"positions for {most} ({field}); {cure}"
    )
