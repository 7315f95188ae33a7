"""Steps of verl's TrainingWorker in two Ray workers, which share the model by FSDP over gloo.

    python -m tests.integrations.verl_run FOLDER LOSS_MODE [MODULE ...]

FOLDER has a tiny model, LOSS_MODE is the policy loss, MODULEs stand in VERL_USE_EXTERNAL_MODULES of
the workers. Prints as JSON the module of each worker's fused head, and a row a step: loss, norm of
the gradient, entropy, clipped share, KL.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import Any

PLATFORM = "tests.integrations.verl_cpu"
ROWS, PROMPT, ANSWER, STEPS = 8, 5, 7, 3


def main(folder: str, loss_mode: str, *modules: str) -> None:
    os.environ.update(
        VERL_PLATFORM="cpu",
        VERL_ENGINE_DEVICE="cuda",
        VERL_USE_EXTERNAL_MODULES=",".join((PLATFORM, *modules)),
        RAY_USAGE_STATS_ENABLED="0",
    )
    import ray
    import torch
    from verl.single_controller.base.decorator import Dispatch, register
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
    from verl.trainer.config import CheckpointConfig
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import (
        FSDPActorConfig,
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
        PolicyLossConfig,
        TrainingWorkerConfig,
    )
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    class Worker(TrainingWorker):
        """verl's own; it joins a group of gloo alone, as verl's names a second backend for cpu."""

        def __init__(self, config: Any) -> None:
            rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
            torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
            super().__init__(config)

        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def head(self) -> str:
            """The module that computes the log-probs of verl's fused head in this process."""
            from verl.utils.experimental.torch_functional import FusedLinearForPPO

            return str(FusedLinearForPPO.forward.__module__)

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    engine = FSDPEngineConfig(
        strategy="fsdp2",
        mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2,
        use_torch_compile=False,
    )
    training = TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=folder,
            use_remove_padding=False,
            use_fused_kernels=True,
            fused_kernel_options={"impl_backend": "torch"},
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "eager"},
        ),
        engine_config=engine,
        optimizer_config=FSDPOptimizerConfig(lr=0.1, optimizer="SGD", total_training_steps=9),
        checkpoint_config=CheckpointConfig(),
    )
    actor = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=2,
        clip_ratio_high=0.28,
        entropy_coeff=0.01,
        use_kl_loss=True,
        kl_loss_coef=0.05,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
        fsdp_config=engine,
    )
    workers: Any = RayWorkerGroup(
        resource_pool=RayResourcePool([2], use_gpu=False, max_colocate_count=1),
        ray_cls_with_init=RayClassWithInitArgs(ray.remote(Worker), config=training),
        device_name="cpu",
    )
    workers.reset()
    workers.set_loss_fn(partial(ppo_loss, config=actor))
    print(json.dumps(workers.head()))
    for step in range(STEPS):
        metrics = tu.get(workers.train_mini_batch(batch(step)).get(), "metrics")
        kept = ("loss", "grad_norm", "actor/entropy_loss", "actor/pg_clipfrac", "kl_loss")
        print(json.dumps({name: numbers(metrics[name]) for name in kept}))
    ray.shutdown()


def numbers(value: Any) -> list[float]:
    """A metric of verl, as numbers."""
    return [float(x) for x in (value if isinstance(value, list) else [value])]


def batch(seed: int) -> Any:
    """Responses of 1 to ANSWER tokens with holes in their masks, ratios on both sides of a clip."""
    import torch
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding

    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (ROWS, PROMPT + ANSWER), generator=random)
    length = torch.randint(1, ANSWER + 1, (ROWS, 1), generator=random)
    alive = torch.arange(ANSWER) < length
    attention = torch.cat([torch.ones(ROWS, PROMPT, dtype=torch.bool), alive], 1).long()
    logprob = -4 + torch.randn(ROWS, ANSWER, generator=random) / 2
    data = tu.get_tensordict(
        {
            "input_ids": ids,
            "attention_mask": attention,
            "position_ids": torch.arange(PROMPT + ANSWER).repeat(ROWS, 1),
            "prompts": ids[:, :PROMPT],
            "responses": ids[:, PROMPT:],
            "response_mask": alive.long(),
            "old_log_probs": logprob,
            "ref_log_prob": logprob - 0.1,
            "advantages": torch.randn(ROWS, ANSWER, generator=random),
        }
    )
    data = left_right_2_no_padding(data)
    tu.assign_non_tensor(
        data,
        temperature=0.9,
        calculate_entropy=True,
        global_batch_size=ROWS,
        mini_batch_size=ROWS,
        epochs=1,
        dataloader_kwargs={"shuffle": False},
    )
    return data


if __name__ == "__main__":
    main(*sys.argv[1:])
