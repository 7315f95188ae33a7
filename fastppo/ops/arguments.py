"""Arguments of the operators, and their checks on the host.

An error names the op, the argument, what was expected and what was given. Only what the host knows
is checked (shapes, dtypes, devices), because reading a value would wait for the device.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from fastppo.ops import backend as backends
from fastppo.ops.config import KL_NAMES, PolicyLossConfig

IGNORE_INDEX: Final = -100


class RowArguments(NamedTuple):
    """What is needed to compute log-probs from logits."""

    token_N: Tensor
    temperature: float | Tensor
    softcap: float | None
    ignore_index: int


class LossArguments(NamedTuple):
    """What is needed to compute a policy loss from log-probs; `name` is that of the loss."""

    behaviour_logprob_N: Tensor | None
    advantage_N: Tensor
    weight_N: Tensor
    ref_logprob_N: Tensor | None
    importance_weight_N: Tensor | None
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

    @property
    def by_sequence(self) -> bool:
        """Whether the loss of a token depends on its whole sequence."""
        return self.name in ("gspo", "gspo_token")

    @property
    def fused(self) -> bool:
        """Whether the kernels over logits have this loss."""
        return self.name == "ppo_clip" and self.behaviour_logprob_N is not None

    @property
    def has_kl(self) -> bool:
        """Whether the KL may have a weight other than 0; a tensor's value is not read."""
        return self.ref_logprob_N is not None and not _is_zero(self.kl_coef)

    @property
    def has_entropy(self) -> bool:
        """Whether the entropy may have a weight other than 0; a tensor's value is not read."""
        return not _is_zero(self.entropy_coef)


class GaeArguments(NamedTuple):
    """Arguments of `fastppo.ops.gae`."""

    reward_N: Tensor
    value_N: Tensor
    offsets: Tensor
    gamma: float
    lam: float
    bootstrap_value_B: Tensor | None
    backend: str


class AdvantagesArguments(NamedTuple):
    """Arguments of `fastppo.ops.advantages`."""

    score_B: Tensor
    logprob_N: Tensor
    ref_logprob_N: Tensor
    value_N: Tensor
    offsets: Tensor
    kl_coef: float | Tensor
    kl_kind: str
    kl_N: Tensor | None
    extra_reward_N: Tensor | None
    gamma: float
    lam: float
    bootstrap_value_B: Tensor | None
    whiten_rewards: bool
    whiten_advantages: bool
    log_ratio_limit: float
    backend: str


def _is_zero(coefficient: float | Tensor) -> bool:
    return not isinstance(coefficient, Tensor) and coefficient == 0


def stat_dtype(*tensors: Tensor) -> torch.dtype:
    """Float32, or float64 where any input is: the dtype in which statistics are computed."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def constant(tensor: Tensor) -> Tensor:
    """The tensor without gradient."""
    return tensor.detach() if tensor.requires_grad else tensor


def rows_of(x_NV: Tensor) -> Tensor:
    """The matrix with stride 1 between the logits of a row; copied only if necessary."""
    return x_NV if x_NV.shape[1] <= 1 or x_NV.stride(1) == 1 else x_NV.contiguous()


def live_rows(rows: RowArguments, weight_N: Tensor | None = None) -> Tensor:
    """Mask (N,) of the rows that count: their token is not ignored and their weight is not 0."""
    live_N = rows.token_N != rows.ignore_index
    return live_N if weight_N is None else live_N & (weight_N != 0)


# Cached results of `choose`.
_chosen: dict[tuple[str | None, str, bool], str] = {}


def chosen_backend(op: str, backend: str | None, *tensors: Tensor | None) -> str:
    """The backend that runs `op` on these tensors; see `fastppo.ops.backend.choose`."""
    given = [t for t in tensors if t is not None]
    if torch.compiler.is_compiling():
        return backends.choose(op, backend, *given)
    wide = torch.float64 in [t.dtype for t in given]
    key = (backend, given[0].device.type, wide)
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = backends.choose(op, backend, *given)
    return found


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


def show(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"


def check_floating(op: str, name: str, tensor: Tensor, *, ndim: int) -> None:
    """Check that `tensor` is floating point and has `ndim` dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, came {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must hold floats, came {tensor.dtype}")
    if tensor.ndim != ndim:
        letters = {1: "(N,)", 2: "two dimensions"}[ndim]
        raise ValueError(
            f"{op}: {name} must have {letters}, came {show(tuple(tensor.shape))}; "
            "flatten or pack batch and time first"
        )


def check_vector(
    op: str, name: str, tensor: Tensor | None, like: Tensor, *, n: int, mask: bool = False
) -> None:
    """Check that `tensor`, if given, is (n,), on the device of `like`, and floats unless a mask."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, came {type(tensor).__name__}")
    if not mask and not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must hold floats, came {tensor.dtype}")
    if tuple(tensor.shape) != (n,):
        raise ValueError(f"{op}: {name} must have shape ({n},), came {show(tuple(tensor.shape))}")
    check_device(op, name, tensor, like)


def check_device(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, came {tensor.device}; move it")


def check_scalar(op: str, name: str, value: float | Tensor | None, like: Tensor) -> None:
    """Check that `value` is a float, or a 0-d floating-point tensor on the device of `like`."""
    if not isinstance(value, Tensor):
        return
    if value.ndim != 0:
        raise ValueError(
            f"{op}: {name} must be a float or a 0-d tensor, came {show(tuple(value.shape))}"
        )
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must hold a float, came {value.dtype}")
    check_device(op, name, value, like)


def check_unit_interval(op: str, name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: {name} must lie in [0, 1], came {value}")


def check_offsets(op: str, value: Tensor, like: Tensor, *, n: int) -> None:
    """Check offsets: integers (B+1,), ascending from 0 to n; values are read only on the CPU."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: offsets must be a tensor, came {type(value).__name__}")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: offsets must be int32 (or int64), came {value.dtype}")
    if value.ndim != 1 or value.numel() < 1:
        raise ValueError(
            f"{op}: offsets must have shape (B+1,), came {show(tuple(value.shape))}; "
            "it holds the start of each sequence and, last, N"
        )
    check_device(op, "offsets", value, like)
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(value[0]) != 0 or int(value[-1]) != n:
            raise ValueError(
                f"{op}: offsets must start at 0 and end at N={n}, "
                f"came {int(value[0])} and {int(value[-1])}"
            )
        if bool((value[1:] < value[:-1]).any()):
            raise ValueError(f"{op}: offsets must ascend, came {value.tolist()}")


