"""These tests need a GPU: `make gpu` runs them, and without one they are not collected."""

import pytest
import torch

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One device, whose memory they measure: never two at once."""
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.alone)
