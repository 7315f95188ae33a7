"""Keys on how much memory a phase wants, and what the plan decides of it. No torch here."""

from __future__ import annotations

from typing import Literal

from fastppo.config.key import LF, OWN, Keys, Positive, key

Auto = Literal["auto"]  # by the memory plan: the fastest that fits


class MemoryKeys(Keys):
    """The part of a run that decides how much memory its phases want, and not what they learn."""

    title = "Memory"

    chunk_bytes: Positive | Auto | None = key(
        None,
        OWN,
        "Bytes of logits that exist at a time; null is 512 MiB on a GPU, and on a CPU 80 MiB or "
        "128 rows, auto that or what fits.",
    )
    generation_batch: Positive | Auto | None = key(
        None,
        OWN,
        "Most sequences that are sampled at a time; auto is as many of a rollout as fit, null all.",
    )
    disable_gradient_checkpointing: bool = key(
        False, LF, "Keep activations in place of recomputing them: activation_offloading: none."
    )
    use_unsloth_gc: bool = key(False, LF, "The same as activation_offloading: checkpoint+offload.")
    activation_offloading: (
        Literal["none", "checkpoint", "offload", "checkpoint+offload", "auto"] | None
    ) = key(
        None,
        OWN,
        "What happens to activations between forward and backward, see docs/offload.md; null "
        "follows the two keys above, and is checkpoint without them.",
    )
    offload_dir: str | None = key(
        None, OWN, "Offload to memory-mapped files in this folder, in place of host memory."
    )
