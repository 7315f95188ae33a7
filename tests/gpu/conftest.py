"""These tests need a GPU: `make gpu` runs them, and without one they are not collected."""

import torch

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
