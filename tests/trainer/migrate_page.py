"""docs/migrate-trl.md, made from the tables:  python -m tests.trainer.migrate_page > docs/migrate-trl.md"""

from __future__ import annotations

from typing import Any

from fastppo.config import Config
from fastppo.config.elsewhere import IGNORED
from fastppo.config.elsewhere import REFUSED as NOT_SUPPORTED
from fastppo.trainer.arguments import HERE, INHERITED, class_of
from fastppo.trainer.names import ARGUMENTS, COMPUTED, HARMLESS, REFUSED, RENAMED, SAME, TrlName

INTRODUCTION = '''# From TRL's PPOTrainer

TRL has had no PPO since September 2026. `fastppo.PPOTrainer` has the shape of the class that it had, and
`fastppo.PPOConfig` takes the names of TRL 0.9.6's and of 0.12 to 1.12's `PPOConfig`, with a line on what each became.
The loop, its files and its numbers are those of `fastppo-train`: one process on one device.

## Before

The script of TRL 0.12 to 1.12 (`examples/scripts/ppo/ppo.py`), shortened:

```python
from trl.experimental.ppo import PPOConfig, PPOTrainer

args = PPOConfig(
    output_dir="ppo", learning_rate=3e-6, num_ppo_epochs=1, num_mini_batches=1,
    per_device_train_batch_size=64, gradient_accumulation_steps=1, total_episodes=10000,
    missing_eos_penalty=1.0, stop_token="eos", kl_coef=0.05, response_length=53, temperature=0.7,
)
trainer = PPOTrainer(
    args=args, processing_class=tokenizer, model=policy, ref_model=ref_policy,
    reward_model=reward_model, value_model=value_model,
    train_dataset=train_dataset, eval_dataset=eval_dataset, peft_config=peft_config,
)
trainer.train()
trainer.save_model("ppo")
trainer.generate_completions()
```

## After

The import is another; the rest can stay as it is.

```python
from fastppo import PPOConfig, PPOTrainer
```

In the names used here, and with what is no longer needed left out:

```python
args = PPOConfig(
    output_dir="ppo", learning_rate=3e-6, ppo_epochs=1,
    per_device_train_batch_size=64, max_steps=157,
    missing_eos_penalty=1.0, init_kl_coef=0.05, adap_kl_ctrl=False,
    max_new_tokens=53, temperature=0.7,
)
trainer = PPOTrainer(
    args=args, processing_class=tokenizer, model=policy,  # the reference is the policy at the start
    reward_model=reward_model, value_model=value_model,
    train_dataset=train_dataset, eval_dataset=eval_dataset, peft_config=peft_config,
)
trainer.train()  # evaluates, and saves into output_dir
rows = trainer.generate_completions()
```

[examples/ppo_trainer.py](../examples/ppo_trainer.py) is a complete script with a reward function.

TRL 0.9.6 had no `train()`: its users wrote the loop of `generate` and `step`. Of such a script the settings
(`PPOConfig`), the model (`AutoModelForCausalLMWithValueHead`) and the data set (`query`, `input_ids`) stay; the code
between `generate` and `step` that computes rewards becomes a function:

```python
def reward(prompts, completions, **columns):
    return [output["score"] for output in sentiment_pipe(completions)]

trainer = PPOTrainer(model=model, args=config, processing_class=tokenizer,
                     train_dataset=dataset, reward_funcs=reward)
trainer.train()
```

For a loop of your own there is `init_state` and `step_update` ([README](../README.md#from-python)), and for
a loss of your own there are the operators ([ops.md](ops.md), [examples/custom_loop.py](../examples/custom_loop.py)).

## Arguments of PPOTrainer

| argument | what it takes |
|---|---|
| `model` | a causal language model, a PeftModel with the adapter `default`, TRL's `AutoModelForCausalLMWithValueHead`, a folder, a name. An object is trained in place |
| `args` | `fastppo.PPOConfig` |
| `reward_funcs` | one or several of: a function `f(prompts=, completions=, **columns)` that returns a number or None for each completion, `module:function`, what `reward_model` takes. `args.reward_weights` has a weight for each |
| `reward_model` | a sequence classifier of one label (it scores the policy's own tokens at the end of a response, so it needs the policy's tokenizer), a folder or name (which is read with its own tokenizer and chat template, [rewards.md](rewards.md)), a URL |
| `train_dataset`, `eval_dataset` | `datasets.Dataset` or a list of dictionaries with `input_ids`, `prompt` (text or messages) or `messages`; other columns go to reward functions |
| `processing_class` | the tokenizer; it is copied |
| `peft_config` | a `LoraConfig`; without one all weights train, or a PeftModel's adapter |
| `value_model` | a sequence classifier of one label or a causal language model, as object, folder or name, all of whose weights train. None: `args.critic`, by default an adapter and a head, which takes far less memory |
| `ref_model` | a causal language model, a folder, a name. None: the policy at the start, also of a PeftModel whose adapter is trained already (TRL: the base without it) |
| `callbacks` | transformers' callbacks: `on_train_begin`, `on_step_begin`, `on_step_end`, `on_log`, `on_evaluate`, `on_save`, `on_epoch_begin`, `on_epoch_end`, `on_train_end`. `should_training_stop`, `should_save`, `should_evaluate` and `should_log` are obeyed |
| `data_collator` | None or `DataCollatorWithPadding` |
| `optimizers` | `(None, None)`: `args.optim` and `args.lr_scheduler_type` make them, for the critic too |

A text in `prompt` is continued as it is, as in TRL. With `template` in `PPOConfig` it is a user's turn. Messages are
formatted by the tokenizer's own chat template, or by `template`. With messages in `prompt`, reward functions get
messages, as TRL's GRPOTrainer gives them; with `messages`, and with text, they get text.

A `LoraConfig` is read as keys; what has no key (`bias`, `rank_pattern`, `init_lora_weights`, ...) is refused, and a
PeftModel takes it. Everything that cannot be used raises `fastppo.errors.UserError`, one line with the cure.

## What is different

- **A PPO step** is one `global_step`; `save_steps`, `eval_steps` and `logging_steps` count PPO steps. `state.episode`
  counts responses.
- **The defaults** are those of [config.md](config.md), so that a class and a YAML file with the same settings make the same
  run. The tables below have both.
- **Responses end at EOS.** TRL decoded `response_length` tokens unless `stop_token` was set.
- **Gradients are clipped** to `max_grad_norm`, 1 by default; TRL 0.12 to 1.12 did not clip.
- **`num_mini_batches`** makes that many optimiser steps an epoch. In TRL's code there was one.
- **Tokens of an optimiser step have the same weight**; TRL averaged the means of its micro-batches.
- **The learning rate** of the critic is `critic_learning_rate`, by default the policy's.
- **At its end** `train()` evaluates the policy against the reference on `eval_dataset` (without one on
  `eval_max_samples` training prompts), and saves it into `output_dir`. Metrics go to `output_dir/ppo_metrics`.
- **`overwrite_output_dir=True`** is needed to write into a folder that is not empty.
- **A run can be resumed**: `train(resume_from_checkpoint=True)` continues it bit for bit.

## Value heads

Checkpoints of `AutoModelForCausalLMWithValueHead` (`v_head.summary` among a model's weights, or in `pytorch_model.bin`
beside an adapter) are read by name wherever a model with a head can stand:

| as | PPOTrainer | YAML |
|---|---|---|
| policy with its value head | `model="folder"`, `PPOConfig(critic="shared", value_head_init="model")` | `critic: shared`, `value_head_init: model` |
| critic | `value_model="folder"` | `critic: model`, `critic_model: folder` |
| reward | `reward_model="folder"` | `reward_model: folder`, `reward_model_type: full` (an adapter: `lora`) |

`trainer.save_value_model(folder)` writes the critic and its head in that layout.
'''
METRICS = """
## Metrics

| TRL 0.12 to 1.12 | TRL 0.9.6 | here ([metrics.md](metrics.md)) |
|---|---|---|
| `objective/scores` | `ppo/mean_scores` | `score`, `reward` |
| `objective/kl` | `objective/kl` | `kl` |
| | `objective/kl_coef` | `kl_coef` |
| `policy/entropy_avg` | `objective/entropy` | `entropy` |
| `policy/clipfrac_avg` | `ppo/policy/clipfrac` | `clipfrac` |
| `policy/approxkl_avg` | `ppo/policy/approxkl` | `approxkl` |
| `loss/policy_avg` | `ppo/loss/policy` | `policy_loss` |
| `loss/value_avg` | `ppo/loss/value` | `value_loss` |
| `val/clipfrac_avg` | `ppo/val/clipfrac` | `value_clipfrac` |
| `val/ratio` | `ppo/policy/ratio` | `ratio_mean` |
| `lr` | `ppo/learning_rate` | `learning_rate` |
| | `ppo/val/var_explained` | `explained_variance` |
| | `tokens/responses_len_mean` | `response_length` |
"""


