"""PPOTrainer: the numbers of the command, learning, data sets, files, resuming."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from fastppo.errors import UserError
from fastppo.ppo import trainer as loop
from fastppo.ppo.columns import COLUMNS
from fastppo.run.preflight import check
from fastppo.toy import vowels
from tests.tiny import PROMPTS, make_config
from tests.trainer.conftest import lora, turns

CLOCKS = {name for name, words in COLUMNS.items() if words.endswith("(a clock)")}


def rows_of(folder):
    with (folder / "training_metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(file)]


@pytest.mark.parametrize("tuning", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_the_same_run_by_yaml_and_by_class_has_the_same_numbers(
    trainer, model_dir, tmp_path, tuning
):
    keys = {"max_steps": 2, "eval_max_samples": 2, "finetuning_type": tuning, "critic": "shared"}
    (tmp_path / "yaml").mkdir()
    settings = make_config(model_dir, tmp_path / "yaml", **keys)
    loop.run(settings, check(settings))
    peft_config = lora() if tuning == "lora" else None
    trainer({"critic": "shared"}, peft_config=peft_config).train()
    by_yaml = rows_of(tmp_path / "yaml" / "metrics")
    assert len(by_yaml) == 2
    assert rows_of(tmp_path / "out" / "ppo_metrics") == by_yaml
    names = ["reward_before", "reward_after", "kl", "win_rate"]
    summaries = [
        json.loads((folder / "summary.json").read_text())
        for folder in (tmp_path / "yaml" / "metrics", tmp_path / "out" / "ppo_metrics")
    ]
    assert [summaries[0][n] for n in names] == [summaries[1][n] for n in names]


@pytest.mark.slow  # ten steps of 32 prompts
def test_it_learns_and_the_given_model_is_what_trains(trainer, model):
    """A random model writes ASCII in half of its characters, from step to step within 0.03.

    In 30 steps that rises by 0.15 to 0.30, as the seed and rounding have it.
    """

    def letters(completions, **_):
        return [sum(c.isascii() for c in text) / max(len(text), 1) for text in completions]

    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = {
        "critic": "shared",
        "max_steps": 30,
        "per_device_train_batch_size": 32,
        "init_kl_coef": 0.01,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "ppo_epochs": 4,
    }
    made = trainer(args, reward_funcs=letters)
    made.train()
    scores = [entry["score"] for entry in made.state.log_history if "score" in entry]
    assert len(scores) == 30
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.1
    assert made.model.get_base_model() is model
    after = {name.replace(".base_layer", ""): x for name, x in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", ["text", "messages", "input_ids", "dataset"])
def test_data_sets_by_their_columns(trainer, kind):
    made = None
    if kind == "text":
        rows = [{"prompt": text, "extra": i} for i, text in enumerate(PROMPTS)]
        made = trainer({"template": None, "default_system": None}, train_dataset=rows)
        # As in TRL a text is continued: its own tokens, and no turn around it.
        assert made._state.prompts[0].ids == made.processing_class(PROMPTS[0])["input_ids"]
        made = trainer(train_dataset=rows)
        wanted = made._state.template.encode_prompt([{"role": "user", "content": PROMPTS[0]}], "")
        assert made._state.prompts[0].ids == wanted
    elif kind == "input_ids":
        rows = [
            {"input_ids": [0, 0, 5 + i, 6, 7], "attention_mask": [0, 0, 1, 1, 1]} for i in range(4)
        ]
        made = trainer(train_dataset=rows)
        assert [prompt.ids for prompt in made._state.prompts] == [[5 + i, 6, 7] for i in range(4)]
        assert made._state.prompts[0].text == made.processing_class.decode([5, 6, 7])
    else:
        rows = [{"prompt": row["messages"], "id": i} for i, row in enumerate(turns())]
        made = trainer(train_dataset=Dataset.from_list(rows) if kind == "dataset" else rows)
        assert [prompt.text for prompt in made._state.prompts] == PROMPTS
        assert [prompt.columns["id"] for prompt in made._state.prompts] == [0, 1, 2, 3]


def test_reward_functions_are_called_as_trl_calls_them(trainer):
    seen = []

    def reward(prompts, completions, id, trainer_state):
        seen.append((prompts, completions, id, trainer_state.global_step))
        return [1.0] * len(completions)

    def lengths(completions, completion_ids, **columns):
        assert "prompt" not in columns
        return [None if i else float(len(ids)) for i, ids in enumerate(completion_ids)]

    rows = [{"prompt": row["messages"], "id": i} for i, row in enumerate(turns())]
    made = trainer(
        {"reward_weights": [2.0, 0.5]}, reward_funcs=[reward, lengths], train_dataset=rows
    )
    made._state = loop.step_update(made._state)
    (prompts, completions, numbers, step) = seen[0]
    assert sorted(numbers) == [0, 1, 2, 3]
    assert prompts == [rows[i]["prompt"] for i in numbers]
    assert all(len(c) == 1 and c[0]["role"] == "assistant" for c in completions)
    assert step == 0
    row = made._state.metrics.rows[0]
    first = row["reward/lengths"]  # the mean of the one response that it applies to
    assert row["score"] == pytest.approx((4 * 2.0 + 0.5 * first) / 4)


def test_files_methods_and_resuming(trainer, tmp_path, model_dir):
    made = trainer({"max_steps": 3, "save_steps": 2})
    metrics = made.train()
    assert metrics["train_samples"] == 12
    out = tmp_path / "out"
    assert (out / "adapter_model.safetensors").is_file()
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    found = made.evaluate()
    assert found["eval_reward"] == made._state.evaluations[-1]["eval_reward"]
    other = made.evaluate(turns(["Hi"]))
    assert other["eval_samples"] == 1
    (row,) = made.generate_completions(turns(["Hi"]))
    assert row["reward"] == vowels(["Hi"], [row["completion"]])[0]
    made.save_model(tmp_path / "copy")
    assert (tmp_path / "copy" / "adapter_config.json").is_file()
    with pytest.raises(UserError, match="has run already"):
        made.train()
    rows = rows_of(out / "ppo_metrics")
    again = trainer(
        {"max_steps": 3, "save_steps": 2},
        model=AutoModelForCausalLM.from_pretrained(model_dir),
    )
    with pytest.raises(UserError, match=r"output_dir: .* is not empty"):
        again.train()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert rows_of(out / "ppo_metrics") == rows


@pytest.mark.parametrize(
    ("changes", "args", "line"),
    [
        ({"train_dataset": None}, {}, "train_dataset: is missing"),
        ({"train_dataset": []}, {}, "train_dataset: has no rows"),
        ({"train_dataset": "imdb"}, {}, "train_dataset: is text; give a datasets.Dataset"),
        ({"train_dataset": {"a": turns()}}, {}, "is several sets by name"),
        ({"train_dataset": [{"text": "x"}]}, {}, "has columns text; it needs prompt"),
        ({"train_dataset": [{"input_ids": "x"}]}, {}, "input_ids is no list of token ids"),
        ({"data_collator": print}, {}, "data_collator: .* is not used"),
        ({"optimizers": (object(), None)}, {}, "optimizers: are made by args.optim"),
        ({"callbacks": [print]}, {}, "is no transformers.TrainerCallback"),
        ({"reward_funcs": None}, {}, "there is no reward"),
        ({"reward_funcs": 3}, {}, "reward_funcs: is a int"),
        ({"model": 3}, {}, "model: is a int"),
        ({"model": None}, {}, "model: is missing"),
        ({"peft_config": 3}, {}, "peft_config: is a int"),
        ({"peft_config": lora(bias="all")}, {}, "peft_config: bias: all is not supported"),
        ({"processing_class": 3}, {}, "processing_class: is a int"),
        ({}, {"stop_token_id": 99}, "stop_token_id: 99 is none of the tokens"),
        ({"value_model": "same"}, {}, "value_model: is another role's model too"),
        ({"ref_model": "same"}, {}, "ref_model: is the model that trains"),
        ({}, {"max_new_tokens": -1}, "max_new_tokens: -1 is wrong"),
        ({"tokenizer": None}, {}, "tokenizer: .* here that is processing_class"),
        ({"num_shared_layers": 2}, {}, "num_shared_layers: is a former name of TRL's; leave it"),
    ],
)
def test_what_cannot_be_used_is_one_line_that_names_it(trainer, model, changes, args, line):
    changes = {name: model if value == "same" else value for name, value in changes.items()}
    with pytest.raises(UserError, match=line):
        trainer(args, **changes)


def test_args_of_another_class_are_refused(model):
    from transformers import TrainingArguments

    from fastppo import PPOTrainer

    with pytest.raises(UserError, match=r"give a fastppo\.PPOConfig"):
        PPOTrainer(model=model, args=TrainingArguments("out", use_cpu=True), train_dataset=turns())
