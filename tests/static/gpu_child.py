"""A child of benchmarks.gpu's runner that imports nothing: it writes rows, fails, or hangs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("section")
    parser.add_argument("--part")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--fault")
    asked, _ = parser.parse_known_args()
    if asked.part == "warm":
        time.sleep(600)
    lines = [{"machine": {"device": "D", "torch": "1", "triton": "2"}}, {"what": asked.part}]
    with asked.rows.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        if asked.fault == "hang":
            file.write('{"what": "half of a li')
    if asked.fault == "hang":
        time.sleep(600)
    if asked.fault == "fail":
        raise RuntimeError("a failure that was asked for")
    return 0


if __name__ == "__main__":
    sys.exit(main())
