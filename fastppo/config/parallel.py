"""What several processes share out: the prompts of a step, in stage rm its pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fastppo.errors import UserError

if TYPE_CHECKING:
    from fastppo.config.schema import Config

# Keys of runs of one process.
ALONE: Final = ("use_vllm", "filter_groups", "load_best_model_at_end")


def units_a_step(config: Config) -> tuple[int, str]:
    """The number of prompts of a PPO step, in stage rm of pairs of an optimiser step; and which."""
    if config.stage == "ppo":
        return config.prompts_a_step, "prompts"
    return config.per_device_train_batch_size * config.gradient_accumulation_steps, "pairs"


def check_processes(config: Config, processes: int, name: str) -> None:
    """Check that a step has a prompt (or a pair) for each process.

    Args:
        config: the run's.
        processes: how many there are.
        name: the variable or option that says so.

    Raises:
        UserError: there are more processes than prompts, or several with a key of `ALONE`.
    """
    for key in ALONE:
        if processes > 1 and getattr(config, key):
            raise UserError(
                f"{name}: is {processes}, and {key} is for runs of one process; start one, or "
                f"leave {key} out"
            )
    count, what = units_a_step(config)
    if count < processes:
        more = " or ppo_buffer_size" if config.stage == "ppo" else ""
        raise UserError(
            f"{name}: is {processes}, and a step has {count} {what}, so a process would have none; "
            f"start {count}, or raise gradient_accumulation_steps{more}"
        )
