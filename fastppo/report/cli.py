"""The command line of `fastppo-report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastppo import packages
from fastppo.errors import UserError, one_line
from fastppo.run.commandline import Answered, Parser

USAGE = "%(prog)s OUTPUT_DIR [--out FILE]"
ABOUT = "Write a run as one HTML file: curves, samples, settings, memory, warnings."
END = """  OUTPUT_DIR  output_dir of a run of fastppo-train, finished or not

The file needs no network and no JavaScript. docs/report.md says what is in it.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write one report; returns the exit code: 2 for bad input, with one line on stderr."""
    parser = Parser("fastppo-report", usage=USAGE, description=ABOUT, epilog=END, takes_keys=False)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.options.add_argument(
        "--out", metavar="FILE", help="where the report goes; OUTPUT_DIR/report.html if left out"
    )
    try:
        options = parser.parse(argv)
        if missing := packages.missing_for_training():
            raise UserError(missing)
        print(write(options.words, options.out))
    except Answered:
        return 0
    except UserError as error:
        print(f"fastppo-report: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastppo-report: interrupted", file=sys.stderr)
        return 130
    return 0


def write(words: Sequence[str], out: str | None) -> Path:
    """Write the report of the run in the folder that `words` names; returns the file's path.

    Raises:
        UserError: there is not one folder, it holds no run, or the file cannot be written.
    """
    from fastppo.config.schema import unwritable
    from fastppo.report.page import page
    from fastppo.report.read import read_run
    from fastppo.run.durable import write_text

    if len(words) != 1:
        keys = [f"'{word}': no key has a meaning here" for word in words if "=" in word]
        wrong = keys[0] if keys else f"{len(words)} folders" if words else "no OUTPUT_DIR"
        raise UserError(f"{wrong}; name the output_dir of one run, for example saves/ppo")
    try:
        run = read_run(Path(words[0]))
    except OSError as error:
        cause = f"{str(error.filename)[:200]}: {error.strerror}"
        raise UserError(f"{cause}; name the output_dir of a run") from None
    if out is not None and (not Path(out).name or unwritable(out)):
        raise UserError(f"--out: {out!r} is no name of a file; write for example --out ppo.html")
    path = run.folder / "report.html" if out is None else Path(out)
    inside = path.resolve().parent == run.folder.resolve()
    if inside and path.is_file() and path.suffix != ".html":
        raise UserError(f"{path} is a file of the run; name another with --out FILE")
    try:
        write_text(path, page(run))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); name another with --out FILE"
        ) from None
    return path


if __name__ == "__main__":
    sys.exit(main())
