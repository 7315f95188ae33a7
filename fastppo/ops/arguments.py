"""Arguments of the operators, checked, as they go on to registered operators and backends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable as torch_once_differentiable

from fastppo.ops import backend as backends
from fastppo.ops.checks import (
    NUMBERS,
    check_device,
    check_flag,
    check_floating,
    check_integer,
    check_number,
    check_offsets,
    check_range,
    check_scalar,
    check_vector,
    show,
    wrong_kind,
)
from fastppo.ops.config import PolicyLossConfig
from fastppo.ops.shapes import live_tokens

IGNORE_INDEX: Final = -100


class RowArguments(NamedTuple):
    """What is needed to compute log-probs from logits.

    With several labels a row, `token_N` has on its live rows what is no word of any vocabulary.
    """

    token_N: Tensor
    temperature: float | Tensor
    softcap: float | None
    ignore_index: int
    labels_NK: Tensor | None = None


class LossArguments(NamedTuple):
    """What is needed to compute a policy loss from log-probs; `name` is that of the loss."""

    behaviour_logprob_N: Tensor | None
    advantage_N: Tensor
    weight_N: Tensor
    ref_logprob_N: Tensor | None
    importance_weight_N: Tensor | None
    kl_weight_N: Tensor | None
    entropy_weight_N: Tensor | None
    offsets: Tensor | None
    kl_coef: float | Tensor
    entropy_coef: float | Tensor
    grad_scale: float | Tensor
    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_kind: str
    log_ratio_limit: float
    name: str = "ppo_clip"
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    ratio_limit: float = 20.0
    kl_bias_correction: bool = False
    kl_limit: float | None = None

    @property
    def by_sequence(self) -> bool:
        """Whether the loss of a token depends on its whole sequence."""
        return self.name in ("gspo", "gspo_token")

    @property
    def fused(self) -> bool:
        """Whether the kernels over logits have this loss."""
        apart = self.kl_weight_N is not None or self.entropy_weight_N is not None
        plain = not (apart or self.corrects_kl)
        return plain and self.name == "ppo_clip" and self.behaviour_logprob_N is not None

    @property
    def corrects_kl(self) -> bool:
        """Whether the KL is more than an estimate of `kl_kind`, see `fastppo.ops.losses.kl`."""
        return self.kl_bias_correction or self.kl_limit is not None

    @property
    def has_kl(self) -> bool:
        """Whether the KL may have a weight other than 0; a tensor's value is not read."""
        return self.ref_logprob_N is not None and not _is_zero(self.kl_coef)

    @property
    def has_entropy(self) -> bool:
        """Whether the entropy may have a weight other than 0; a tensor's value is not read."""
        return not _is_zero(self.entropy_coef)


def _is_zero(coefficient: float | Tensor) -> bool:
    return not isinstance(coefficient, Tensor) and coefficient == 0


def stat_dtype(*tensors: Tensor) -> torch.dtype:
    """Float32, or float64 where any input is: the dtype in which statistics are computed."""
    for tensor in tensors:
        if tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def constant(tensor: Tensor) -> Tensor:
    """The tensor without gradient."""
    return tensor.detach() if tensor.requires_grad else tensor


def rows_of(x_NV: Tensor) -> Tensor:
    """The matrix with stride 1 between the logits of a row; copied only if necessary."""
    return x_NV if x_NV.shape[1] <= 1 or x_NV.stride(1) == 1 else x_NV.contiguous()


