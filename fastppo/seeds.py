"""Random numbers of a run: a seed for each purpose and step, and the state of all generators.

torch is not imported with this module, because data are drawn without it.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any


def seed_of(seed: int, purpose: str, *steps: int) -> int:
    """The seed of the generator for one `purpose` at `steps` of a run, in [0, 2**63).

        the first 63 bits of BLAKE2b("seed/purpose/step/...")

    A sum `seed + step` would give step 1 the same numbers as step 0 of the run with the next seed.
    The result depends only on the arguments, so a resumed run draws the same numbers as an
    uninterrupted one.

    Args:
        seed: the run's (`seed` or `data_seed`), or a result of this function.
        purpose: what is drawn, for example "prompt order".
        steps: the place in the run: a step, an epoch, a group of prompts.
    """
    text = "/".join([str(seed), purpose, *map(str, steps)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def random_state() -> dict[str, Any]:
    """The state of all global generators; reward functions and judges may use them."""
    import numpy as np
    import torch

    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global one, for users' code
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.array(keys, dtype=np.int64)), *rest),
        "cpu": torch.get_rng_state(),
        # Only of the run's device: the machine that resumes may have more or fewer devices.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore a state that `random_state` returned."""
    import numpy as np
    import torch

    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])
