"""Merge adapters into their base: into a causal language model, or for rewards a classifier."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from fastppo.config.rewards import RECORD
from fastppo.errors import TrainingStopped, UserError
from fastppo.export.chat import set_chat_template, trained_template
from fastppo.export.config import PARTIAL
from fastppo.models.adapters import merge_adapters
from fastppo.models.limits import drop_pad_without_row
from fastppo.models.load import (
    LOAD_ERRORS,
    advice_on_hub,
    causal_lm,
    check_weights,
    first_line,
    hidden_size,
    not_loaded,
    trunk,
)
from fastppo.models.value_head import has_value_head, load_value_head
from fastppo.models.weights import vocabulary_size
from fastppo.rewards.adapter import read_score_at
from fastppo.run import durable
from fastppo.templates.jinja import without_suffix

if TYPE_CHECKING:
    from fastppo.export.config import ExportConfig
    from fastppo.templates import Template

SCORE_BIAS = "score_bias"  # a key in config.json, because transformers' classifiers have no bias


def export(config: ExportConfig) -> Iterator[str]:
    """Load, merge and save; yields lines for the terminal.

    Raises:
        UserError: something named cannot be loaded or merged, or export_dir cannot be made.
        TrainingStopped: there is no memory, or no room on the disk.
    """
    target = Path(config.export_dir)
    with new_folder(target) as place:
        try:
            written = yield from merge_into(place, config)
        except torch.OutOfMemoryError as error:
            raise TrainingStopped(
                f"out of memory on the GPU ({first_line(error)}); set export_device: cpu"
            ) from None
    yield f"{target}: {written}"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder in `folder`, whose files are moved there at the end of the block.

    After a failure nothing is left, `folder` neither if it was made here: nobody loads half a
    model.

    Raises:
        UserError: `folder` cannot be made.
        TrainingStopped: the disk is full.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    place = folder / PARTIAL
    complete = False
    try:
        try:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"export_dir: {folder} cannot be made ({error.strerror}); name another"
            ) from None
        try:
            yield place
            durable.move_into(place, folder)
        except Exception as error:
            reason = durable.disk_full_message(error)
            if reason is None:
                raise
            raise TrainingStopped(
                f"no room to write {folder} ({reason}); free some space, or name another"
            ) from None
        complete = True
    finally:
        if not complete:
            shutil.rmtree(place, ignore_errors=True)
            for path in made:
                with suppress(OSError):
                    path.rmdir()


def merge_into(place: Path, config: ExportConfig) -> Generator[str, None, str]:
    """Load, merge and save into `place`; yields notes, and returns what was written, in words."""
    disable_progress_bar()
    name, last = str(config.model_name_or_path), config.trained_folder
    source = str(last) if (last / "tokenizer_config.json").is_file() else name
    tokenizer = load_tokenizer(source, config)
    rows = vocabulary_size(load_pretrained(AutoConfig, name, config))
    if (line := drop_pad_without_row(tokenizer, rows)) is not None:
        yield line
    template = trained_template(config, last, tokenizer)
    reward = config.stage == "rm" or (config.stage is None and (last / RECORD).is_file())
    device = "cuda" if config.export_device == "auto" and torch.cuda.is_available() else "cpu"
    dtype = config.infer_dtype
    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    how = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load_pretrained(AutoModelForCausalLM, name, config, **how)
    left_out = check_weights("model_name_or_path", name, model, info)
    if left_out is not None:
        yield left_out
    if getattr(model, "is_quantized", False):
        raise UserError(
            f"model_name_or_path: {name} is quantised, and adapters merge into whole weights only; "
            "name the model that it was quantised from"
        )
    model = causal_lm(merge_adapters(model.to(device), config.adapters, "adapter_name_or_path"))
    tokenizer.padding_side = "right" if reward else "left"
    yield from set_chat_template(template, answers=reward)
    if reward:
        head = load_value_head(last, hidden_size(model), torch.device("cpu"), "stage: rm")
        score_at = read_score_at(last) or ("suffix" if template.suffix_ids else "eos")
        bias = head.bias.item()
        model = make_classifier(model, head, tokenizer, template, score_at)
        yield f"a reward model, read at {'EOS' if score_at == 'eos' else 'what follows EOS'}"
        if bias:
            yield (
                f"its head has a bias, {bias:+.6g}, for which a classifier of transformers has no "
                f"place: scores there are less by that, all alike; {SCORE_BIAS} in config.json "
                "keeps it, and reward_model_type: full adds it"
            )
    else:
        if config.stage is None and has_value_head(last):
            yield f"the value head in {last} is left out; stage=rm exports a reward model with it"
        yield from set_generation(model, template)
    model.save_pretrained(place, max_shard_size=f"{config.export_size}GB")
    tokenizer.save_pretrained(place)
    parts = " + ".join([name, *config.adapters])
    return f"{type(model).__name__}, {model.dtype}, from {parts}"


def load_tokenizer(name: str, config: ExportConfig) -> Any:
    """The tokenizer in a folder or on the hub."""
    try:
        return AutoTokenizer.from_pretrained(name, **hub_settings(name, config))
    except Exception as error:  # the tokenizers package raises Exception itself
        raise UserError(
            f"{name} has no tokenizer that can be loaded ({first_line(error)}); "
            f"{advice_on_hub(name, str(error))}"
        ) from None


def load_pretrained(kind: Any, name: str, config: ExportConfig, **settings: Any) -> Any:
    """Load a model or its configuration by the transformers class `kind`."""
    try:
        return kind.from_pretrained(name, **hub_settings(name, config), **settings)
    except LOAD_ERRORS as error:
        raise UserError(f"model_name_or_path: {not_loaded(name, error)}") from None


def hub_settings(name: str, config: ExportConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that say where files come from."""
    return {
        "revision": config.model_revision if name == config.model_name_or_path else "main",
        "cache_dir": config.cache_dir,
        "token": config.hf_hub_token,
        "trust_remote_code": config.trust_remote_code,
    }


