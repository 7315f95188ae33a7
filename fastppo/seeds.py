"""Seeds of generators: one for each run, purpose and step, none of them another's neighbour."""

from __future__ import annotations

import hashlib


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
