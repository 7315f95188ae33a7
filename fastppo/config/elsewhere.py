"""Keys of LLaMA-Factory and transformers that are no settings here: accepted or refused, and why.

docs/config.md and docs/llamafactory.md are generated from these tables.
"""

from __future__ import annotations

from typing import Any

from fastppo.config.old_names import GONE, NEEDLESS
from fastppo.config.ppo import TRL_IGNORED

# transformers' older names of keys; LLaMA-Factory's older names are in old_names.py.
OLD_NAMES = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
}

# Why keys have no effect here -> these keys. They are accepted, with a line that says why.
_NOTES: dict[str, str] = {
    "a process has one device": """accelerator_config
        average_tokens_across_devices ddp_backend ddp_broadcast_buffers
        ddp_bucket_cap_mb ddp_find_unused_parameters
        ddp_static_graph data_shared_file_system eval_use_gather_object
        hyper_parallel_args local_rank log_on_each_node
        log_level_replica mp_parameters parallelism_config placement_strategy ray_init_kwargs
        ray_num_workers ray_run_name ray_scope ray_storage_filesystem ray_storage_path
        resources_per_worker save_on_each_node tpu_metrics_debug tpu_num_cores""",
    "fsdp shards each decoder layer": "fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap",
    "records are encoded once, at the start": """dataloader_drop_last dataloader_in_order
        dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers
        dataloader_pin_memory dataloader_prefetch_factor preprocessing_batch_size
        preprocessing_num_workers remove_unused_columns""",
    "data is read whole, and nothing is cached": "buffer_size overwrite_cache",
    "micro-batches are of similar lengths anyway": """group_by_length length_column_name
        sortish_sampler train_sampling_strategy""",
    "data is text": """audio_sampling_rate crop_to_patches freeze_multi_modal_projector
        freeze_vision_tower image_do_pan_and_scan image_max_pixels image_min_pixels media_dir
        use_audio_in_video video_fps video_max_pixels video_maxlen video_min_pixels""",
    "a policy is sampled, not searched": """eval_num_beams generation_num_beams length_penalty""",
    "max_new_tokens is the limit": "generation_max_length max_length",
    "a setting of another stage": """asft_alpha compute_accuracy dpo_label_smoothing eaft_alpha
        kto_chosen_weight kto_rejected_weight ld_alpha pref_bco_weight pref_beta pref_ftx pref_loss
        predict_with_generate simpo_gamma use_asft_loss use_dft_loss use_eaft_loss""",
    "it belongs to an optimiser that is refused": """apollo_layerwise apollo_proj
        apollo_proj_type apollo_rank apollo_scale apollo_scale_front apollo_scale_type apollo_target
        apollo_update_interval badam_mask_mode badam_mode badam_start_block badam_switch_interval
        badam_switch_mode badam_update_ratio badam_verbose galore_layerwise galore_proj_type
        galore_rank galore_scale galore_target galore_update_interval optim_target_modules""",
    "it belongs to a method that is refused": """init_special_tokens module_dropout oft_block_size
        oft_rank oft_target pissa_iter""",
    "LoRA+ here has no embedding adapters": "loraplus_lr_embedding",
    "it is for fastppo-export, not for training": """export_device export_dir export_hub_model_id
        export_legacy_format export_quantization_bit export_quantization_dataset
        export_quantization_maxlen export_quantization_nsamples export_size""",
    "nothing is served: sampling is the trainer's own": """chunk_size cpu_infer infer_dtype
        kt_force_think kt_maxlen kt_mode kt_optimize_rule kt_use_cuda_graph mode sglang_config
        sglang_lora_backend sglang_maxlen sglang_mem_fraction sglang_tp_size""",
    "it sizes LLaMA-Factory's engine; the server of use_vllm has flags of its own": """vllm_config
        vllm_enforce_eager vllm_gpu_util vllm_max_lora_rank vllm_maxlen""",
    "sampling always uses a cache": "use_cache use_kv_cache",
    "fused operators are fastppo's own": """enable_liger_kernel liger_kernel_config
        use_liger_kernel use_v1_kernels""",
    "log-probs are float32 whatever the logits are": "upcast_lmhead_output",
    "as in LLaMA-Factory; use disable_gradient_checkpointing": """activation_checkpointing_kwargs
        gradient_checkpointing gradient_checkpointing_kwargs""",
    "checkpointing is never reentrant": "use_reentrant_gc",
    "models and data come from Hugging Face's hub": "ms_hub_token om_hub_token",
    "push_to_hub uploads once, after training": "hub_always_push",
    "no messages are sent": "swanlab_lark_secret swanlab_lark_webhook_url",
    "trackio writes to its own folder": """trackio_bucket_id trackio_space_id
        trackio_static_space_id""",
    "always on": "low_cpu_mem_usage save_safetensors use_fast_tokenizer",
    "always on for display": "skip_special_tokens",
    "padding never enters a loss": "ignore_pad_token_for_loss",
    "the layers of one device are placed as they come": """device_map offload_folder
        quantization_device_map""",
    "tokens are counted in the metrics": """include_effective_tokens_per_second
        include_num_input_tokens_seen include_tokens_per_second""",
    "the first lines of a run count what trains": "print_param_status",
    "evaluation computes what the metrics name": """batch_eval_metrics eval_accumulation_steps
        eval_do_concat_batches generation_config include_for_metrics include_inputs_for_metrics
        label_names past_index prediction_loss_only""",
    "bf16 and fp16 alone say what is computed in 16 bits": """bf16_full_eval fp16_backend
        fp16_full_eval fp16_opt_level half_precision_backend""",
    "it belongs to torch_compile, which is refused": "torch_compile_backend torch_compile_mode",
    "profilers are run around the command, not in it": """debug enable_torch_profiler
        profile_modules profiler_active_steps profiler_output_dir profiler_profile_memory
        profiler_record_shapes profiler_repeat profiler_wait_steps profiler_warmup_steps
        profiler_with_stack skip_memory_metrics""",
    "a run that resumes goes on at its very step": """ignore_data_skip
        restore_callback_states_from_checkpoint""",
    "a run's lines are fastppo's own": "log_level logging_nan_inf_filter",
    "checkpoints go by save_strategy": "enable_jit_checkpoint",
    "emptying the allocator's cache only slows a run": "torch_empty_cache_steps",
    "transformers has dropped it": """jit_mode_eval torchdynamo use_ipex
        use_legacy_prediction_loop""",
    "it belongs to fp8, which is refused": "fp8_backend fp8_enable_fsdp_float8_all_gather",
}
IGNORED: dict[str, str] = {
    **TRL_IGNORED,
    **{
        name: why
        for notes in (_NOTES, NEEDLESS)
        for why, names in notes.items()
        for name in names.split()
    },
}

