"""The command line of `fastppo-export`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastppo import packages
from fastppo.errors import TrainingStopped, UserError, one_line
from fastppo.run.commandline import Answered, Parser, quieten
from fastppo.run.launch import check_one_process

USAGE = "%(prog)s CONFIG [key=value ...]\n       %(prog)s FOLDER EXPORT_DIR [key=value ...]"
ABOUT = "Merge what a run trained into a plain transformers folder."
END = """  CONFIG      a YAML or JSON file with LLaMA-Factory's export keys: model_name_or_path,
              adapter_name_or_path, template, export_dir, export_size, export_device
  FOLDER      output_dir of a run, or any adapter that PEFT wrote; its base is the one
              that it names
  EXPORT_DIR  where the model goes; empty, or not there yet
  key=value   overrides a key, for example stage=rm for a reward model of LLaMA-Factory

A policy becomes a causal language model; a reward model a sequence classifier with one
label, whose score is the reward model's. docs/export.md has the keys.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one export; returns the exit code: 2 for bad input, with one line on stderr.

    1 is for want of memory or room on the disk.
    """
    parser = Parser("fastppo-export", usage=USAGE, description=ABOUT, epilog=END)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    try:
        words = parser.parse(argv).words
        if missing := packages.missing_for_training():
            raise UserError(missing)
        from fastppo.export.config import check_downloads, read_export

        config, notes = read_export(words)
        check_one_process("fastppo-export", "export_dir")
        for line in notes:
            print(f"note: {line}")
        check_downloads(config)
        quieten()
        from fastppo.export.model import export

        for line in export(config):
            print(line)
    except Answered:
        return 0
    except UserError as error:
        print(f"fastppo-export: error: {one_line(error)}", file=sys.stderr)
        return 2
    except TrainingStopped as error:
        print(f"fastppo-export: stopped: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastppo-export: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
