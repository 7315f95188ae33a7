"""python -m benchmarks.peers.suites DIR [--only PEER ...] [--out FILE]

Runs the suites on the checkouts in DIR, and writes benchmarks/results/peers_suites.json and the
table beside it: commits, versions, counts, and every failure with its explanation. Exits with 1 if
a failure has none, with 2 if a checkout is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import PINS, SITE
from benchmarks.peers.suites import PEERS, Suite, suite_of

ROOT = Path(__file__).parents[3]
RESULT = ROOT / "benchmarks" / "results" / "peers_suites.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.suites")
    parser.add_argument("sources", type=Path, help="the folder of the checkouts")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args(arguments)
    missing = [
        s.folder for s in map(suite_of, given.only) if not (given.sources / s.folder).is_dir()
    ]
    if missing or not SITE.is_dir():
        what = ", ".join(missing) or str(SITE)
        cure = "clone them there" if missing else "run: python -m benchmarks.peers.install"
        print(f"peers-suites: not found in {given.sources}: {what}; {cure}", file=sys.stderr)
        return 2
    old = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    peers = {peer: old.get("peers", {}).get(peer) for peer in PEERS}
    for peer in given.only:
        peers[peer] = run(peer, (given.sources / suite_of(peer).folder).resolve())
    found = {
        "name": "peers_suites",
        "command": "make peers-suites SRC=DIR",
        "date": date.today().isoformat(),
        "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__)},
        "peers": {peer: entry for peer, entry in peers.items() if entry is not None},
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    given.out.with_suffix(".md").write_text(page(found), encoding="utf-8")
    print(page(found))
    unexplained = [f for e in found["peers"].values() for f in e["failures"] if not f["fault"]]
    return 1 if unexplained or any(not e["passed"] for e in found["peers"].values()) else 0


def run(peer: str, folder: Path) -> dict[str, Any]:
    """The result of a peer's suite, in a process of its own."""
    suite = suite_of(peer)
    path = [str(ROOT), *(str(folder / part) for part in suite.path), str(SITE)]
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "found.json"
        ini = Path(temporary) / "pytest.ini"
        ini.write_text("[pytest]\n", encoding="utf-8")  # theirs may ask for plugins
        command = [sys.executable, "-P", "-m", "pytest", "-q", "--tb=short", "-c", str(ini)]
        command += [f"--rootdir={folder}", "-p", "no:cacheprovider", "--import-mode=importlib"]
        command += ["-p", "benchmarks.peers.suites.plugin", "--peer", peer, "--found", str(out)]
        command += [] if suite.conftest else ["--noconftest"]
        command += ["-k", suite.select] if suite.select else []
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        subprocess.run([*command, *suite.files], cwd=folder, env=environment, check=False)
        tests = json.loads(out.read_text(encoding="utf-8"))
    mine = {name: test for name, test in tests.items() if test["reached"]}
    counts = Counter(test["outcome"] for test in mine.values())
    return {
        "repository": suite.folder,
        "commit": commit_of(folder),
        "files": list(suite.files),
        "library": f"{suite.package} {PINS[suite.package]}" if suite.package else "the checkout's",
        "replaced": sorted(suite.replaced),
        "selected": suite.why,
        "passed": counts["passed"],
        "tests": counts["passed"] + counts["failed"],
        "not_ours": sum(t["outcome"] != "skipped" and not t["reached"] for t in tests.values()),
        "failures": [
            {"test": name, "why": test["why"], **explained(suite, name)}
            for name, test in mine.items()
            if test["outcome"] == "failed"
        ],
    }


def commit_of(folder: Path) -> str:
    """The commit of a checkout; empty where it has no history."""
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def explained(suite: Suite, test: str) -> dict[str, str]:
    """Whose fault a failure is, and why; empty where nobody has said so."""
    for known in suite.known:
        if re.fullmatch(known.test, test):
            return {"fault": known.fault, "explanation": known.why}
    return {"fault": "", "explanation": ""}


def page(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        "# The peers' own tests, with their function replaced by ours",
        "",
        f"{found['date']}, `{found['command']}`, {versions}.",
        "Tests that called no function of ours are not counted.",
        "",
        "| checkout | library | test files | replaced | passed |",
        "|---|---|---|---|---|",
    ]
    for entry in found["peers"].values():
        files, replaced = (", ".join(f"`{x}`" for x in entry[key]) for key in ("files", "replaced"))
        which = f"{entry['repository']} {entry['commit'][:10]}"
        count = f"{entry['passed']} of {entry['tests']}"
        lines.append(f"| {which} | {entry['library']} | {files} | {replaced} | {count} |")
    for entry in found["peers"].values():
        if entry["selected"]:
            lines += ["", f"{entry['repository']}: {entry['selected']}"]
    lines += ["", "## Failures", ""]
    groups: dict[tuple[str, str, str], list[str]] = {}
    for entry in found["peers"].values():
        for failure in entry["failures"]:
            why = failure["explanation"] or failure["why"]
            key = (entry["repository"], failure["fault"] or "unexplained", why)
            groups.setdefault(key, []).append(failure["test"])
    for (repository, fault, why), tests in groups.items():
        lines += [f"{repository}, {len(tests)}, {fault}: {why}", ""]
        lines += [f"- `{test}`" for test in tests] + [""]
    if not groups:
        lines.append("None.")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
