"""The command `fastppo-train CONFIG [key=value ...]`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastppo import __version__, packages
from fastppo.errors import Interrupted, TrainingStopped, UserError, one_line
from fastppo.run.commandline import Answered, Parser, ReaderLeft, quieten, reader_may_leave

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastppo.config import Config
    from fastppo.data import Records
    from fastppo.run.world import World

USAGE = "%(prog)s CONFIG [key=value ...] [--explain|--plan [--gpu SIZE --gpus N]]"
ABOUT = f"fastppo {__version__}: PPO for language models on one GPU, from LLaMA-Factory's YAML"
# FIRST of config/schema.py as text, so that --help need not build it; a test compares the two.
KEYS = """keys that most runs set:
  stage:                         rm trains a reward model from pairs, ppo a policy
  output_dir:                    Where adapters, heads and checkpoints go
  model_name_or_path:            The base: a local folder or a hub name
  dataset:                       Names in dataset_info.json, or paths of files
  template: null                 Chat template by name
  reward_model: null             Folder, hub name, URL or module:function, as
                                 reward_model_type says
  reward_model_type: lora        lora, full, api or function
  max_new_tokens: 1024           Largest number of tokens in a response
  per_device_train_batch_size: 8 Sequences of a micro-batch at their longest
  gradient_accumulation_steps: 1 Times per_device_train_batch_size: the responses of
                                 an optimiser step
  learning_rate: 5e-05           Peak learning rate
  num_train_epochs: 3.0          Passes over the data set
  ppo_epochs: 4                  Passes over each rollout
  ppo_target: 6.0                Target of the KL controller, nats a response
"""
END = """
docs/config.md lists every key; for people who come from LLaMA-Factory,
docs/llamafactory.md its own. Exit codes: 0 done, 1 the run stopped itself,
2 bad input (nothing was written), 3 the plan does not fit, 130 and 143 interrupted
(Ctrl-C, SIGTERM) and saved; resume_from_checkpoint: true goes on.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one configuration; an error that the user can correct is one line, with exit code 2."""
    try:
        with reader_may_leave():
            options = read(argv)
            if options.explain:
                return explain(options.words)
            if options.plan:
                return plan(options.words, options.gpu, options.gpus or "1")
        train(options.words)
    except Answered:
        return 0
    except UserError as error:
        tell("error", error)
        return 2
    except TrainingStopped as error:
        tell("stopped", error)
        return 1
    except Interrupted as stop:
        name = signal.Signals(stop.signal).name
        print(f"fastppo-train: stopped by {name}; {one_line(stop)}", file=sys.stderr)
        return 128 + stop.signal
    except ReaderLeft:
        return 141  # 128 + SIGPIPE, as other tools
    except KeyboardInterrupt:
        print("fastppo-train: interrupted", file=sys.stderr)
        return 130
    return 0


def tell(what: str, error: UserError | TrainingStopped) -> None:
    """Print an error as one line, unless another process of the run has printed it already."""
    if not error.told:
        print(f"fastppo-train: {what}: {one_line(error)}", file=sys.stderr)


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line: words (CONFIG and overrides), explain, plan, gpu and gpus."""
    parser = Parser("fastppo-train", usage=USAGE, description=ABOUT, epilog=KEYS + END)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG",
        help="YAML or JSON with stage: rm (a reward model from pairs) or stage: ppo (a policy); "
        "key=value behind it overrides a key, for example learning_rate=2e-5",
    )
    what = parser.options.add_mutually_exclusive_group()
    what.add_argument(
        "--explain",
        action="store_true",
        help="print every key: its value, where it is from, what it does here",
    )
    what.add_argument(
        "--plan",
        action="store_true",
        help="print the memory that the run needs, by role and phase, and stop; needs no GPU, no "
        "weights and no network",
    )
    parser.options.add_argument(
        "--gpu",
        nargs="?",
        const="",
        metavar="SIZE",
        help="what it has to fit into, as 24GiB; else the GPU here",
    )
    parser.options.add_argument(
        "--gpus",
        metavar="N",
        help="GPUs that share the run; the plan is that of each",
    )
    options = parser.parse(argv)
    if missing := packages.missing_for_training():
        raise UserError(missing)
    if options.words[:1] == ["train"] and len(options.words) > 1:  # as with llamafactory-cli
        del options.words[0]
    if options.gpu is not None and not options.plan:
        raise UserError("--gpu: is the size that --plan has to fit into; add --plan, or drop it")
    if options.gpus is not None and not options.plan:
        raise UserError("--gpus: is the number that --plan is for; add --plan, or drop it")
    if not options.words:
        raise UserError("no CONFIG; name a YAML file, for example examples/demo_ppo.yaml")
    return options


def explain(words: list[str]) -> int:
    """Run `--explain`, given before or after CONFIG; returns the exit code."""
    from fastppo.config import explain

    return explain.run(words[0], words[1:])


def plan(words: list[str], gpu: str | None, gpus: str) -> int:
    """Run `--plan`, with its `--gpu` and `--gpus`; data and output folders need not exist."""
    from fastppo.config import load_config
    from fastppo.memory import command as plan

    return plan.run(load_config(words[0], words[1:]), gpu, gpus)


def train(words: list[str]) -> None:
    """Run the stage that a configuration names, with overrides behind it."""
    from fastppo.config import load_config

    run(load_config(words[0], words[1:]))


def run(config: Config, on_checkpoint: Callable[[Path], None] | None = None) -> None:
    """Check everything that can be checked without torch, then import it and run the stage.

    Args:
        config: the run's.
        on_checkpoint: what a launcher wants called in every process after each checkpoint-N.
    """
    from fastppo.run import hub, record, world
    from fastppo.run.preflight import check

    records = check(config, shared=True)
    quieten()
    # Reward functions and judges can be imported from the folder in which the command runs.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with record.outcome(Path(config.output_dir)):
        stage: Callable[[Config, Records, World], None]
        if config.stage == "rm":
            from fastppo.rm import train as reward_model

            stage = reward_model.run
        elif not config.trains:
            from fastppo.ppo import evaluate_only as held_out

            stage = held_out.run
        else:
            from fastppo.ppo import trainer

            stage = trainer.run
        with world.join(config, on_checkpoint) as processes:
            stage(config, records, processes)
        if processes.main:
            hub.push(config)


if __name__ == "__main__":
    sys.exit(main())
