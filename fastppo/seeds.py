"""Random numbers of a run: a seed for each purpose and step, and the state of all generators.

No torch at import: data are drawn without it.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any


def seed_of(seed: int, purpose: str, *steps: int) -> int:
    """The seed of the generator that does `purpose` at `steps` of a run, in [0, 2**63).

        the first 63 bits of BLAKE2b("seed/purpose/step/...")

    With `seed + step` a run's second order would be the first order of the run with the next seed.
    It depends on its arguments alone, so a resumed run draws what an unbroken one draws.

    Args:
        seed: the run's (`seed` or `data_seed`), or a seed that this function gave.
        purpose: what is drawn, for example "prompt order".
        steps: where in the run: a step, an epoch, a group of prompts.
    """
    text = "/".join([str(seed), purpose, *map(str, steps)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def random_state() -> dict[str, Any]:
    """Every generator that is nobody's own: reward functions and judges may draw from them."""
    import numpy as np
    import torch

    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - whoever uses the global one
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.array(keys, dtype=np.int64)), *rest),
        "cpu": torch.get_rng_state(),
        # Of the run's device alone: where it is resumed there may be more of them, or fewer.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put them back where `random_state` found them."""
    import numpy as np
    import torch

    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])
