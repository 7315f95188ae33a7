"""What Ray's processes leave out of the driver's terminal."""

from __future__ import annotations

import logging
from typing import Final

# Asks the dashboard's API each second, and says so where Ray has been installed without it.
CLEANER: Final = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
SETUP_HOOK: Final = "fastppo.launch.ray_logs.quieten"  # which Ray calls in every process of the job


def quieten() -> None:
    """Leave out the warnings of the actor that removes placement groups, but not its errors."""
    logging.getLogger(CLEANER).setLevel(logging.ERROR)
