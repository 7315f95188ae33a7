"""examples/quickstart.ipynb runs, and shows what it gives."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.static.notebook import NOTEBOOK

ROOT = Path(__file__).resolve().parents[2]
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
RUN = """
import json, sys
from tests.static.notebook import NOTEBOOK, run
cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
print(json.dumps(run(cells)))
"""


def kinds(outputs: list[list[dict[str, object]]]) -> list[list[object]]:
    return [[output["output_type"] for output in of_cell] for of_cell in outputs]


def test_the_committed_notebook_shows_outputs_and_a_picture():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert all(cell["outputs"] for cell in CODE)
    pictures = [o["data"]["image/png"] for c in CODE for o in c["outputs"] if "data" in o]
    assert [base64.b64decode(x)[:4] for x in pictures] == [b"\x89PNG"]
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    assert NOTEBOOK.stat().st_size < 100_000


@pytest.mark.parametrize(
    "cell", [c for c in CELLS if c["cell_type"] == "markdown"], ids=lambda cell: cell["id"]
)
def test_its_links_lead_somewhere(cell):
    links = re.findall(r"\]\(([^)#]+)\)", "".join(cell["source"]))
    assert [link for link in links if not (NOTEBOOK.parent / link).exists()] == []


@pytest.mark.slow
def test_the_notebook_runs_and_its_policy_gets_better(tmp_path):
    """In a process and a folder of its own: 25 s on one core."""
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = json.loads(done.stdout)
    assert kinds(outputs) == kinds([cell["outputs"] for cell in CODE])
    printed = "".join(line for cell in outputs for o in cell for line in o.get("text", []))
    before, after = re.findall(r"reward (\S+) -> (\S+)\n", printed)[0]
    assert float(after) > float(before)
    assert "below 1e-4: True" in printed