def check_tokens(
    op: str, token_N: Tensor, like: Tensor, *, n: int, vocab: int, ignore_index: int, check: bool
) -> None:
    """Check that `token_N` is integers (n,); with `check`, also that they are in range."""
    if not isinstance(token_N, Tensor):
        raise TypeError(f"{op}: token_N must be a tensor, came {type(token_N).__name__}")
    if token_N.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: token_N must be int64 (or int32), came {token_N.dtype}")
    if tuple(token_N.shape) != (n,):
        raise ValueError(
            f"{op}: token_N must have shape ({n},), one entry a row, "
            f"came {show(tuple(token_N.shape))}"
        )
    check_device(op, "token_N", token_N, like)
    if vocab < 1:
        raise ValueError(f"{op}: the vocabulary is empty")
    if check:
        wrong = ((token_N < 0) | (token_N >= vocab)) & (token_N != ignore_index)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(
                f"{op}: token_N must lie in [0, {vocab}) or be {ignore_index} (ignored), "
                f"came {int(token_N[at])} at {at}"
            )


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
) -> RowArguments:
    """Check the arguments of the rows of `like` (logits or hidden states), and return them."""
    n = like.shape[0]
    check_tokens(op, token_N, like, n=n, vocab=vocab, ignore_index=ignore_index, check=check)
    if isinstance(temperature, Tensor):
        if temperature.ndim == 0:
            check_scalar(op, "temperature", temperature, like)
        else:
            check_vector(op, "temperature", temperature, like, n=n)
        temperature = constant(temperature)
    elif not temperature > 0:
        raise ValueError(f"{op}: temperature must be positive, came {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be positive or None, came {softcap}")
    return RowArguments(token_N, temperature, softcap, ignore_index)


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
) -> LossArguments:
    """Check the loss arguments for the rows of `like` (logits or hidden states); return them."""
    n = like.shape[0]
    config = _PPO if config is None else config
    check_vector(op, "behaviour_logprob_N", behaviour_logprob_N, like, n=n)
    check_vector(op, "advantage_N", advantage_N, like, n=n)
    check_vector(op, "weight_N", weight_N, like, n=n)
    check_vector(op, "ref_logprob_N", ref_logprob_N, like, n=n)
    check_vector(op, "importance_weight_N", importance_weight_N, like, n=n)
    beta = config.kl_coef if kl_coef is None else kl_coef
    bonus = config.entropy_coef if entropy_coef is None else entropy_coef
    scale = 1.0 if grad_scale is None else grad_scale
    check_scalar(op, "kl_coef", beta, like)
    check_scalar(op, "entropy_coef", bonus, like)
    check_scalar(op, "grad_scale", scale, like)
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
        if offsets is None:
            raise ValueError(f"{op}: offsets are needed by {what}, came None")
        check_offsets(op, offsets, like, n=n)
    return LossArguments(
        None if behaviour_logprob_N is None else constant(behaviour_logprob_N),
        constant(advantage_N),
        constant(weight_N),
        None if ref_logprob_N is None else constant(ref_logprob_N),
        None if importance_weight_N is None else constant(importance_weight_N),
        offsets if by_sequence else None,
        constant(beta) if isinstance(beta, Tensor) else beta,
        constant(bonus) if isinstance(bonus, Tensor) else bonus,
        constant(scale) if isinstance(scale, Tensor) else scale,
        config.clip_low,
        config.clip_high,
        config.dual_clip,
        KL_NAMES.get(config.kl_kind, config.kl_kind),
        config.log_ratio_limit,
        name,
        config.tau_pos,
        config.tau_neg,
        config.ratio_limit,
    )


def check_inplace(op: str, logits_NV: Tensor) -> None:
    """Check that an op may overwrite the logits: no leaf, no expanded or overlapping memory."""
    base = logits_NV._base
    if logits_NV.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        what = "a leaf" if logits_NV.is_leaf else "a view of a leaf"
        raise ValueError(
            f"{op}: inplace=True needs logits that some operation made, came {what}; leave it out"
        )
    if _overlaps(logits_NV):
        raise ValueError(
            f"{op}: inplace=True needs logits of their own memory, "
            "came an expanded or overlapping tensor; leave it out"
        )
    if torch.compiler.is_compiling():
        raise ValueError(f"{op}: inplace=True does not go through torch.compile; leave it out")


def _overlaps(x_NV: Tensor) -> bool:
    """Whether two entries of a matrix may share memory."""
    reach = 0  # largest offset in the dimensions seen so far, the innermost first
    for stride, size in sorted(zip(x_NV.stride(), x_NV.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


_PPO: Final = PolicyLossConfig()
