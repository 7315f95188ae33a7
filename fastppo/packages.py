"""What the trainer needs beyond torch, and how a missing package is installed.

`pip install .` brings torch and triton, which is all that `fastppo.ops` and `fastppo.offload`
import. Nothing here imports more than the standard library.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Final

# The extra `train` of pyproject.toml: package, the name that it is imported by, its least version.
TRAIN: Final = (
    ("transformers", "transformers", "5"),
    ("peft", "peft", "0.18"),
    ("huggingface_hub", "huggingface_hub", "1"),
    ("accelerate", "accelerate", "1.10"),
    ("datasets", "datasets", "4"),
    ("safetensors", "safetensors", "0.5"),
    ("pydantic", "pydantic", "2.9"),
    ("PyYAML", "yaml", "6"),
    ("psutil", "psutil", "5.9"),
    ("matplotlib", "matplotlib", "3.8"),
    ("rich", "rich", "13"),
)


def install(extra: str) -> str:
    """The command that installs an extra, and where to run it; fastppo is in no package index.

    flash-attn's own build imports torch, which pip's isolated build does not have.
    """
    if extra == "flash-attn":
        return "pip install --no-build-isolation flash-attn"
    if extra == "vllm":  # it decides which transformers there may be
        return "pip install --constraint constraints-vllm.txt '.[vllm]' in fastppo's checkout"
    return f"pip install '.[{extra}]' in fastppo's checkout"


def missing_for_training() -> str | None:
    """A line that names the packages that the trainer lacks, with the cure; None if it lacks none.

    A package that is there in a version older than pyproject.toml asks for is named with both
    versions. pip does not look at these packages when fastppo is installed without `train`.
    """
    missing = []
    for package, module, least in TRAIN:
        if importlib.util.find_spec(module) is None:
            missing.append(package)
        elif (found := installed_version(package)) and numbers(found) < numbers(least):
            missing.append(f"{package}>={least} (here is {found})")
    if not missing:
        return None
    verb = "is" if len(missing) == 1 else "are"
    return f"{', '.join(missing)} {verb} not installed; run: {install('train')}"


def hide_unavoidable() -> None:
    """Drop two warnings of libraries that no user can do anything about.

    PEFT asks transformers by a name that transformers is about to drop. And it imports bitsandbytes
    whether anything is quantised or not: on processors with bf16 that one says that a 4-bit product
    from the package `kernels` is missing, which fastppo's layers never use (models/quantised.py).
    """
    deprecated = "`is_gradient_checkpointing` is deprecated"
    warnings.filterwarnings("ignore", deprecated, category=FutureWarning)
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    if is_needed not in logger.filters:
        logger.addFilter(is_needed)


def is_needed(record: logging.LogRecord) -> bool:
    """Whether a record of bitsandbytes' log is another than the warning on that product."""
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


def installed_version(package: str) -> str | None:
    """The version of a package, or None where no metadata says."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def numbers(release: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 18, 1) of "0.18.1.dev0"."""
    leading = re.match(r"\d+(\.\d+)*", release)
    return tuple(int(part) for part in leading[0].split(".")) if leading else ()
