"""`fastppo-train CONFIG [key=value ...]`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastppo import __version__
from fastppo.errors import Interrupted, TrainingStopped, UserError, one_line

if TYPE_CHECKING:
    from fastppo.config import Config

HELP = f"""fastppo {__version__}: PPO for language models on one GPU, from LLaMA-Factory's YAML

usage: fastppo-train CONFIG [key=value ...] [--explain | --plan [--gpu SIZE]]

  CONFIG      a YAML or JSON file with stage: rm (a reward model from pairs) or
              stage: ppo (a policy from prompts and that reward model)
  key=value   overrides a key of the file, for example learning_rate=2e-5

  --explain   print every key with its value, where it came from and what it does
              here, and stop; loads no model
  --plan      print the memory that the run needs, by role and phase, and stop;
              needs no GPU, no weights and no network
  --gpu SIZE  what it has to fit into, for example 24GiB; the GPU here if left out
  --help      this text
  --version   the version

docs/config.md lists every key; for people who come from LLaMA-Factory,
docs/llamafactory.md its own. Exit codes: 0 done, 1 the run stopped itself,
2 bad input (nothing was written), 3 the plan does not fit, 130 and 143 interrupted
(Ctrl-C, SIGTERM) and saved; resume_from_checkpoint: true goes on.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one configuration; every error that a user can mend is one line and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(HELP, end="")
        return 0
    if "--version" in arguments:
        print(f"fastppo {__version__}")
        return 0
    try:
        if "--explain" in arguments:
            return explain(arguments)
        if "--plan" in arguments:
            return plan(arguments)
        train(arguments)
    except UserError as error:
        print(f"fastppo-train: error: {one_line(error)}", file=sys.stderr)
        return 2
    except TrainingStopped as error:
        print(f"fastppo-train: stopped: {one_line(error)}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        name = signal.Signals(stop.signal).name
        print(f"fastppo-train: stopped by {name}; {one_line(stop)}", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("fastppo-train: interrupted", file=sys.stderr)
        return 130
    return 0


def read_config(arguments: list[str]) -> Config:
    """CONFIG and its overrides, checked."""
    from fastppo.config import load_config

    return load_config(*split(arguments))


def split(arguments: list[str]) -> tuple[str, list[str]]:
    """CONFIG, and the overrides after it."""
    if not arguments:
        raise UserError("no CONFIG; name a YAML file, for example examples/demo_ppo.yaml")
    options = [argument for argument in arguments if argument.startswith("-")]
    if options and options[0].partition("=")[0] == "--gpu":
        raise UserError("--gpu: is the size that --plan has to fit into; add --plan, or drop it")
    if options:
        raise UserError(f"unknown option '{options[0]}'; keys are overridden as key=value")
    if arguments[0] == "train" and len(arguments) > 1:  # llamafactory-cli's habit
        arguments = arguments[1:]
    return arguments[0], arguments[1:]


def explain(arguments: list[str]) -> int:
    """`--explain`, before or after CONFIG."""
    from fastppo import explain

    return explain.run(*split([x for x in arguments if x != "--explain"]))


def plan(arguments: list[str]) -> int:
    """`--plan` with its `--gpu`; data, rewards and outputs need not be there."""
    from fastppo import plan

    gpu, rest, left = None, [], iter(arguments)
    for argument in left:
        name, equals, value = argument.partition("=")
        if name == "--gpu":
            gpu = value if equals else next(left, "")
        elif argument != "--plan":
            rest.append(argument)
    return plan.run(read_config(rest), gpu)


def train(arguments: list[str]) -> None:
    """Check everything that needs no model, then import what does."""
    from fastppo.preflight import check

    config = read_config(arguments)
    records = check(config)
    quieten()
    # Reward functions and judges are importable from where the command runs.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if config.stage == "rm":
        from fastppo import reward_model

        reward_model.run(config, records)
    elif not config.trains:
        from fastppo import held_out

        held_out.run(config, records)
    else:
        from fastppo import trainer

        trainer.run(config, records)


def quieten() -> None:
    """What libraries warn of on every start, and no user of this command can mend."""
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"peft\..*")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    sys.exit(main())
