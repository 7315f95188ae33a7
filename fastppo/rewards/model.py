"""Scores by a separate reward model: a sequence classifier, or a causal LM with a value head."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from peft import PeftModel, load_peft_weights
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from fastppo.config.rewards import HEAD_FILES, split
from fastppo.errors import UserError
from fastppo.memory.budgets import Budget
from fastppo.models.batch import Batch, partition
from fastppo.models.limits import check_rows
from fastppo.models.load import (
    LOAD_ERRORS,
    attention_implementation,
    causal_lm,
    check_same_tokens,
    compute_dtype,
    first_line,
    forget_pad_token,
    hidden_size,
    not_loaded,
    text_model,
)
from fastppo.models.load import trunk as model_trunk
from fastppo.models.value_head import load_value_head
from fastppo.offload.activations import find_layers
from fastppo.offload.frozen import place_frozen
from fastppo.rewards.adapter import HeadReward
from fastppo.types import Prompt, Rollout

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.templates import Template

# Marks the end of a truncated response; everything that the chat template writes after it is cut.
CUT_HERE = "<<<truncated>>>"
Placed = TypeVar("Placed", bound=nn.Module)


class ClassifierReward:
    """Scores a rollout with a sequence classifier of one label; returns (B,) float32.

    Prompt and response are formatted with the classifier's own chat template and tokenizer; the
    score is the classifier's logit for that conversation. A truncated response gets no end of turn,
    because the policy sampled none; the other kinds of reward see none either.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, name: str, budget: Budget) -> None:
        self.model, self.tokenizer, self.budget = model, tokenizer, budget
        self.key = f"reward_model: {name}"
        # The head's bias, written by fastppo-export: transformers' classifiers have no bias.
        self.bias = float(getattr(model.config, "score_bias", 0.0))
        inner = model.config.get_text_config()
        embeddings: Any = model.get_input_embeddings()
        rows = int(embeddings.weight.shape[0])
        pad_id = inner.pad_token_id
        # -1 and a token that was added without a row mean the same as none.
        self.pad_id: int | None = pad_id if pad_id is not None and 0 <= pad_id < rows else None
        self.rows = rows
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
            return logits_B1[:, 0].float() + self.bias
        finally:
            inner.pad_token_id = self.pad_id


def adapters_of(config: Config) -> list[str]:
    """The folders in `reward_model_adapters`, as a list."""
    return split(config.reward_model_adapters) if config.reward_model_adapters else []


def head_folder(name: str, config: Config) -> Path | None:
    """The folder that has a value head: the last adapter's, or the model's; else None."""
    for folder in (*(Path(path) for path in adapters_of(config)[-1:]), Path(name)):
        if any((folder / file).is_file() for file in HEAD_FILES):
            return folder
    return None


def load_full(
    name: str,
    config: Config,
    device: torch.device,
    template: Template,
    budget: Budget | None = None,
) -> ClassifierReward | HeadReward:
    """Load the reward model `name` (`reward_model_type: full`), frozen, in the run's dtype.

    If its folder has a value head, as LLaMA-Factory saves it, it is a causal LM that scores the
    policy's own tokens. Otherwise it must be a sequence classifier with one label.
    """
    folder = head_folder(name, config)
    budget = budget or Budget.of(config, scoring=True)
    if folder is None:
        model = load_model(AutoModelForSequenceClassification, name, config, device)
        model.config.use_cache = False
        labels = model.config.num_labels
        if labels != 1:
            raise UserError(
                f"reward_model: {name} has {labels} labels, and a score is one number; name a "
                "classifier with num_labels 1"
            )
        own = load_own_tokenizer(name, config)
        if not getattr(own, "chat_template", None):
            raise UserError(
                f"reward_model: the tokenizer of {name} has no chat template to write the "
                "conversation with; put a chat_template.jinja beside it"
            )
        return ClassifierReward(place_on_device(model, config, device, model), own, name, budget)
    model = load_model(AutoModelForCausalLM, name, config, device)
    inner = causal_lm(model)
    cure = "train it on the same base, or name a sequence classifier"
    check_same_tokens(config, "reward_model", name, inner, cure)
    # Only the trunk: its output head is not needed.
    trunk = place_on_device(model_trunk(inner), config, device, inner)
    head = load_value_head(folder, hidden_size(inner), device)
    head.requires_grad_(False)

    def hidden(batch: Batch) -> Tensor:
        inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.mask_BT}
        hidden_BTD: Tensor = trunk(**inputs, use_cache=False).last_hidden_state
        return hidden_BTD

    # Always padded: padding_free was checked for the policy's attention, not for this model's.
    return HeadReward(hidden, head, folder, template, budget, packs=False)


