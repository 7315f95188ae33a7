"""docs/llamafactory.md, made from the code:  python -m tests.config.llamafactory_page > docs/..."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastppo.config import Config
from fastppo.config.elsewhere import IGNORED, NOT_HERE, OLD_NAMES, REFUSED
from fastppo.config.file import read_file
from fastppo.config.old_names import FORMER_VALUES, GONE, NEEDLESS, RENAMED
from fastppo.config.schema import STAGE_KEYS
from tests.config.config_page import value

KEYS = Path(__file__).parents[1] / "fixtures" / "llamafactory" / "keys.yaml"

INTRODUCTION = """# From LLaMA-Factory

You need not change anything: the YAML or JSON file of a `stage: rm` or `stage: ppo` run, its
`dataset_info.json` and data, and reward models that LLaMA-Factory trained work as they are.

| LLaMA-Factory | fastppo |
|---|---|
| `llamafactory-cli train ppo.yaml` | `fastppo-train ppo.yaml` |
| `llamafactory-cli train ppo.yaml seed=1` | `fastppo-train ppo.yaml seed=1` |
| | `fastppo-train ppo.yaml --explain`: the value, source and meaning of each key |
| | `fastppo-train ppo.yaml --plan --gpu 24GiB`: how much memory the run will need |

`1e-5` and `1.0e-5` are both numbers. An unknown key is an error that suggests the nearest one;
`ALLOW_EXTRA_ARGS=1` ignores it. A key inside a mapping is overridden as
`lr_scheduler_kwargs.min_lr=1e-6`.

## Differences

- **Sampling** is from the policy itself unless the file says otherwise: temperature 1, no top-p, no
  top-k. LLaMA-Factory's defaults are 0.95, 0.7 and 50; `lf_sampling: true` restores them.
  Settings in the file are used; if they truncate the distribution, the run prints a note.
- **The critic** has its own adapter and head, which start from the reward model.
  `critic: shared` is LLaMA-Factory's critic: a head on the policy's trunk.
- **Dropout** is off in stage ppo, including `lora_dropout`: log-probs are those of the policy.
- **A rollout** is sampled together, not `per_device_train_batch_size` rows at a time; prompts
  that do not fill a batch are not dropped.
- **A prompt that is too long** keeps its generation header. `lf_truncation: true` truncates as
  LLaMA-Factory does.
- **All tokens of an optimiser step have the same weight**, in any micro-batch; in LLaMA-Factory the
  loss is a mean over each micro-batch. `loss_agg_mode` has other aggregations.
- **An optimiser step with too large a ratio** (`ratio_threshold`) is skipped and counted; in
  LLaMA-Factory Adam's momentum still changes the weights.
- **In stage ppo** `resume_from_checkpoint`, `val_size`, `eval_dataset`, `save_total_limit` and
  `disable_shuffling` have an effect.
- **A warm-up begins above 0**, in both stages: its steps have 1/w, 2/w, ... 1 of the learning
  rate; in transformers they have 0, 1/w, ..., so that the first step learns nothing. After the peak
  the schedule is the same as in transformers.
- **The last prompts of a run** are not dropped: the number of PPO steps is rounded up.
- **A `horizon` shorter than a PPO step** acts like one step ([ppo.md](ppo.md)), so beta is never
  negative.
- **A run is one process on one device**, the first visible one, unless `torchrun` or
  `accelerate launch` starts several, which then share it ([scaling.md](scaling.md)); LLaMA-Factory
  starts torchrun by itself. `CUDA_VISIBLE_DEVICES` selects another device. The batch keys are those
  of the whole run: in LLaMA-Factory each process has that many. `mpirun` and `srun` with
  more than one process are refused, and so is `fastppo-export` in several. `--explain` and
  `--plan` write nothing and always run.
- **Each PPO step** is a line on the terminal unless `logging_steps` is set, and always a row in
  `training_metrics.csv`.

Keys have their meaning in transformers 4.52, including `warmup_ratio`, `overwrite_output_dir`,
`logging_dir` and other keys that transformers 5 has dropped.
"""


def status(name: str) -> tuple[str, str]:
    """honoured, accepted or refused, and the explanation."""
    if name in OLD_NAMES:
        return "honoured", f"An older name of `{OLD_NAMES[name]}`."
    if name in IGNORED:
        return "accepted", f"Means nothing here: {IGNORED[name]}."
    if name in REFUSED:
        harmless, cure = REFUSED[name]
        return "refused", f"Unless {', '.join(value(x) for x in harmless)}: {cure}."
    meaning = Config.model_fields[name].description or ""
    wrong = [x for key, x in NOT_HERE if key == name]
    if wrong and len(wrong) < 9:
        meaning += f" Refused: {', '.join(wrong)}."
    for stage, names in STAGE_KEYS.items():
        if name in names:
            return f"honoured ({stage})", meaning
    return "honoured", meaning


def default(name: str) -> Any:
    """The key's default here; `needed` where it has none."""
    field = Config.model_fields[name]
    return "needed" if field.is_required() else field.default


def differing(sections: dict[str, dict[str, Any]]) -> list[tuple[str, Any, Any]]:
    """Keys whose default is another one here: name, there, here."""
    return [
        (name, there, default(name))
        for keys in sections.values()
        for name, there in keys.items()
        if name in Config.model_fields and default(name) != there
    ]


def page() -> str:
    """The whole page."""
    sections = read_file(KEYS)
    text = INTRODUCTION + (
        "\n## Different defaults\n\n| key | LLaMA-Factory | fastppo |\n|---|---|---|\n"
    )
    for name, there, here in differing(sections):
        text += f"| `{name}` | {value(there)} | {value(here)} |\n"
    text += """
## Every key

*honoured*: the key has an effect, with (rm) or (ppo) only in that stage. *accepted*: the key has no
effect, and a line of the run says so. *refused*: the key is an error that says what to use instead,
unless it has one of the named values.
"""
    return text + "".join(map(section_of_keys, sections.items())) + former_names()


def section_of_keys(found: tuple[str, dict[str, Any]]) -> str:
    """One table of LLaMA-Factory's keys."""
    section, keys = found
    text = f"\n### {section}\n\n| key | its default | fastppo | |\n|---|---|---|---|\n"
    for name, there in keys.items():
        what, words = status(name)
        words = words.replace("|", "\\|")
        text += f"| `{name}` | {value(there)} | {what} | {words} |\n"
    return text


def former_names() -> str:
    """The tables of old_names.py."""
    text = """
## Names that LLaMA-Factory has given up

A file of 2023 or 2024 has keys that are none any more. One with a successor of the same meaning is
read as that, and a line of the run says so; one that asks for nothing is accepted with a line; any
other is an error that says what to write.

| then | today |
|---|---|
"""
    rows = {name: f"`{today}`, read as that" for name, today in RENAMED.items()}
    rows["resume_lora_training"] = "`create_new_adapter`, the opposite: read as that"
    for name, (harmless, cure) in GONE.items():
        allowed = ", ".join(value(x) for x in harmless if x != "")
        rows[name] = f"refused unless {allowed}: {cure}"
    for why, names in NEEDLESS.items():
        rows |= dict.fromkeys(names.split(), f"means nothing here: {why}")
    for name, values in FORMER_VALUES.items():
        for then, today in values.items():
            shown = str(then).lower() if isinstance(then, bool) else then
            rows[f"{name}: {shown}"] = f"`{name}: {today}`, read as that"
    return text + "".join(f"| `{name}` | {words} |\n" for name, words in sorted(rows.items()))


if __name__ == "__main__":
    print(page(), end="")
