"""What holds for every test: Triton's interpreter in place of a GPU, and Ctrl-C that is heard."""

import os
import signal

import torch

# A shell's background job has it ignored, and its children would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton's interpreter is chosen at import.

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
