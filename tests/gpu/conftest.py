"""These tests need a GPU: `make gpu` runs them, and without one they are not collected.

Its rehearsal (FASTPPO_REHEARSE=1) walks through those of test_real_sizes.py at toy sizes, under
Triton's interpreter.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    rehearsed = os.environ.get("FASTPPO_REHEARSE") == "1"
    collect_ignore_glob = ["test_offload.py"] if rehearsed else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One device, whose memory they measure: never two at once."""
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.alone)
