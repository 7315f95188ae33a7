"""The end of a PPO run: the files that LLaMA-Factory leaves in output_dir, and the model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastppo.data import encode_prompts
from fastppo.ppo import log
from fastppo.ppo.evaluation import predict
from fastppo.run import card, results

if TYPE_CHECKING:
    from fastppo.data import Records
    from fastppo.ppo.state import State
    from fastppo.types import Prompt


def finish(state: State, records: Records) -> None:
    """After the last evaluation, and beside the policy that was saved."""
    folder = Path(state.config.output_dir)
    results.save_metrics(folder, "train", log.train_metrics(state))
    if state.config.do_predict:
        predict(state, held_out_prompts(state, records))
    shown = {k: v for k, v in state.evaluations[-1].items() if k.startswith("eval_")}
    where = "held-out prompts" if state.eval_is_held_out else "prompts of the training set"
    card.write(
        folder,
        state.config,
        steps=state.step,
        metrics=shown,
        held_out=f"{len(state.eval_prompts)} {where}",
    )


def held_out_prompts(state: State, records: Records) -> list[Prompt]:
    """Everything that was held out, where an evaluation takes the first `eval_max_samples`."""
    config = state.config
    return encode_prompts(
        records.eval,
        state.template,
        config.cutoff_len,
        config.default_system,
        lf_truncation=config.lf_truncation,
    )
