"""What the commands share: how they read their arguments, and what they keep quiet about.

No torch here.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

from fastppo import __version__, packages
from fastppo.errors import UserError

WIDTH = 84  # columns of --help


class Answered(Exception):
    """--help or --version has been printed, and there is nothing else to do."""


class ReaderLeft(Exception):
    """The reader of stdout, such as `head` or a pager, has stopped reading."""


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Flush stdout at the end of the block, which prints and does nothing else.

    Raises:
        ReaderLeft: in place of BrokenPipeError.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered has to go somewhere when Python flushes it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ReaderLeft from None


class Parser(argparse.ArgumentParser):
    """argparse with options among the key=value, and its complaints as a UserError: one line."""

    def __init__(
        self, command: str, *, usage: str, description: str, epilog: str, takes_keys: bool = True
    ) -> None:
        super().__init__(
            command,
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=WIDTH),
            add_help=False,
            allow_abbrev=False,
        )
        self.takes_keys = takes_keys  # whether key=value among the words overrides a key
        self.options = self.add_argument_group("options")
        self.options.add_argument("-h", "--help", action="help", help="this text")
        version = f"fastppo {__version__}"
        self.options.add_argument("--version", action="version", version=version, help="its number")

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """The arguments by name; those of the command line if None.

        Raises:
            UserError: an option is unknown, or lacks or contradicts something.
            Answered: --help or --version was asked for.
        """
        options, rest = self.parse_known_intermixed_args(arguments)
        for argument in rest:
            if argument.startswith("-"):
                cure = "keys are overridden as key=value" if self.takes_keys else "see --help"
                raise UserError(f"unknown option '{argument}'; {cure}")
        return options

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Return from the command instead of ending the process, as argparse would."""
        raise Answered

    def error(self, message: str) -> NoReturn:
        """Raise argparse's own errors as a UserError, without the usage text."""
        raise UserError(f"{message}; see --help")


def quieten() -> None:
    """Silence warnings that libraries print on every start and that the user cannot avoid."""
    import warnings

    packages.hide_unavoidable()

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"peft\..*")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
