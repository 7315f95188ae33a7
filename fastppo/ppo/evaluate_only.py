"""Stage ppo without training: `do_eval` and `do_predict` of a policy that was trained before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftModel

from fastppo import __version__
from fastppo.config.roles import folder_to_evaluate
from fastppo.errors import UserError
from fastppo.models.adapters import load_adapter
from fastppo.models.load import LOAD_ERRORS, disable_dropout, first_line
from fastppo.ppo import lines
from fastppo.ppo.evaluation import compare, predict, report, summarise
from fastppo.ppo.finish import held_out_prompts
from fastppo.ppo.state import init_state
from fastppo.run import console, results

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.data import Records
    from fastppo.models.build import Roles

TRAINED = "trained"  # the adapter's name beside the run's own


def run(config: Config, records: Records) -> None:
    """Load what was trained, compare it with its reference, and write what was asked for.

    Only `output_dir` is written to: the metrics of the run that trained it stay as they are.
    """
    folder, config = folder_to_evaluate(config)
    # A critic says nothing here, so it is the smallest there is; and a tracker has no curve.
    update = {"critic": "shared", "critic_finetuning_type": None, "report_to": "none"}
    config = config.model_copy(update=update)
    state = init_state(config, records)
    load_policy(state.roles, folder)
    say = console.console.print
    say(f"[bold]fastppo {__version__}[/bold], stage ppo, {config.model_name_or_path}")
    say(f"  policy: {folder}, reference: {state.roles.places['reference'].words}")
    say(f"  {len(records.eval)} prompts held out; writes {config.output_dir}")
    for line in config.ignored:
        say(f"  [yellow]note:[/yellow] {line}")
    if config.do_eval:
        compared = compare(state)
        summary = summarise(state, compared)
        report(state, compared, summary)
        lines.evaluation_line(summary)
    if config.do_predict:
        predict(state, held_out_prompts(state, records))
        say(f"  predictions: {Path(config.output_dir) / results.PREDICTIONS}")


def load_policy(roles: Roles, folder: Path) -> None:
    """Place what lies in `folder` as the actor; its rank may be other than the file's."""
    model = roles.model
    if isinstance(model, PeftModel):
        load_adapter(model, str(folder), TRAINED, "adapter_name_or_path")
        for role in {"actor", "critic"} & roles.places.keys():  # which is a head on the actor
            roles.places[role] = replace(roles.places[role], adapter=TRAINED, trainable=())
    else:
        try:
            trained = type(model).from_pretrained(folder, dtype=model.dtype)
            model.load_state_dict(trained.state_dict())
        except LOAD_ERRORS as error:
            raise UserError(
                f"output_dir: the policy in {folder} cannot be loaded ({first_line(error)}); name "
                "one that was trained on the same base"
            ) from None
    disable_dropout(model)
    model.to(roles.device).eval()
