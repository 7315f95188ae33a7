"""The model card: README.md in output_dir, what this is and how it came to be."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fastppo import __version__
from fastppo.models.adapters import adapters_to_merge
from fastppo.run.preflight import looks_local

if TYPE_CHECKING:
    from fastppo.config import Config

NAME = "README.md"
KINDS = {
    "rm": "A reward model, trained from pairs of a better and a worse answer",
    "ppo": "A policy, trained by proximal policy optimisation (PPO) against a reward",
}
TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ kind }}, on top of `{{ config.model_name_or_path }}` by
fastppo {{ version }}.

- stage: `{{ config.stage }}`, finetuning type: `{{ config.finetuning_type }}`
- data: {{ data }}
- template: {{ config.template or "the tokenizer's own" }}
{%- if rewards %}
- reward: {{ rewards }}
{%- endif %}
- steps: {{ steps }}, learning rate {{ config.learning_rate }}, seed {{ config.seed }}

## Use

```python
{{ use }}
```

## Results

{% if metrics -%}
On {{ held_out }}.

| metric | value |
|---|---|
{%- for key, value in metrics.items() %}
| {{ key }} | {{ value }} |
{%- endfor %}
{%- else -%}
Nothing was held out, so there are none.
{%- endif %}

## Licence

{{ licence }}

## Versions

{{ versions }}
"""
ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}"){below}
model = PeftModel.from_pretrained(base, "{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""
BELOW = """
base = PeftModel.from_pretrained(base, "{folder}").merge_and_unload()"""
WHOLE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""
SCORES = """
# The scores are value_head.safetensors on the last hidden state, at the {place}.
# A sequence classifier of plain transformers: fastppo-export {folder} EXPORT_DIR"""


def licence_of(name: str) -> str | None:
    """The licence that a local base model's card names, or None."""
    try:
        card = ModelCard.load(Path(name) / NAME, ignore_metadata_errors=True)
        licence: str | None = card.data.license
    except (OSError, ValueError, AttributeError):
        return None
    return licence


def results(config: Config, metrics: Mapping[str, Any]) -> list[EvalResult] | None:
    """The evaluation in the form of the hub's model index, or None without metrics."""
    found = {key: value for key, value in metrics.items() if isinstance(value, float)}
    data = config.eval_dataset or config.dataset
    return [
        EvalResult(
            task_type="text-classification" if config.stage == "rm" else "text-generation",
            dataset_type=data,
            dataset_name=data,
            metric_type=key,
            metric_value=value,
        )
        for key, value in found.items()
    ] or None


def write(
    folder: Path,
    config: Config,
    *,
    steps: int,
    metrics: Mapping[str, Any],
    held_out: str,
    place: str | None = None,
) -> None:
    """README.md in `folder`; `metrics` are of `held_out`, and `place` is where scores are read."""
    base, adapter = config.model_name_or_path, config.finetuning_type == "lora"
    name = folder.resolve().name
    licence = licence_of(base)
    local = looks_local(base)
    data = ModelCardData(
        model_name=name,
        # The hub knows no base that lies on somebody's disk.
        base_model=None if local else base,
        base_model_relation=None if local else ("adapter" if adapter else "finetune"),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation" if config.stage == "ppo" else "text-classification",
        tags=[
            "fastppo",
            "ppo" if config.stage == "ppo" else "reward-model",
            config.finetuning_type,
        ],
        license=licence,
        eval_results=results(config, metrics),
    )
    packages = ("torch", "transformers", "peft")
    versions = [f"- {package} {importlib.metadata.version(package)}" for package in packages]
    use = (ADAPTER if adapter else WHOLE) + (SCORES if place else "")
    below = "".join(BELOW.format(folder=merged) for merged in adapters_to_merge(config))
    whose = f"is under `{licence}`" if licence else "has a licence of its own"
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in metrics.items()}
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=name,
        kind=KINDS[config.stage],
        config=config,
        version=__version__,
        data=f"`{config.dataset}`"
        + (f", evaluated on `{config.eval_dataset}`" if config.eval_dataset else ""),
        rewards=", ".join(f"`{spec.name}` ({spec.kind})" for spec in config.rewards),
        steps=steps,
        use=use.format(base=base, below=below, folder=folder, place=place),
        metrics=shown,
        held_out=held_out,
        licence=f"The base model {whose}, and so has the data: both apply to these weights. "
        "No other licence was chosen here.",
        versions="\n".join([f"- fastppo {__version__}", *versions]),
    )
    card.save(folder / NAME)


def for_repository(text: str, folder: Path, name: str) -> str:
    """The card `text` of `folder` for the repository `name` on the hub: its code loads from there.

    fastppo-export reads folders, so its line downloads the repository first.
    """
    export = f"fastppo-export {folder} "
    downloaded = f"hf download {name} --local-dir FOLDER && fastppo-export FOLDER "
    return text.replace(f'"{folder}")', f'"{name}")').replace(export, downloaded)