_TOKEN = "set HF_TOKEN in the environment, or use hf_hub_token"
_OPTIMISER = "use optim: adamw_8bit or paged_adamw_8bit to save memory"
_OFF = (False, None)
# Keys for features that do not exist here: their accepted values, and what to use instead.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "activation_checkpointing": (_OFF, "use activation_offloading: checkpoint, the default"),
    "adafactor": (_OFF, "use optim: adafactor"),
    "adapter_folder": ((None,), "write the folder's whole path into adapter_name_or_path"),
    "add_special_tokens": ((None,), "add them to the tokenizer and model before training"),
    "add_tokens": ((None,), "add them to the tokenizer and model before training"),
    "auto_find_batch_size": (_OFF, "fastppo-train CONFIG --plan says what fits"),
    "deepspeed": (
        (None,),
        "fastppo has no DeepSpeed; leave it out: torchrun starts several GPUs, and "
        "fsdp: full_shard shards a base that fits none of them",
    ),
    "freeze_language_model": (_OFF, "it is what trains here; leave it out"),
    "eval_on_each_dataset": (
        _OFF,
        "evaluation is over all of eval_dataset together; evaluate one set a run",
    ),
    "fp8": (_OFF, "use bf16: true"),
    "full_determinism": (_OFF, "seed fixes everything random; leave it out"),
    "hub_revision": ((None,), "push_to_hub uploads to main; leave it out"),
    "hub_token": ((None,), _TOKEN),
    "infer_backend": (
        ("huggingface", "hf", None),
        "for rollouts by vLLM set use_vllm: true; leave it out",
    ),
    "label_smoothing_factor": ((0, None), "no loss here has labels to smooth; leave it out"),
    "mask_history": (_OFF, "the loss is on the last response; leave it out"),
    "mixture_of_depths": ((None,), "leave it out"),
    "moe_aux_loss_coef": ((None, 0), "no router loss is added; leave it out"),
    "neat_packing": (_OFF, "use padding_free"),
    "neftune_noise_alpha": ((None, 0), "noise would make PPO's log-probs another policy's"),
    "new_special_tokens_config": ((None,), "add them to the tokenizer and model before training"),
    "num_beams": ((1, None), "a policy is sampled, not searched; leave it out"),
    "optim_args": ((None,), "the adam keys and weight_decay are what there is; leave it out"),
    "packing": (_OFF, "use padding_free"),
    "pissa_convert": (_OFF, "leave it out, with pissa_init"),
    "pissa_init": (_OFF, "the reference is the base with adapters off; leave it out"),
    "push_to_hub_model_id": ((None,), "use hub_model_id"),
    "push_to_hub_organization": ((None,), "use hub_model_id: owner/name"),
    "push_to_hub_token": ((None,), _TOKEN),
    "pure_bf16": (_OFF, "use bf16: true: adapters train in float32"),
    "resize_vocab": (_OFF, "resize the model's embeddings before training"),
    "rope_scaling": ((None,), "write rope_scaling into the model's config.json"),
    "shift_attn": (_OFF, "leave it out; activation_offloading saves memory on long rows"),
    "split_special_tokens": (_OFF, "templates write special tokens; leave it out"),
    "streaming": (_OFF, "data is read whole; leave it out"),
    "tokenized_path": ((None,), "records are encoded at the start of each run; leave it out"),
    "tool_format": ((None,), "tool calls are not supported; leave it out"),
    "torch_compile": (_OFF, "leave it out"),
    "train_from_scratch": (_OFF, "PPO and reward models start from a trained model"),
    "train_on_prompt": (_OFF, "the loss is on responses; leave it out"),
    "upcast_layernorm": (_OFF, "leave bf16 and fp16 out to compute in float32"),
    "use_adam_mini": (_OFF, _OPTIMISER),
    "use_apollo": (_OFF, _OPTIMISER),
    "use_badam": (_OFF, _OPTIMISER),
    "use_galore": (_OFF, _OPTIMISER),
    "use_hyper_parallel": (_OFF, "several GPUs are data parallel here, by torchrun; leave it out"),
    "use_kt": (_OFF, "leave it out"),
    "use_llama_pro": (_OFF, "use finetuning_type: lora with lora_layers"),
    "use_mca": (_OFF, "several GPUs are data parallel here, by torchrun; leave it out"),
    "use_mps_device": (_OFF, "training runs on CUDA, ROCm or the CPU; leave it out"),
    "use_muon": (_OFF, "use optim: adamw_torch, or leave it out"),
    "use_unsloth": (_OFF, "leave it out"),
    **GONE,
}


