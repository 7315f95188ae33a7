"""LLaMA-Factory's key names since 2023 that are no keys of it today, and what became of each.

docs/llamafactory.md is made from these tables. No torch here.
"""

from __future__ import annotations

from typing import Any

from fastppo.errors import UserError

# Former name -> today's. Value and meaning are the same: it is read as today's, with a line.
RENAMED = {
    "checkpoint_dir": "adapter_name_or_path",
    "dev_ratio": "val_size",
    "hf_auth_token": "hf_hub_token",
    "lora_lr_ratio": "loraplus_lr_ratio",
    "name_module_trainable": "freeze_trainable_modules",
    "num_layer_trainable": "freeze_trainable_layers",
    "ppo_logger": "report_to",
    "prompt_template": "template",
    "ref_model_checkpoint": "ref_model_adapters",
    "resume_lora_training": "create_new_adapter",  # the opposite: see `values_today`
    "reward_model_checkpoint": "reward_model_adapters",
    "system_prompt": "default_system",
}

_OFF = (False, None)
_CUTOFF = (
    "here that is cutoff_len: the most tokens of a prompt in stage ppo, of prompt and answer "
    "together in stage rm"
)
_PADDING_FREE = "packing is supervised fine-tuning's; leave it out, or use padding_free"
_TOKENS = "add them to the tokenizer and model before training"
# Former name -> the values that asked for nothing, and what to do about any other.
GONE: dict[str, tuple[tuple[Any, ...], str]] = {
    "block_diag_attn": (_OFF, _PADDING_FREE),
    "cache_path": ((None,), "records are encoded at the start of each run; leave it out"),
    "dpo_ref_model": ((None,), "here that is ref_model"),
    "dpo_ref_model_checkpoint": ((None,), "here that is ref_model_adapters"),
    "efficient_packing": (_OFF, _PADDING_FREE),
    "eval_tokenized_path": ((None,), "records are encoded at the start of each run; leave it out"),
    "infer_num_beams": ((1, None), "a policy is sampled, not searched; leave it out"),
    "layernorm_dtype": (
        ("auto", None),
        "norms compute in the model's dtype; leave it out, or bf16 for all of it in float32",
    ),
    "loftq_init": (_OFF, "a quantised base starts from new adapters as they are; leave it out"),
    "lora_bf16_mode": (_OFF, "adapters train in float32; leave it out"),
    "max_source_length": ((None,), _CUTOFF),
    "max_target_length": ((None,), f"{_CUTOFF}; what is sampled ends at max_new_tokens"),
    "neft_alpha": (
        (0, None),
        "noise on embeddings is for supervised fine-tuning, not for rm and ppo; leave it out",
    ),
    "new_normal_tokens": ((None,), _TOKENS),
    "new_special_tokens": ((None,), _TOKENS),
    "sft_packing": (_OFF, _PADDING_FREE),
    "source_prefix": (("", None), "write it into the records, or use default_system"),
    "split": (("train", None), "here the entry of each data set names its own; leave it out"),
    "train_mm_proj_only": (_OFF, "data is text, so nothing would train; leave it out"),
    "tune_mm_proj": (_OFF, "data is text, so nothing would train; leave it out"),
    "use_adammini": (_OFF, "use optim: adamw_8bit or paged_adamw_8bit to save memory"),
}

# Why a former key needs no successor -> such keys. They are accepted, with a line that says why.
NEEDLESS: dict[str, str] = {
    "rows are padded as each pass needs it, and padding never enters a loss": "padding_side",
    "the depth is read from the model; freeze_trainable_layers says how many layers train": (
        "num_hidden_layers"
    ),
    "the token of the hub's login is used anyway; hf_hub_token names another": "use_auth_token",
    "prompt and answers share cutoff_len": "reserved_label_len",
    "the loss is on the last response anyway": "train_last_turn_only",
    "versions are the package's to name": "disable_version_checking",
    "a setting of another stage": """dpo_beta dpo_ftx dpo_loss kto_beta kto_desirable_weight kto_ftx
        kto_undesirable_weight orpo_beta""",
    "data is text": """image_dir image_max_resolution image_min_resolution image_path
        image_resolution use_mllm use_qformer video_max_resolution video_min_resolution
        video_resolution visual_inputs""",
    "it belongs to an optimiser that is refused": """badam_switch_block_every start_block
        switch_block_every switch_mode""",
    "it belongs to a method that is refused": "aqlm_optimization",
    "nothing is served: sampling is the trainer's own": "system_message vllm_dtype",
    "records are encoded once, at the start": "dataset_map_batch_size",
    "data is read whole, and nothing is cached": "dataset_shards",
    "SwanLab gets the run's own configuration": "swanlab_config swanlab_description",
    "swanlab_run_name names SwanLab's run": "swanlab_experiment_name swanlab_name",
    "a process has one device": "num_workers",
}

# A former value of a key -> today's.
FORMER_VALUES: dict[str, dict[Any, Any]] = {
    # Until April 2024 it was whether to use FlashAttention-2; false was transformers' own, SDPA.
    "flash_attn": {True: "fa2", False: "sdpa", "off": "disabled"},
    "template": {"vanilla": "empty"},
}


def with_todays_names(given: dict[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """The keys in `given` under today's names with today's values, and a line for each changed.

    Raises:
        UserError: a key is given together with its successor, or its successor means another thing.
    """
    found, lines = dict(given), []
    for name, today in RENAMED.items():
        value = found.pop(name, None)
        if value is None:
            continue
        kind = found.get("finetuning_type", "lora")
        if name == "checkpoint_dir" and kind != "lora":
            raise UserError(
                f"{source}: {name}: named a whole model with finetuning_type: {kind}, which is "
                "model_name_or_path today; put it there"
            )
        if name == "resume_lora_training" and isinstance(meant(value), bool):
            value = not meant(value)
        if found.setdefault(today, value) != value:
            raise UserError(f"{source}: {name}: is a former name of {today}; keep one of the two")
        shown = f"{today}: {str(value).lower()}" if isinstance(value, bool) else today
        lines.append(f"'{name}' is LLaMA-Factory's former name, and read as {shown}")
    for name, values in FORMER_VALUES.items():
        value = meant(found.get(name))
        if isinstance(value, bool | str) and value in values:
            found[name] = values[value]
            was = f"{name}: {str(value).lower()}"
            lines.append(f"'{was}' is LLaMA-Factory's former value, and read as {values[value]}")
    return found, lines


def meant(value: Any) -> Any:
    """The value that a text such as "false", "none" or "0" stands for, as JSON files quote them."""
    if not isinstance(value, str):
        return value
    words = {"true": True, "yes": True, "false": False, "no": False, "null": None, "none": None}
    text = value.strip().lower()
    return words[text] if text in words else int(text) if text in ("0", "1") else value
