"""Puts the peers, in pinned versions and without their dependencies, into benchmarks/peers/.site.

python -m benchmarks.peers.install
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.peers import PINS, SITE


def main() -> int:
    wanted = [f"{package}=={version}" for package, version in PINS.items()]
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade"]
    return subprocess.run([*command, "--target", str(SITE), *wanted], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