def _values(key: str, names: str, cure: str) -> dict[tuple[str, str], str]:
    return dict.fromkeys(((key, name) for name in names.split()), cure)


# (key, value) for features that do not exist here -> what to use instead.
NOT_HERE: dict[tuple[str, str], str] = {
    **_values(
        "stage",
        "sft pt dpo kto",
        "fastppo trains stage rm and stage ppo; run this stage in LLaMA-Factory, and name what it "
        "wrote in model_name_or_path, or an adapter in adapter_name_or_path",
    ),
    **_values("finetuning_type", "oft none p_tuning", "not supported; use finetuning_type: lora"),
    ("flash_attn", "fa3"): "not supported; use fa2, or auto",
    ("kl_loss_type", "kl"): "its gradient is 0 on average; use low_var_kl or mse",
    ("kl_loss_type", "full"): "exact KL is for the reward (kl_penalty); use low_var_kl or mse",
    ("lr_scheduler_type", "greedy"): "it follows the loss, which PPO's does not tell; use cosine",
    ("save_strategy", "best"): "PPO has no single best; use steps or epoch",
    **_values(
        "quantization_method",
        "gptq awq aqlm quanto eetq hqq mxfp4 fp8",
        "not supported; use bnb, or leave it out",
    ),
    **_values(
        "optim",
        """ademamix ademamix_8bit adamw_anyprecision adamw_apex_fused adamw_torch_npu_fused
        adamw_torch_xla grokadamw paged_ademamix_32bit paged_ademamix_8bit rmsprop_bnb
        rmsprop_bnb_32bit rmsprop_bnb_8bit schedule_free_adamw schedule_free_radam
        schedule_free_sgd stable_adamw""",
        "not supported; use adamw_torch",
    ),
    **_values(
        "optim",
        """adalomo adamw_torch_4bit adamw_torch_8bit apollo_adamw apollo_adamw_layerwise
        galore_adafactor galore_adafactor_layerwise galore_adamw galore_adamw_8bit
        galore_adamw_8bit_layerwise galore_adamw_layerwise lomo""",
        "not supported; use adamw_8bit or paged_adamw_8bit",
    ),
}
