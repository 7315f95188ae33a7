"""transformers' callbacks: which events come, and that the loop does what they ask for."""

from __future__ import annotations

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

EVENTS = [
    *("on_init_end", "on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end"),
    *("on_step_begin", "on_step_end", "on_log", "on_evaluate", "on_save"),
]


class Recorder(TrainerCallback):
    """Writes down every event, the step, and the keys that come with it."""

    def __init__(self, **asks):
        self.events, self.asks, self.logs, self.seen = [], asks, [], {}

    def record(self, event, args, state, control, **how):
        self.events.append((event, state.global_step))
        self.seen = how
        if event == "on_log":
            self.logs.append(how["logs"])
        for name, (at, step, value) in self.asks.items():
            if (at, step) == (event, state.global_step):
                setattr(control, name, value)

    def at(self, event):
        return [step for name, step in self.events if name == event]


for event in EVENTS:
    setattr(
        Recorder,
        event,
        lambda self, *three, _event=event, **how: self.record(_event, *three, **how),
    )


def test_events_come_in_order_and_a_step_is_a_ppo_step(trainer):
    recorder = Recorder()
    made = trainer(
        {"max_steps": 3, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
        callbacks=[recorder],
    )
    made.train()
    assert recorder.at("on_step_begin") == [0, 1, 2]
    assert recorder.at("on_step_end") == [1, 2, 3]
    assert recorder.at("on_epoch_begin") == [0, 1, 2]  # 4 prompts, 4 a step
    assert recorder.at("on_epoch_end") == [1, 2, 3]
    assert recorder.at("on_save") == [2]
    assert recorder.at("on_evaluate") == [2, 3], "the last step is evaluated once"
    assert [recorder.events[i][0] for i in (0, 1, -1)] == [
        "on_init_end",
        "on_train_begin",
        "on_train_end",
    ]
    steps = [entry["step"] for entry in recorder.logs if "score" in entry]
    assert steps == [1, 2, 3]
    assert made.state.global_step == made.state.max_steps == 3
    assert made.state.episode == 12
    assert recorder.seen["model"] is made.model
    assert recorder.seen["optimizer"] is made._state.optimizer
    assert [entry["step"] for entry in made.state.log_history] == [1, 2, 2, 3, 3]


@pytest.mark.parametrize("event", ["on_step_end", pytest.param("on_log", marks=pytest.mark.slow)])
def test_a_callback_that_stops_training_is_obeyed(trainer, tmp_path, event):
    recorder = Recorder(should_training_stop=(event, 2, True))
    made = trainer({"max_steps": 9}, callbacks=[recorder])
    made.train()
    assert made.state.global_step == 2
    assert recorder.at("on_evaluate") == [2]
    assert (tmp_path / "out" / "adapter_config.json").is_file(), "what was trained is saved"


def test_callbacks_ask_for_checkpoints_evaluations_and_logs_and_forbid_them(trainer, tmp_path):
    asks = Recorder(
        should_save=("on_step_end", 1, True),
        should_evaluate=("on_step_end", 1, True),
        should_log=("on_step_end", 2, False),
    )
    made = trainer({"max_steps": 3}, callbacks=[asks])
    made.train()
    assert asks.at("on_save") == [1]
    assert asks.at("on_evaluate") == [1, 3]
    assert [entry["step"] for entry in asks.logs if "score" in entry] == [1, 3]
    assert (tmp_path / "out" / "checkpoint-1" / "manifest.json").is_file()


def test_a_callback_saves_after_an_evaluation_that_it_likes(trainer):
    asks = Recorder(should_save=("on_evaluate", 1, True))
    made = trainer({"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}, callbacks=[asks])
    made.train()
    assert asks.at("on_save") == [1]


def test_early_stopping_counts_evaluations_without_a_better_metric(trainer):
    """A constant reward never gets better: the first evaluation is the best, two more follow."""
    made = trainer(
        {
            "max_steps": 9,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "metric_for_best_model": "reward",
        },
        reward_funcs=lambda completions, **_: [1.0] * len(completions),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    made.train()
    assert made.state.global_step == 3
    assert (made.state.best_metric, made.state.best_global_step) == (1.0, 1)


def test_callbacks_are_added_popped_and_removed(trainer):
    made = trainer()
    made.add_callback(Recorder)
    found = made.pop_callback(Recorder)
    assert isinstance(found, Recorder)
    made.add_callback(found)
    made.remove_callback(found)
    assert made.pop_callback(Recorder) is None
    made.remove_callback(DefaultFlowCallback)  # then nothing is due by itself
    recorder = Recorder()
    made.add_callback(recorder)
    made.train()
    assert [entry for entry in recorder.logs if "score" in entry] == []