def load_model(kind: Any, name: str, config: Config, device: torch.device) -> Any:
    """Load a model with `reward_model_adapters` merged into it, frozen and in evaluation mode.

    The model is in host memory; if it is quantised, it is on `device` and its adapters are not
    merged.

    Args:
        kind: the transformers class that loads it.

    Raises:
        UserError: the model or an adapter cannot be loaded, or a weight is in no file.
    """
    dtype = compute_dtype(config, device)
    own: dict[str, Any] = {}
    if config.flash_attn != "auto":  # auto: transformers chooses, as not all classifiers have sdpa
        own["attn_implementation"] = attention_implementation(config.flash_attn, device, dtype)
    bits = config.reward_model_quantization_bit
    if bits is not None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                f"reward_model_quantization_bit: {bits} needs a package that is not installed; "
                "pip install 'fastppo[quantization]', or leave it out"
            )
        own["device_map"] = {"": device}
        make_quantization: Any = BitsAndBytesConfig  # its constructor has no annotations
        own["quantization_config"] = make_quantization(
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    adapters = adapters_of(config)
    try:
        if adapters and kind is AutoModelForSequenceClassification:
            found = config_with_one_label(name, config)
        else:
            found = AutoConfig.from_pretrained(
                name, cache_dir=config.cache_dir, trust_remote_code=config.trust_remote_code
            )
        forget_pad_token(found)
        own["config"] = found
        model, info = kind.from_pretrained(
            name,
            cache_dir=config.cache_dir,
            trust_remote_code=config.trust_remote_code,
            dtype=dtype,
            output_loading_info=True,
            **own,
        )
    except LOAD_ERRORS as error:
        raise UserError(f"reward_model: {not_loaded(name, error, config.flash_attn)}") from None
    if getattr(model, "peft_config", None):
        raise UserError(
            f"reward_model: {name} is an adapter; name its base here, and the adapter in "
            "reward_model_adapters"
        )
    missing = set(info["missing_keys"])
    for adapter in adapters:
        try:
            saved = load_peft_weights(adapter, device="cpu")
            missing = {key for key in missing if not any(k.endswith(f".{key}") for k in saved)}
            model = PeftModel.from_pretrained(model, adapter)
        except LOAD_ERRORS as error:
            raise UserError(
                f"reward_model_adapters: {adapter} cannot be loaded on {name} "
                f"({first_line(error)}); name adapters that were trained on it"
            ) from None
        if bits is None:  # merging into 4 or 8 bits would lose precision
            model = model.merge_and_unload()
    if missing:
        raise UserError(
            f"reward_model: {name} has no weights for {min(missing)}; name a finished reward "
            "model: a classifier, or a folder of a causal LM with value_head.safetensors"
        )
    return model.requires_grad_(False).eval()


def place_on_device(
    model: Placed, config: Config, device: torch.device, whole: nn.Module
) -> Placed:
    """Move the model to the device, or stream it; a quantised model is on the device already.

    `whole` is the model with its head, which knows the text model's layers.
    """
    if config.reward_model_quantization_bit is not None:
        return model
    streamed, folder = config.stream_frozen, config.offload_dir
    layers = list(find_layers(text_model(whole))) if streamed else None
    placed = place_frozen(model, device, streamed=streamed, layers=layers, offload_dir=folder)
    return cast(Placed, placed)


def config_with_one_label(name: str, config: Config) -> Any:
    """The configuration of a base whose classification head is in an adapter, as TRL saves it.

    Such a base does not say its number of labels: it gets 1 instead of transformers' default 2.
    """
    found = AutoConfig.from_pretrained(
        name, cache_dir=config.cache_dir, trust_remote_code=config.trust_remote_code
    )
    if not any("SequenceClassification" in kind for kind in found.architectures or ()):
        found.num_labels = 1
    return found


def load_own_tokenizer(name: str, config: Config) -> Any:
    """The reward model's own tokenizer, from its folder or hub name."""
    try:
        return AutoTokenizer.from_pretrained(
            name, cache_dir=config.cache_dir, trust_remote_code=config.trust_remote_code
        )
    except LOAD_ERRORS as error:
        raise UserError(
            f"reward_model: the tokenizer of {name} cannot be loaded ({first_line(error)}); put it "
            "beside the weights"
        ) from None
