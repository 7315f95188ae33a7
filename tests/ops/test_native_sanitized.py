"""The C++ kernels under the address and undefined-behaviour sanitizers, without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU = ROOT / "kernels" / "cpu"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to build the driver")
def test_no_kernel_touches_what_is_not_its_own(tmp_path):
    program = tmp_path / "sanitized"
    # -O0 compiles in a quarter of the time of -O1, and what the kernels touch is the same.
    flags = ["-std=c++17", "-O0", "-g1", "-fopenmp", "-fsanitize=address,undefined"]
    sources = [
        str(path) for path in [*CPU.glob("*.cpp"), Path(__file__).with_name("sanitized.cpp")]
    ]
    command = ["g++", *flags, "-fno-sanitize-recover=all", f"-I{CPU}", *sources, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    done = subprocess.run(
        [str(program)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2", "ASAN_OPTIONS": "detect_leaks=1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing found" in done.stdout
