"""What the pages show of the demo, from what `make demo` left:  python docs/tools/demo_page.py

README.md's and README.zh-CN.md's table and date, docs/demo_curves.png, docs/demo_report.html, and
the numbers with machine and date in benchmarks/results/demo.json, which benchmarks/README.md lists.
`make demo-page` runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import demo  # noqa: E402

from benchmarks.report import processor  # noqa: E402
from fastppo.report.page import page  # noqa: E402
from fastppo.report.read import read_run  # noqa: E402

RUN, METRICS = Path("output/demo/ppo"), Path("output/ppo_metrics")  # of examples/demo_ppo.yaml
RESULT = ROOT / "benchmarks" / "results" / "demo.json"
REPORT, PICTURE = ROOT / "docs" / "demo_report.html", ROOT / "docs" / "demo_curves.png"
LISTED = ROOT / "benchmarks" / "README.md"
KEPT = (
    *("judge_before", "judge_after", "reward_before", "reward_after", "kl"),
    *("length_before", "length_after", "eos_share_before", "eos_share_after", "steps", "seconds"),
)
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
TABLE = re.compile(r"^┃ .*?(?=^```)", re.DOTALL | re.MULTILINE)
DATE = re.compile(r"(?<=\(docs/demo_report\.html\))(\D*)\d{4}-\d\d-\d\d")


def table(summary: dict[str, Any]) -> str:
    """The demo's table in a README, as the terminal shows it."""
    lines = [demo.HEAD, *demo.rows(summary)]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]

    def drawn(line: tuple[str, ...], edge: str) -> str:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        return edge + edge.join(f" {cell} " for cell in cells) + edge + "\n"

    return "".join(drawn(line, "│" if i else "┃") for i, line in enumerate(lines))


def with_result(text: str, result: dict[str, Any]) -> str:
    """The text of a README with the table and the date of `result`."""
    text, tables = TABLE.subn(table(result["summary"]), text)
    text, dates = DATE.subn(rf"\g<1>{result['date']}", text)
    if (tables, dates) != (1, 1):
        raise SystemExit("the README has no table of the demo, or no date after its report")
    return text


def with_day(text: str, day: str) -> str:
    """The list of results with the day of the demo's."""
    return re.sub(r"(\(results/demo\.json\) \| )\d{4}-\d\d-\d\d", rf"\g<1>{day}", text)


def measured() -> dict[str, Any]:
    """The numbers of the demo's run, with the day, the machine and torch's version."""
    run = read_run(RUN)
    if run.status != "finished" or run.remarks:
        raise SystemExit("; ".join([f"{RUN}: {run.status}", *run.remarks]) + "; run make demo")
    summary = json.loads((METRICS / "summary.json").read_text(encoding="utf-8"))
    return {
        "command": "make demo && make demo-page",
        "date": run.info["started"][:10],
        "machine": f"{os.cpu_count()} cores of {processor()}, no GPU",
        "torch": run.info["packages"]["torch"],
        "summary": {name: summary[name] for name in KEPT},
    }


def main() -> None:
    """Write them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default=ROOT, help="where make demo ran")
    os.chdir(parser.parse_args().folder)  # so that the report names no folder of this machine
    result, html = measured(), page(read_run(RUN))
    readmes = {path: with_result(path.read_text(encoding="utf-8"), result) for path in READMES}
    readmes[LISTED] = with_day(LISTED.read_text(encoding="utf-8"), result["date"])
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    REPORT.write_text(html, encoding="utf-8")
    shutil.copyfile(METRICS / "training_curves.png", PICTURE)
    for path, text in readmes.items():
        path.write_text(text, encoding="utf-8")
    for path in (RESULT, REPORT, PICTURE, *readmes):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