def rows_and_lead(op: str, name: str, x: Tensor) -> tuple[Tensor, torch.Size]:
    """Floats (..., V) as (N, V), and the shape of the tokens; copied only if no view does."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        check_floating(op, name, x)
    shape = x.shape
    if x.ndim == 2:
        return x, shape[:1]
    if x.ndim == 0:
        raise ValueError(
            f"{op}: {name} must have at least one dimension, came (); one a token last"
        )
    return x.reshape(shape[:-1].numel(), shape[-1]), shape[:-1]


def flat(x: Tensor) -> Tensor:
    """What has one entry a token, as (N,)."""
    return x if x.ndim == 1 else x.reshape(-1)


def live_rows(rows: RowArguments, weight_N: Tensor | None = None) -> Tensor:
    """Mask (N,) of the rows that count: their token is not ignored and their weight is not 0."""
    live_N = rows.token_N != rows.ignore_index
    return live_N if weight_N is None else live_N & (weight_N != 0)


# Cached results of `choose`.
_chosen: dict[tuple[str | None, str, bool], str] = {}


def chosen_backend(op: str, backend: str | None, like: Tensor, *others: Tensor | None) -> str:
    """The backend that runs `op` on these tensors; see `fastppo.ops.backend.choose`."""
    if backend is not None and not isinstance(backend, str):
        wrong_kind(op, "backend", backend, "a name or None")
    if torch.compiler.is_compiling():
        return backends.choose(op, backend, like, *others)
    wide = like.dtype is torch.float64
    for tensor in others:
        wide = wide or (tensor is not None and tensor.dtype is torch.float64)
    key = (backend, like.device.type, wide)
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = backends.choose(op, backend, like, *others)
    return found


def vector_argument(
    op: str, name: str, x: Tensor | None, like: Tensor, lead: torch.Size, *, optional: bool = False
) -> Any:
    """An argument of one float a token, checked, without gradient, as (N,); None if it is None."""
    if (
        type(x) is Tensor
        and x.ndim == 1
        and x.shape == lead
        and x.is_floating_point()
        and x.device == like.device
        and not x.requires_grad
    ):
        return x  # what is right takes no longer than it must
    if x is None and optional:
        return None
    check_vector(op, name, x, like, n=lead, optional=optional)
    assert x is not None
    return flat(constant(x))


def is_traced(x: Tensor) -> bool:
    """Whether the call is being traced, or the tensor has no values: then operators are called
    through torch.library, which knows their shapes and gradients without running them.

    Other calls go directly to the backend, because torch.library costs more than the launch.
    """
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or x.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of the same name, without its cost unless a graph of the backward is made.

    It enters torch.no_grad, which takes a tenth of a backward of few rows, where gradients are off.
    """
    checked = torch_once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        return (checked if torch.is_grad_enabled() else backward)(ctx, *grads)

    return run


def check_tokens(
    op: str,
    token_N: Tensor,
    like: Tensor,
    *,
    lead: torch.Size,
    vocab: int,
    ignore_index: int,
    check: bool,
    labels: bool = False,
) -> None:
    """Check that tokens are integers of shape `lead`, or with `labels` (*lead, K); see `check`."""
    if not isinstance(token_N, Tensor):
        wrong_kind(op, "token_N", token_N, "a tensor")
    if token_N.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: token_N must be int64 (or int32), came {token_N.dtype}")
    shape = token_N.shape
    if shape != lead and not (labels and shape[:-1] == lead):
        raise ValueError(
            f"{op}: token_N must have shape {show(lead)}, one entry a row, "
            f"came {show(tuple(shape))}"
        )
    if token_N.device != like.device:
        check_device(op, "token_N", token_N, like)
    if vocab < 1:
        raise ValueError(f"{op}: the vocabulary is empty")
    if check:
        check_range(op, token_N, vocab, ignore_index)


def row_arguments(
    op: str,
    token_N: Tensor,
    like: Tensor,
    vocab: int,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    check: bool,
    lead: torch.Size | None = None,
    mask: Tensor | None = None,
    logit_scale: float | None = None,
    labels: bool = False,
) -> RowArguments:
    """Check the arguments of the rows of `like` (logits or hidden states), and return them as (N,).

    Args:
        lead: shape of the caller's tokens; None is that of the rows.
        mask: bool or 0/1, of that shape: a token behind it is an ignored one.
        logit_scale: the factor on the logits, before their softcap.
        labels: whether tokens may be (*lead, K): several labels a row.
    """
    lead = like.shape[:1] if lead is None else lead
    if not isinstance(check, bool) or not isinstance(ignore_index, int):
        check_flag(op, "check", check)
        check_integer(op, "ignore_index", ignore_index)
    check_tokens(
        op,
        token_N,
        like,
        lead=lead,
        vocab=vocab,
        ignore_index=ignore_index,
        check=check,
        labels=labels,
    )
    several = labels and token_N.ndim > len(lead)
    if mask is not None:
        live = live_tokens(op, mask, lead, like, check=check)
        token_N = torch.where(live[..., None] if several else live, token_N, ignore_index)
    labels_NK = None
    if several:
        labels_NK = token_N.reshape(like.shape[0], token_N.shape[-1])
        live_N = (labels_NK != ignore_index).any(1)
        token_N = torch.where(live_N, -2 if ignore_index == -1 else -1, ignore_index)
    elif len(lead) != 1:
        token_N = flat(token_N)
    if isinstance(temperature, Tensor):
        if temperature.ndim == 0:
            check_scalar(op, "temperature", temperature, like)
        else:
            check_vector(op, "temperature", temperature, like, n=lead)
        temperature = constant(temperature)
        if temperature.ndim > 1:
            temperature = temperature.reshape(-1)
    elif not isinstance(temperature, NUMBERS):
        wrong_kind(op, "temperature", temperature, "a number or a float tensor")
    elif not temperature > 0:
        raise ValueError(f"{op}: temperature must be positive, came {temperature}")
    if softcap is not None:
        check_number(op, "softcap", softcap)
    if logit_scale is not None:
        check_number(op, "logit_scale", logit_scale)
        # c tanh(s x / c) / tau = (c / s) tanh(x / (c / s)) / (tau / s)
        temperature = temperature / logit_scale
        softcap = None if softcap is None else softcap / logit_scale
    return RowArguments(token_N, temperature, softcap, ignore_index, labels_NK)


