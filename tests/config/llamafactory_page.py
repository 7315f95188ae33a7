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

Change nothing: the YAML or JSON file of a `stage: rm` or `stage: ppo` run, its `dataset_info.json`
and data, and reward models that LLaMA-Factory trained work as they are.

| there | here |
|---|---|
| `llamafactory-cli train ppo.yaml` | `fastppo-train ppo.yaml` |
| `llamafactory-cli train ppo.yaml seed=1` | `fastppo-train ppo.yaml seed=1` |
| | `fastppo-train ppo.yaml --explain`: each key, its value, whence, and what it does |
| | `fastppo-train ppo.yaml --plan --gpu 24GiB`: the memory it needs, before it needs it |

`1e-5` and `1.0e-5` are numbers. A key nobody knows is an error that suggests the nearest one;
`ALLOW_EXTRA_ARGS=1` ignores it. A key inside a mapping is overridden as
`lr_scheduler_kwargs.min_lr=1e-6`.

## What differs

- **Sampling** is the policy itself unless the file says otherwise: temperature 1, no top-p, no
  top-k, where LLaMA-Factory has 0.95, 0.7 and 50 by default. `lf_sampling: true` brings them back.
  What the file names is honoured, and announced where it truncates.
- **The critic** has an adapter and head of its own, started from the reward model.
  `critic: shared` is LLaMA-Factory's: a head on the policy's trunk.
- **Dropout** is off in stage ppo, `lora_dropout` too: log-probs are the policy's own.
- **A rollout** is sampled as one batch, not `per_device_train_batch_size` rows at a time; prompts
  that do not fill a batch are not dropped.
- **An over-long prompt** keeps its generation header. `lf_truncation: true` cuts as LLaMA-Factory
  does.
- **A token weighs the same** over the whole optimiser step, whatever its micro-batch; there each
  micro-batch is a mean of its own. `loss_agg_mode` has other ways.
- **A batch whose ratio ran away** (`ratio_threshold`) takes no step and is counted; there Adam's
  momentum steps all the same.
- **In stage ppo** `resume_from_checkpoint`, `val_size`, `eval_dataset`, `save_total_limit` and
  `disable_shuffling` act.
- **A warm-up begins above 0**, in both stages: its steps have 1/w, 2/w, ... 1 of the learning
  rate, where transformers' have 0, 1/w, ... and the first learns nothing. From the peak on the
  schedule is transformers'.
- **The last prompts of a run** are in a PPO step, rounded up.
- **A `horizon` shorter than a PPO step** acts as one step ([ppo.md](ppo.md)): beta never goes
  below 0.
- **One process on one device**, the first that is visible, where LLaMA-Factory takes all of them:
  `CUDA_VISIBLE_DEVICES` picks another. `torchrun`, `accelerate launch`, `mpirun` and `srun` with
  more than one process are refused, for training and for `fastppo-export`: every process would
  write the same folder. `--explain` and `--plan` write nothing and always answer.
- **Each PPO step** is a line on the terminal unless `logging_steps` is set, and always a row of
  `training_metrics.csv`.

Keys mean what they meant to transformers 4.52; that goes for `warmup_ratio`,
`overwrite_output_dir`, `logging_dir` and what else transformers 5 dropped.
"""


def status(name: str) -> tuple[str, str]:
    """honoured, accepted or refused, and what is to be said of it."""
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
    text = INTRODUCTION + "\n## Defaults that differ\n\n| key | there | here |\n|---|---|---|\n"
    for name, there, here in differing(sections):
        text += f"| `{name}` | {value(there)} | {value(here)} |\n"
    text += """
## Every key

*honoured*: it acts, in (rm) or (ppo) alone where that is said. *accepted*: a line of the run says
that it means nothing. *refused*: an error that says what to use, unless it has the value named.
"""
    return text + "".join(map(section_of_keys, sections.items())) + former_names()


def section_of_keys(found: tuple[str, dict[str, Any]]) -> str:
    """One table of LLaMA-Factory's keys."""
    section, keys = found
    text = f"\n### {section}\n\n| key | default there | here | |\n|---|---|---|---|\n"
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
