"""Stage ppo without training: `do_eval` and `do_predict` with a policy that is already trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftModel

from fastppo import __version__
from fastppo.config.roles import folder_to_evaluate
from fastppo.errors import UserError
from fastppo.models.adapters import load_adapter
from fastppo.models.load import LOAD_ERRORS, check_weights, disable_dropout, first_line
from fastppo.models.weights import from_pretrained
from fastppo.ppo import lines
from fastppo.ppo.checkpoint import check_processes_agree
from fastppo.ppo.evaluation import compare, held_out_prompts, predict, report, summarise
from fastppo.ppo.state import init_state
from fastppo.run import console, results
from fastppo.run.world import ALONE, World

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.data import Records
    from fastppo.models.build import Roles

TRAINED = "trained"  # name of the loaded adapter in the PEFT model


def run(config: Config, records: Records, world: World = ALONE) -> None:
    """Load the trained policy; compare it with its reference and write predictions, as configured.

    Only `output_dir` is written to: the metrics of the run that trained the policy stay unchanged.
    """
    folder, config = folder_to_evaluate(config)
    # No critic is needed, so the smallest kind is built; nothing is sent to trackers.
    update = {"critic": "shared", "critic_finetuning_type": None, "report_to": "none"}
    config = config.model_copy(update=update)
    state = init_state(config, records, world=world)
    load_policy(state.roles, folder)
    check_processes_agree(state, folder)
    print_line = console.console.print
    print_line(f"[bold]fastppo {__version__}[/bold], stage ppo, {config.model_name_or_path}")
    print_line(f"  policy: {folder}, reference: {state.roles.places['reference'].words}")
    print_line(f"  {len(records.eval)} prompts held out; writes {config.output_dir}")
    for line in config.notes:
        print_line(f"  [yellow]note:[/yellow] {line}")
    if config.do_eval:
        compared = compare(state)
        summary = summarise(state, compared)
        report(state, compared, summary)
        lines.evaluation_line(summary)
    if config.do_predict:
        predict(state, held_out_prompts(state, records))
        print_line(f"  predictions: {Path(config.output_dir) / results.PREDICTIONS}")


def load_policy(roles: Roles, folder: Path) -> None:
    """Load the policy in `folder` as the actor; its LoRA rank may differ from the YAML's."""
    model = roles.model
    if isinstance(model, PeftModel):
        load_adapter(model, str(folder), TRAINED, "adapter_name_or_path")
        for role in {"actor", "critic"} & roles.places.keys():  # the critic is a head on the actor
            roles.places[role] = replace(roles.places[role], adapter=TRAINED, trainable=())
    else:
        try:
            finished, info = from_pretrained(type(model), folder, dtype=model.dtype)
        except LOAD_ERRORS as error:
            raise UserError(
                f"output_dir: the policy in {folder} cannot be loaded ({first_line(error)}); name "
                "one that was trained on the same base"
            ) from None
        check_weights("output_dir", str(folder), finished, info)
        model.load_state_dict(finished.state_dict())
    disable_dropout(model)
    model.to(roles.device).eval()
