"""Launch sizes of the row kernels: those to be tried, the one of the table, and a forced launch.

The only module here that knows how `fastppo.ops.backends` names them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from fastppo.ops.arguments import loss_arguments, row_arguments
from fastppo.ops.backends import Scores, Statistics, triton
from fastppo.ops.backends.sizes import RowConfig, candidates, device_of, row_config
from fastppo.ops.policy_loss import empty_loss_rows

KERNELS: Final = ("policy_loss", "token_logprobs", "score_tokens")
Launch = Callable[[], None]


def launch_sizes(kernel: str, itemsize: int, vocab: int) -> tuple[dict[str, RowConfig], str]:
    """The sizes that may be tried for a kernel, by label, and the label of the table's."""
    pair, twice = kernel == "score_tokens", kernel == "policy_loss"
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    table = row_config(itemsize, vocab, pair=pair, twice=twice, device=device_of(device))
    tried = (table, *candidates(itemsize, vocab, pair=pair, twice=twice))
    return {str(config): config for config in tried}, str(table)


def forced(kernel: str, given: dict[str, Tensor], config: RowConfig) -> Launch:
    """A launch of a kernel over all rows, out of place, at this size."""
    logits = given["logits"]
    n, vocab = logits.shape
    everything = slice(0, n)
    rows = row_arguments(
        kernel,
        given["token"],
        logits,
        vocab,
        temperature=1.0,
        softcap=None,
        ignore_index=-100,
        check=False,
    )
    if kernel == "score_tokens":
        scores = Scores(*(vector(logits) for _ in Scores._fields))
        return lambda: triton.score_tokens(logits, given["other"], rows, everything, scores, config)
    if kernel == "token_logprobs":
        statistics = Statistics(*(vector(logits) for _ in Statistics._fields))
        return lambda: triton.token_logprobs(logits, rows, everything, statistics, None, config)
    loss: Any = loss_arguments(
        kernel,
        logits,
        behaviour_logprob_N=given["behaviour"],
        advantage_N=given["advantage"],
        weight_N=given["weight"],
        ref_logprob_N=None,
        importance_weight_N=None,
        offsets=None,
        kl_coef=None,
        entropy_coef=None,
        config=None,
        grad_scale=None,
    )
    into, out = empty_loss_rows(logits, "triton"), given["buffer"]
    return lambda: triton.policy_loss(logits, out, rows, loss, everything, into, config)


def vector(logits: Tensor) -> Tensor:
    """Memory for a number a row."""
    return torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
