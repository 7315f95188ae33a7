"""Run a notebook's cells, and write their outputs:  python -m tests.static.notebook

The cells run in one namespace, as Jupyter runs them, without Jupyter. What a cell prints is its
output, and so is each figure that is open when it ends.
"""

from __future__ import annotations

import base64
import io
import json
import os
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "quickstart.ipynb"


def run(cells: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The outputs of each code cell, in the notebook's own format; an error ends the run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    namespace: dict[str, Any] = {"__name__": "__main__"}
    found = []
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        printed = io.StringIO()
        code = compile("".join(cell["source"]), f"cell {number}", "exec")
        with redirect_stdout(printed), redirect_stderr(io.StringIO()):
            exec(code, namespace)
        outputs: list[dict[str, Any]] = []
        if text := printed.getvalue():
            lines = text.splitlines(keepends=True)
            outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
        for figure in map(pyplot.figure, pyplot.get_fignums()):
            picture = io.BytesIO()
            # Without the version of matplotlib, so that the same figure is the same file.
            figure.savefig(picture, format="png", dpi=72, metadata={"Software": None})
            data = {"image/png": base64.b64encode(picture.getvalue()).decode("ascii") + "\n"}
            outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
        pyplot.close("all")
        found.append(outputs)
    return found


def main() -> None:
    """Run the notebook in an empty folder, and write its outputs into it."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            outputs = run(notebook["cells"])
        finally:
            os.chdir(here)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, (cell, made) in enumerate(zip(code, outputs, strict=True), 1):
        cell["execution_count"], cell["outputs"] = count, made
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    NOTEBOOK.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
