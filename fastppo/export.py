"""`fastppo-export`: what a run trained, as a plain transformers folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastppo import __version__
from fastppo.cli import one_line, quieten
from fastppo.errors import UserError
from fastppo.launch import check_one_process

HELP = """fastppo-export: merge what a run trained into a plain transformers folder

usage: fastppo-export CONFIG [key=value ...]
       fastppo-export FOLDER EXPORT_DIR [key=value ...]

  CONFIG      a YAML or JSON file with LLaMA-Factory's export keys: model_name_or_path,
              adapter_name_or_path, template, export_dir, export_size, export_device
  FOLDER      output_dir of a run, or any adapter that PEFT wrote; its base is the one
              that it names
  EXPORT_DIR  where the model goes; empty, or not there yet
  key=value   overrides a key, for example stage=rm for a reward model of LLaMA-Factory

A policy becomes a causal language model; a reward model a sequence classifier with one
label, whose score is the reward model's. docs/export.md has the keys.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one export; every error that a user can mend is one line and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(HELP, end="")
        return 0
    if "--version" in arguments:
        print(f"fastppo {__version__}")
        return 0
    try:
        options = [argument for argument in arguments if argument.startswith("-")]
        if options:
            raise UserError(f"unknown option '{options[0]}'; see --help")
        from fastppo.export_config import read_export

        config, notes = read_export(arguments)
        check_one_process("fastppo-export", "export_dir")
        for line in notes:
            print(f"note: {line}")
        quieten()
        from fastppo.export_model import export

        for line in export(config):
            print(line)
    except UserError as error:
        print(f"fastppo-export: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastppo-export: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
