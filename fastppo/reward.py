"""What gives a finished response its score: the reward adapter, or a Python function."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastppo.batch import batches
from fastppo.errors import UserError
from fastppo.types import Rollout

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.roles import Roles
    from fastppo.templates import Template

RECORD = "fastppo_reward.json"
Reward = Callable[[Rollout], Tensor]


def load_function(name: str, key: str) -> Callable[..., Sequence[float]]:
    """The function behind `module:name`; `key` is the setting that named it, for the error."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise UserError(
            f"{key}: '{name}' is not module:function; write for example mine.rewards:short"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{key}: cannot import '{module_name}' ({error}); it must be importable from here"
        ) from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"{key}: '{module_name}' has no function '{attribute}'")
    return function


def call_scores(
    function: Callable[..., Sequence[float]],
    key: str,
    prompts: list[str],
    completions: list[str],
    columns: dict[str, list[Any]] | None = None,
) -> list[float]:
    """Scores of `completions`, checked: one finite number each.

    The record's columns are passed by name to a function that takes them (`**kwargs` takes all), as
    TRL's reward functions do.
    """
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    reserved = ("prompts", "completions")
    extra = {
        name: values
        for name, values in (columns or {}).items()
        if name not in reserved and (takes_all or name in parameters)
    }
    scores = [float(score) for score in function(prompts, completions, **extra)]
    if len(scores) != len(completions):
        raise UserError(f"{key}: gave {len(scores)} scores for {len(completions)} completions")
    for completion, score in zip(completions, scores, strict=True):
        if score != score or score in (float("inf"), float("-inf")):
            raise UserError(f"{key}: gave {score} for the completion {completion[:80]!r}")
    return scores


class FunctionReward:
    """Scores by a Python function of prompts, completions and the record's columns."""

    def __init__(self, name: str) -> None:
        self.key = f"reward_model {name}"
        self.function = load_function(name, "reward_model")

    def __call__(self, rollout: Rollout) -> Tensor:
        names = {name for prompt in rollout.prompts for name in prompt.columns}
        columns = {name: [p.columns.get(name) for p in rollout.prompts] for name in sorted(names)}
        prompts = [prompt.text for prompt in rollout.prompts]
        scores = call_scores(self.function, self.key, prompts, rollout.texts, columns)
        return torch.tensor(scores, device=rollout.input_ids_BT.device)


class AdapterReward:
    """Scores by the adapter and head of stage rm, read at the token where they were trained.

    Ours record that position: the last token, EOS. LLaMA-Factory's templates put a suffix behind
    EOS ("\\n" for the chatml family) and its reward models were trained on that, so it is appended.
    """

    def __init__(self, roles: Roles, folder: Path, template: Template, batch_size: int) -> None:
        self.roles, self.template, self.batch_size = roles, template, batch_size
        record = folder / RECORD
        if record.is_file():
            self.score_at = json.loads(record.read_text(encoding="utf-8"))["score_at"]
        else:
            self.score_at = "suffix" if template.suffix_ids else "eos"

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Tensor:
        if self.score_at == "suffix":
            rollout = append(rollout, list(self.template.suffix_ids), self.template.pad_id)
        head = self.roles.reward_head
        assert head is not None
        scores = []
        with self.roles.use("reward"):
            for batch in batches(rollout, range(len(rollout.prompts)), self.batch_size):
                hidden_BTD = self.roles.hidden(batch.input_ids_BT, batch.mask_BT)
                rows = torch.arange(len(batch.rows), device=hidden_BTD.device)
                last_BD = hidden_BTD[rows, batch.last_B]
                scores.append(head(last_BD.float()).squeeze(-1))
        return torch.cat(scores)


def append(rollout: Rollout, suffix_ids: list[int], pad_id: int) -> Rollout:
    """The same rollout with `suffix_ids` behind each response that ended by itself."""
    rows = []
    for row, length, ended in zip(
        rollout.input_ids_BT.tolist(), rollout.lengths, rollout.terminated, strict=True
    ):
        rows.append(row[:length] + (suffix_ids if ended else []))
    width = max(map(len, rows))
    longer = [
        n + (len(suffix_ids) if ended else 0)
        for n, ended in zip(rollout.response_lengths, rollout.terminated, strict=True)
    ]
    ids_BT = torch.tensor(
        [row + [pad_id] * (width - len(row)) for row in rows], device=rollout.input_ids_BT.device
    )
    return Rollout(
        prompts=rollout.prompts,
        input_ids_BT=ids_BT,
        prompt_lengths=rollout.prompt_lengths,
        response_lengths=longer,
        terminated=rollout.terminated,
        sampler_logprob_N=rollout.sampler_logprob_N,
        texts=rollout.texts,
    )


def make_reward(config: Config, roles: Roles, template: Template) -> Reward:
    """The reward that the YAML names."""
    if config.reward_model_type == "function":
        return FunctionReward(config.reward_model)
    return AdapterReward(
        roles, Path(config.reward_model), template, config.per_device_train_batch_size
    )
