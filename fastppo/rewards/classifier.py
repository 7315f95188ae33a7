"""Scores by a sequence classifier, on conversations formatted with its own chat template."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastppo.errors import UserError
from fastppo.models.batch import partition
from fastppo.models.limits import check_rows
from fastppo.types import Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastppo.memory.budgets import Budget

# Marks the end of a truncated response; everything that the chat template writes after it is cut.
CUT_HERE = "<<<truncated>>>"


class ClassifierReward:
    """Scores a rollout with a sequence classifier of one label; returns (B,) float32.

    Prompt and response are formatted with the classifier's own chat template and tokenizer; the
    score is the classifier's logit for that conversation. A truncated response gets no end of turn,
    because the policy sampled none; the other kinds of reward see none either.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        name: str,
        budget: Budget,
        *,
        bias: float = 0.0,
    ) -> None:
        self.model, self.tokenizer, self.budget = model, tokenizer, budget
        self.key = f"reward_model: {name}"
        # The head's bias, written by fastppo-export: transformers' classifiers have no bias.
        self.bias = float(getattr(model.config, "score_bias", 0.0)) + bias
        inner = model.config.get_text_config()
        self.openrlhf = is_openrlhf(model.config)
        self.mean, self.std = normalisation(model.config)
        # OpenRLHF reads the last token, even a padding token; transformers the last before padding.
        # -1 and a token that was added without a row mean the same as none.
        embeddings: Any = model.get_input_embeddings()
        self.rows = int(embeddings.weight.shape[0])
        pad_id = None if self.openrlhf else inner.pad_token_id
        self.pad_id = pad_id if pad_id is not None and 0 <= pad_id < self.rows else None
        self.max_length = min(
            getattr(inner, "max_position_embeddings", None) or 1 << 30,
            getattr(tokenizer, "model_max_length", None) or 1 << 30,
        )
        self.warned_of_length = False

    def encode(self, prompt: Prompt, text: str, *, truncated: bool = False) -> list[int]:
        """Token ids of the prompt's conversation with `text` as its last answer.

        If the conversation is longer than the classifier's limit, its beginning is cut off. With
        `truncated`, the ids end with the text: there is no end of turn.
        """
        answer = text + CUT_HERE if truncated else text
        chat = [*prompt.messages, {"role": "assistant", "content": answer}]
        try:
            conversation = self.tokenizer.apply_chat_template(chat, tokenize=False)
        except Exception as error:  # a chat template can raise anything
            raise UserError(
                f"{self.key}: its chat template refuses a conversation of "
                f"{', '.join(turn['role'] for turn in chat)} ({error}); mend the template or the "
                "records"
            ) from None
        if truncated:
            # continue_final_message would fail with templates that rewrite the reasoning.
            if CUT_HERE not in conversation:
                raise UserError(
                    f"{self.key}: its chat template leaves out the end of an answer, so that a "
                    "truncated one cannot be told from a finished one; mend the template"
                )
            conversation = conversation[: conversation.rindex(CUT_HERE)]
        elif self.openrlhf:  # as in its training, EOS is the last token
            conversation = conversation.rstrip("\n")
            if not conversation.endswith(eos := self.tokenizer.eos_token or ""):
                conversation += f" {eos}"
        ids = self.tokenizer(conversation, add_special_tokens=False)["input_ids"]
        if len(ids) > self.max_length and not self.warned_of_length:
            self.warned_of_length = True
            warnings.warn(
                f"{self.key}: a conversation has {len(ids)} tokens and it takes "
                f"{self.max_length}; it sees the last of them. Lower max_new_tokens or cutoff_len",
                stacklevel=2,
            )
        return list(ids[-self.max_length :])

    def check(self, rows: list[list[int]]) -> None:
        """Refuse conversations with a token that the classifier's embeddings have no row for."""
        check_rows(self.tokenizer, self.rows, rows, self.key, "a conversation")

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Tensor:
        device = rollout.input_ids_BT.device
        found = zip(rollout.prompts, rollout.texts, rollout.terminated, strict=True)
        rows = [self.encode(prompt, text, truncated=not ended) for prompt, text, ended in found]
        self.check(rows)
        score_B = torch.empty(len(rows), device=device)
        for chosen in partition([len(row) for row in rows], range(len(rows)), self.budget.padded):
            score_B[chosen] = self.logits([rows[i] for i in chosen], device)
        return score_B

    def logits(self, rows: list[list[int]], device: torch.device) -> Tensor:
        """The classifier's logits, (B,) float32, for the conversations in `rows`."""
        pad_id = self.pad_id
        if pad_id is None:
            # Without a padding token a classifier reads the last position and accepts no batch. So
            # pad with a token that is in no row: then it reads each row's last token.
            used = {token for row in rows for token in row}
            pad_id = next(token for token in range(len(used) + 1) if token not in used)
        width = max(map(len, rows))
        ids_BT = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
        lengths_B = torch.tensor([len(row) for row in rows], device=device)
        mask_BT = (torch.arange(width, device=device) < lengths_B[:, None]).long()
        inner = self.model.config.get_text_config()
        inner.pad_token_id = pad_id
        try:
            logits_B1: Tensor = self.model(input_ids=ids_BT, attention_mask=mask_BT).logits
            return (logits_B1[:, 0].float() + self.bias - self.mean) / self.std
        finally:
            inner.pad_token_id = self.pad_id


def is_openrlhf(config: Any) -> bool:
    """Whether OpenRLHF saved this model: its class is made at run time, named `RewardModel`."""
    return "RewardModel" in (getattr(config, "architectures", None) or ()) or hasattr(
        config, "normalize_reward"
    )


def normalisation(config: Any) -> tuple[float, float]:
    """Mean and deviation by which OpenRLHF's `normalize_reward` scales scores; 0 and 1 without."""
    if not getattr(config, "normalize_reward", False):
        return 0.0, 1.0
    return float(getattr(config, "mean", 0.0)), float(getattr(config, "std", 1.0))