def loss_arguments(
    op: str,
    like: Tensor,
    *,
    behaviour_logprob_N: Tensor | None,
    advantage_N: Tensor,
    weight_N: Tensor,
    ref_logprob_N: Tensor | None,
    importance_weight_N: Tensor | None,
    offsets: Tensor | None,
    kl_coef: float | Tensor | None,
    entropy_coef: float | Tensor | None,
    config: PolicyLossConfig | None,
    grad_scale: float | Tensor | None,
    name: str = "ppo_clip",
    lead: torch.Size | None = None,
    kl_weight_N: Tensor | None = None,
    entropy_weight_N: Tensor | None = None,
) -> LossArguments:
    """Check the loss arguments for the rows of `like` (logits or hidden states); return them.

    Vectors have the shape `lead`, None is (N,); they are returned as (N,).
    """
    n = like.shape[:1] if lead is None else lead
    if config is None:
        config = _PPO
    elif not isinstance(config, PolicyLossConfig):
        wrong_kind(op, "config", config, "a PolicyLossConfig or None")
    vectors = (
        vector_argument(op, "behaviour_logprob_N", behaviour_logprob_N, like, n, optional=True),
        vector_argument(op, "advantage_N", advantage_N, like, n),
        vector_argument(op, "weight_N", weight_N, like, n),
        vector_argument(op, "ref_logprob_N", ref_logprob_N, like, n, optional=True),
        vector_argument(op, "importance_weight_N", importance_weight_N, like, n, optional=True),
        vector_argument(op, "kl_weight_N", kl_weight_N, like, n, optional=True),
        vector_argument(op, "entropy_weight_N", entropy_weight_N, like, n, optional=True),
    )
    beta = config.kl_coef if kl_coef is None else kl_coef
    bonus = config.entropy_coef if entropy_coef is None else entropy_coef
    scale = 1.0 if grad_scale is None else grad_scale
    for field, value in (("kl_coef", beta), ("entropy_coef", bonus), ("grad_scale", scale)):
        if type(value) is not float:
            check_scalar(op, field, value, like)
    if ref_logprob_N is None and not _is_zero(beta):
        raise ValueError(f"{op}: ref_logprob_N is needed where kl_coef is not 0, came None")
    what = f"loss={name!r}"
    if config.ratio_level == "sequence":
        what = "ratio_level='sequence'"
        if name not in ("ppo_clip", "gspo", "gspo_token"):
            raise ValueError(f"{op}: {what} is loss='gspo'; leave it out with loss={name!r}")
        name = "gspo" if name == "ppo_clip" else name
    by_sequence = name in ("gspo", "gspo_token")
    if by_sequence:
        if offsets is None and len(n) == 2:
            offsets = torch.arange(n[0] + 1, dtype=torch.int32, device=like.device) * n[1]
        if offsets is None:
            raise ValueError(f"{op}: offsets are needed by {what}, came None")
        check_offsets(op, offsets, like, n=like.shape[0])
    elif offsets is not None and not isinstance(offsets, Tensor):
        wrong_kind(op, "offsets", offsets, "a tensor or None")
    return LossArguments(
        *vectors,
        offsets if by_sequence else None,
        constant(beta) if isinstance(beta, Tensor) else beta,
        constant(bonus) if isinstance(bonus, Tensor) else bonus,
        constant(scale) if isinstance(scale, Tensor) else scale,
        config.clip_low,
        config.clip_high,
        config.dual_clip,
        config.kl_kind,
        config.log_ratio_limit,
        name,
        config.tau_pos,
        config.tau_neg,
        config.ratio_limit,
        config.kl_bias_correction,
        config.kl_limit,
    )


_PPO: Final = PolicyLossConfig()
