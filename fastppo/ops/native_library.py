"""Loads the library of C++ kernels for CPUs, which has a plain C interface.

`setup.py` builds the library if there is a compiler. It is compiled with OpenMP but not linked to
it, so that it uses the OpenMP runtime that torch has loaded: two thread pools in one process would
slow each other down. Therefore torch is imported first.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, ClassVar, Final

import torch  # before the library: see above

ISAS: Final = ("portable", "avx2", "avx512")
INSTALL: Final = "install fastppo where there is a C++ compiler: pip install ."


class _Struct(ctypes.Structure):
    """Base of the structs that kernels/cpu/abi.h declares."""

    _fields_: ClassVar[Any]


class RowsStruct(_Struct):
    """FastppoRows: rows of logits, with their tokens, weights and temperatures."""

    _fields_: ClassVar = [
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("n", c_int64),
        ("vocab", c_int64),
        ("first_row", c_int64),
        ("token", c_void_p),
        ("live", c_void_p),
        ("temperature", c_void_p),
        ("ignore_index", c_int64),
        ("dtype", c_int32),
        ("tau", c_float),
        ("softcap", c_float),
        ("padding", c_int32),
    ]


class GradientStruct(_Struct):
    """FastppoGradient: where a gradient is written."""

    _fields_: ClassVar = [
        ("out", c_void_p),
        ("stride", c_int64),
        ("dtype", c_int32),
        ("stream", c_int32),
    ]


class LossStruct(_Struct):
    """FastppoLoss: inputs of PPO's loss for each row, and where its results are written."""

    _fields_: ClassVar = [
        *(
            (name, c_void_p)
            for name in (
                "behaviour",
                "advantage",
                "weight",
                "ref",
                "importance",
                "logprob",
                "entropy",
                "kl",
                "term",
            )
        ),
        ("term_stride", c_int64),
        *(
            (name, c_float)
            for name in (
                "kl_coef",
                "entropy_coef",
                "grad_scale",
                "clip_low",
                "clip_high",
                "dual_clip",
                "limit",
            )
        ),
        ("kl_kind", c_int32),
    ]


class StatisticsStruct(_Struct):
    """FastppoStatistics: pointers to vectors (N,)."""

    _fields_: ClassVar = [(name, c_void_p) for name in ("logprob", "entropy", "row_max", "sum_exp")]


class ScoresStruct(_Struct):
    """FastppoScores: pointers to vectors (N,)."""

    _fields_: ClassVar = [(name, c_void_p) for name in ("logprob", "ref_logprob", "entropy", "kl")]


class AdvantagesStruct(_Struct):
    """FastppoAdvantages: inputs and results of `advantages`."""

    _fields_: ClassVar = [
        *(
            (name, c_void_p)
            for name in (
                "score",
                "logprob",
                "ref",
                "exact_kl",
                "extra",
                "value",
                "offsets",
                "bootstrap",
                "advantage",
                "returns",
                "reward",
                "kl",
                "part",
            )
        ),
        ("batch", c_int64),
        ("gamma", c_double),
        ("lam", c_double),
        ("kl_coef", c_float),
        ("limit", c_float),
        ("kl_kind", c_int32),
        ("whiten_rewards", c_int32),
        ("whiten_advantages", c_int32),
        ("padding", c_int32),
    ]


class FewRowsStruct(_Struct):
    """FastppoFewRows: inputs and result of a linear layer for few rows."""

    _fields_: ClassVar = [
        ("x", c_void_p),
        ("weight", c_void_p),
        ("weight_stride", c_int64),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("n", c_int64),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("dtype", c_int32),
        ("padding", c_int32),
    ]