def set_generation(model: PreTrainedModel, template: Template) -> Iterator[str]:
    """Make `generate` stop at the template's stop tokens, as sampling during training did.

    Yields a note on the base's other sampling settings, which servers take as their defaults.
    """
    generation: Any = model.generation_config
    generation.eos_token_id = list(template.stop_ids)
    generation.pad_token_id = pad_with_row(model, template)
    # transformers refuses to save a greedy configuration with a temperature or top_p.
    if generation.temperature not in (None, 1.0) or generation.top_p not in (None, 1.0):
        generation.do_sample = True
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}
    kept = {
        name: value
        for name, usual in plain.items()
        if (value := getattr(generation, name, None)) not in (None, usual)
    }
    if kept:
        words = ", ".join(f"{name} {value}" for name, value in kept.items())
        yield (
            f"generation_config.json keeps the base's {words}, which servers sample with; change "
            "them there where the policy was trained with others"
        )


def pad_with_row(model: PreTrainedModel, template: Template) -> int:
    """Id of the padding token, or of EOS where the model's embeddings have no row for it."""
    rows = model.get_input_embeddings().weight.shape[0]
    return template.pad_id if template.pad_id < rows else template.eos_id


def make_classifier(
    model: PreTrainedModel, head: nn.Linear, tokenizer: Any, template: Template, score_at: str
) -> PreTrainedModel:
    """transformers' classifier of this architecture, made of the model's trunk and the value head.

    The classifier reads the last token of a row that is not padding. If necessary, the tokenizer is
    changed: it gets a padding token that ends no conversation, and a chat template that ends with
    the token at which the reward model was trained (`score_at`).
    """
    config = model.config
    config.num_labels = 1
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}
    rows = model.get_input_embeddings().weight.shape[0]
    pad_id = choose_pad_token(tokenizer, template, rows)
    config.get_text_config().pad_token_id = config.pad_token_id = pad_id
    setattr(config, SCORE_BIAS, head.bias.item())
    try:
        with torch.device("meta"):
            made: Any = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
        if not isinstance(made.score, nn.Linear):
            raise AttributeError(f"{type(made).__name__} has another head")
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"stage: rm: transformers has no classifier of {config.model_type} that reads the last "
            f"token ({first_line(error)}); load the adapter and value_head.safetensors as they are"
        ) from None
    setattr(made, made.base_model_prefix, trunk(model))
    made.score = nn.Linear(head.in_features, 1, bias=False, device=model.device, dtype=model.dtype)
    with torch.no_grad():
        made.score.weight.copy_(head.weight)
    if score_at == "eos" and template.suffix_ids and isinstance(tokenizer.chat_template, str):
        suffix = tokenizer.decode(list(template.suffix_ids), clean_up_tokenization_spaces=False)
        tokenizer.chat_template = without_suffix(tokenizer.chat_template, suffix)
    return cast(PreTrainedModel, made.eval())


def choose_pad_token(tokenizer: Any, template: Template, rows: int) -> int:
    """Id of the padding token.

    If it can end a conversation, or has no row among the `rows` of the embeddings, another special
    token is chosen.
    """
    ends = {*template.stop_ids, *template.suffix_ids[-1:]}
    if tokenizer.pad_token_id not in ends and tokenizer.pad_token_id < rows:
        return int(tokenizer.pad_token_id)
    special = [tokenizer.unk_token_id, *sorted(tokenizer.added_tokens_decoder)]
    for token_id in special:
        if token_id is not None and token_id not in ends and token_id < rows:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token_id)
            return int(token_id)
    raise UserError(
        "stage: rm: the tokenizer has no special token to pad with but those that end a "
        "conversation, and a classifier would not read them; give it a pad_token"
    )