def value(default: Any) -> str:
    """A default as the page has it."""
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[default] if default is None or isinstance(default, bool) else default}`"


def default_here(key: str) -> str:
    """The default of a key; empty for what is no key."""
    field = Config.model_fields.get(key)
    return "" if field is None else value(field.default)


def names() -> str:
    """The tables of TRL's names."""
    text = """
## TRL's names, one by one

Names that are the same here:

| name | TRL | default there | default here |
|---|---|---|---|
"""
    for name, (versions, default) in SAME.items():
        here = "`true`" if name == "gradient_checkpointing" else default_here(name)
        text += f"| `{name}` | {versions} | {value(default)} | {here} |\n"
    text += """
Names that became others:

| name | TRL | default there | here | default here | what differs |
|---|---|---|---|---|---|
"""
    for name, entry in {**RENAMED, **COMPUTED, **ARGUMENTS}.items():
        text += row(name, entry)
    text += """
Names that do nothing here:

| name | TRL | why |
|---|---|---|
"""
    for name, entry in HARMLESS.items():
        text += f"| `{name}` | {entry.versions} | {entry.here} |\n"
    text += """
Names that are refused unless they are empty:

| name | TRL | instead |
|---|---|---|
"""
    for name, entry in REFUSED.items():
        text += f"| `{name}` | {entry.versions} | {entry.here} |\n"
    return text


def row(name: str, entry: TrlName) -> str:
    """A row of the table of names that became others."""
    default = "" if entry.default is None else value(entry.default)
    return (
        f"| `{name}` | {entry.versions} | {default} | `{entry.here}` | "
        f"{default_here(entry.here)} | {entry.does} |\n"
    )


def training_arguments() -> str:
    """The tables of the fields of transformers' TrainingArguments."""
    by_class: dict[str, list[str]] = {"mapped": [], "harmless": [], "refused": []}
    for name in sorted(INHERITED):
        by_class[str(class_of(name))].append(name)
    mapped = ", ".join(f"`{name}`" for name in by_class["mapped"])
    text = f"""
## TrainingArguments, one by one

Used, with their meaning in transformers: {mapped}.

Refused, as they would change a run:

| field | instead |
|---|---|
"""
    for name in by_class["refused"]:
        text += f"| `{name}` | {NOT_SUPPORTED[name][1]} |\n"
    text += "\nWithout effect; a run says so where one is set:\n\n| field | why |\n|---|---|\n"
    for name in by_class["harmless"]:
        why = HERE[name][1] if name in HERE else IGNORED[name]
        text += f"| `{name}` | {why} |\n"
    return text


def page() -> str:
    """The whole page."""
    return INTRODUCTION + names() + training_arguments() + METRICS


if __name__ == "__main__":
    print(page(), end="")