class DecodeAttentionStruct(_Struct):
    """FastppoDecodeAttention: inputs and result of the attention of one new token a row."""

    _fields_: ClassVar = [
        ("query", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        *((name, c_int64) for name in ("key_row", "key_head", "value_row", "value_head")),
        ("first", c_void_p),
        ("out", c_void_p),
        *(
            (name, c_int64)
            for name in ("rows", "heads", "kv_heads", "places", "size", "value_size")
        ),
        ("scale", c_float),
        ("softcap", c_float),
        ("dtype", c_int32),
        ("padding", c_int32),
    ]


class DecoderLayerStruct(_Struct):
    """FastppoDecoderLayer: a decoder layer on one new token a row."""

    _fields_: ClassVar = [
        *((name, FewRowsStruct) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("attention", DecodeAttentionStruct),
        *(
            (name, c_void_p)
            for name in ("x", "norm", "post_norm", "q_norm", "k_norm", "cos", "sin", "out", "work")
        ),
        ("rotary_row", c_int64),
        ("eps", c_float),
        ("head_eps", c_float),
    ]


class WordBlockStruct(_Struct):
    """FastppoWordBlock: logits of a block of words for all tokens, and what they are added to."""

    _fields_: ClassVar = [
        ("x", c_void_p),
        *((name, c_int64) for name in ("x_stride", "n", "words", "first_word", "vocab")),
        ("token", c_void_p),
        ("ignore_index", c_int64),
        *(
            (name, c_void_p)
            for name in (
                "bias",
                "tau",
                "factor",
                "least",
                "shift",
                "row_max",
                "sampled",
                "sum_exp",
                "sum_shifted_exp",
                "slope",
            )
        ),
        ("slope_stride", c_int64),
        ("size", c_int64),
        ("softcap", c_float),
        ("padding", c_int32),
    ]


class WordSlopesStruct(_Struct):
    """FastppoWordSlopes: what makes a gradient of a block's exponentials, one a token."""

    _fields_: ClassVar = [
        (name, c_void_p) for name in ("out", "of_exp", "of_shifted_exp", "of_token")
    ]


# The structs in the order of fastppo_sizeof, which gives the size that the library expects.
STRUCTS: Final = (
    RowsStruct,
    GradientStruct,
    LossStruct,
    StatisticsStruct,
    ScoresStruct,
    AdvantagesStruct,
    FewRowsStruct,
    DecodeAttentionStruct,
    DecoderLayerStruct,
    WordBlockStruct,
    WordSlopesStruct,
)

(
    _ROWS,
    _GRADIENT,
    _LOSS,
    _STATISTICS,
    _SCORES,
    _ADVANTAGES,
    _FEW_ROWS,
    _ATTENTION,
    _LAYER,
    _WORDS,
    _WORD_SLOPES,
) = (POINTER(s) for s in STRUCTS)
_SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "isa": (c_int, []),
    "use_isa": (c_int, [c_int]),
    "sizeof": (c_int64, [c_int]),
    "policy_loss": (None, [_ROWS, _GRADIENT, _LOSS]),
    "token_logprobs": (None, [_ROWS, _STATISTICS]),
    "token_logprobs_backward": (None, [_ROWS, _GRADIENT, _STATISTICS, c_void_p, c_void_p]),
    "score_tokens": (None, [_ROWS, c_void_p, c_int64, _SCORES]),
    "sum_rows": (None, [c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p]),
    "token_kl": (None, [*[c_void_p] * 4, c_int64, c_float, c_int]),
    "token_kl_backward": (None, [c_void_p, c_void_p, c_int64, c_int64, c_void_p]),
    "value_loss": (None, [*[c_void_p] * 4, c_float, c_int64, *[c_void_p] * 3]),
    "moments": (None, [c_void_p, c_void_p, c_int64, c_void_p]),
    "whiten": (None, [*[c_void_p] * 3, c_int64, c_int, c_void_p]),
    "gae": (
        None,
        [*[c_void_p] * 3, c_int64, c_void_p, c_double, c_double, c_void_p, c_void_p],
    ),
    "advantages": (None, [_ADVANTAGES]),
    "few_rows": (None, [_FEW_ROWS]),
    "decode_attention": (None, [_ATTENTION]),
    "decoder_layer": (None, [_LAYER]),
    "word_block": (None, [_WORDS]),
    "word_gradient": (None, [_WORDS, _WORD_SLOPES]),
    "word_block_end": (None, [_WORDS, _STATISTICS, c_void_p]),
    "gated_unit": (None, [c_void_p, c_void_p, c_int64, c_void_p]),
    "gated_unit_backward": (None, [*[c_void_p] * 3, c_int64, *[c_void_p] * 2]),
    "rms_norm_backward": (None, [*[c_void_p] * 3, c_float, c_int64, c_int64, c_void_p]),
    "rms_norm": (None, [c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p]),
    "advise": (None, [c_void_p, c_int64]),
}


def _load() -> tuple[Any, str | None]:
    """The library and None; or None and the reason why there is no library."""
    found = Path(__file__).parents[1] / "_native.so"
    if not found.is_file():
        return None, f"the C++ kernels were not built; {INSTALL}"
    try:
        library = ctypes.CDLL(str(found))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"fastppo_{name}")
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"{found.name} does not load ({error}); {INSTALL}"
    sizes = [ctypes.sizeof(struct) for struct in STRUCTS]
    if [library.fastppo_sizeof(i) for i in range(len(STRUCTS))] != sizes:
        return None, f"{found.name} is of another version; {INSTALL}"
    wanted = os.environ.get("FASTPPO_CPU") or None
    if wanted is not None:
        if wanted not in ISAS:
            return None, f"FASTPPO_CPU={wanted!r} is none of {', '.join(ISAS)}"
        if library.fastppo_use_isa(ISAS.index(wanted)) < 0:
            return None, f"FASTPPO_CPU={wanted!r}: this processor has no {wanted}"
    return library, None


assert torch  # importing it has loaded OpenMP
LIBRARY, OBSTACLE = _load()


def isa() -> str:
    """The instruction set that the kernels use: portable, avx2 or avx512."""
    return ISAS[LIBRARY.fastppo_isa()]
