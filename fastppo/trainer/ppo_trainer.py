"""PPOTrainer: TRL's class over the loop of `fastppo-train`."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from fastppo.config import Config
from fastppo.data import encode_prompts
from fastppo.errors import Interrupted, UserError
from fastppo.ppo import checkpoint, evaluation, log, trainer
from fastppo.ppo.answers import answer
from fastppo.ppo.state import State, init_state
from fastppo.run import durable, hub
from fastppo.run.launch import check_one_process
from fastppo.run.preflight import check
from fastppo.run.save import save_with_value_head
from fastppo.run.stopping import Stop
from fastppo.run.tracking import Trackers
from fastppo.trainer.arguments import PPOConfig
from fastppo.trainer.callbacks import CallbackObserver, FlowCallback, PPOTrainerState
from fastppo.trainer.objects import TrlFunction
from fastppo.trainer.records import make_records
from fastppo.trainer.settings import (
    SOURCE,
    check_arguments,
    check_former,
    is_occupied,
    make_all_records,
    make_config,
)
from fastppo.types import Prompt


class PPOTrainer:
    """Trains a policy with PPO; the loop, its files and its numbers are those of `fastppo-train`.

    What cannot be used is an error of one line that names it; nothing is ignored silently.

    Args:
        model: the policy: a causal language model of transformers, a PeftModel, TRL's
            AutoModelForCausalLMWithValueHead, a folder or a hub name. An object trains in place.
        args: settings.
        reward_funcs: functions called as TRL's GRPOTrainer calls them, or models, folders, names,
            URLs and `module:function`; one or a list. `args.reward_weights` has a weight for each.
        reward_model: a further reward, after `reward_funcs`: a sequence classifier of one label
            that reads the policy's tokens, or what `reward_funcs` takes.
        train_dataset: rows with `prompt` (text or messages), `messages` or `input_ids`.
        eval_dataset: the same, for evaluation.
        processing_class: the tokenizer; None is the model's own.
        peft_config: a LoraConfig for the policy; None trains all of its weights, or the adapter of
            a PeftModel.
        value_model: the critic: a sequence classifier of one label, a causal language model (with
            a value head or without), a folder or a name; None is as `args.critic` says.
        ref_model: the reference; None is the policy at the start.
        data_collator: None or DataCollatorWithPadding: rows are padded as each pass needs it.
        callbacks: transformers' callbacks. A step is a PPO step.
        optimizers: (None, None): `args.optim` and `args.lr_scheduler_type` make them.

    Raises:
        UserError: an argument cannot be used, or two of them contradict each other.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        args: Any = None,
        reward_funcs: Any = None,
        reward_model: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        value_model: Any = None,
        ref_model: Any = None,
        data_collator: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        **former: Any,
    ) -> None:
        check_former(model, former)
        self.args: Any = PPOConfig() if args is None else args
        check_arguments(self.args, train_dataset, data_collator, optimizers, callbacks)
        check_one_process(SOURCE, "output_dir")
        config = make_config(
            self.args,
            model=model,
            reward_funcs=reward_funcs,
            reward_model=reward_model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            value_model=value_model,
            ref_model=ref_model,
        )
        self.records = make_all_records(config, train_dataset, eval_dataset)
        # A folder that is not empty may hold a run to resume: train() looks.
        check(config.model_copy(update={"overwrite_output_dir": True}), self.records)
        self._occupied = not config.overwrite_output_dir and is_occupied(config.output_dir)
        self._state = init_state(untracked(config), self.records)
        self._config = config
        stop_token_id: int | None = getattr(self.args, "stop_token_id", None)
        check_stop_token(stop_token_id, self._state)
        self._fitted = False
        make_handler: Any = CallbackHandler
        self.callback_handler: Any = make_handler(
            [FlowCallback(), *(callbacks or ())],
            self.model,
            self.processing_class,
            self._state.optimizer,
            self._state.scheduler,
        )
        self._observer = CallbackObserver(self.args, self.callback_handler)
        self._observer.sync(self._state)
        for function in config.objects.rewards.values():
            if isinstance(function, TrlFunction):
                function.trainer_state = self.state
        self._observer.call("on_init_end")

    @property
    def model(self) -> Any:
        """The policy: a PeftModel, or the model itself if all of its weights train."""
        return self._state.roles.model

    @property
    def processing_class(self) -> Any:
        """The tokenizer, as the template has changed it; it is a copy of the one that was given."""
        return self._state.tokenizer

    @property
    def state(self) -> PPOTrainerState:
        """Where training is: `global_step` (PPO steps), `log_history`, `best_metric`, ..."""
        return self._observer.state

    @property
    def control(self) -> Any:
        """What callbacks have asked for."""
        return self._observer.control

    @property
    def config(self) -> Config:
        """All settings of the run, by the names of docs/config.md."""
        return self._state.config

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Add a callback, or an instance of a class of them."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> Any:
        """Remove a callback and return it."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Remove a callback."""
        self.callback_handler.remove_callback(callback)

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> dict[str, Any]:
        """Train all remaining steps; evaluates, and saves the policy into `output_dir`, at the end.

        Args:
            resume_from_checkpoint: a folder checkpoint-N, or True for the newest complete one in
                `output_dir`.

        Returns:
            The metrics of the whole run, as in train_results.json.
        """
        if self._fitted and not resume_from_checkpoint:
            raise UserError(
                f"{SOURCE}: train: has run already; make a new trainer, or resume a checkpoint by "
                "resume_from_checkpoint="
            )
        if self._occupied and not resume_from_checkpoint:
            raise UserError(
                f"{SOURCE}: output_dir: {self.config.output_dir} is not empty; name another, set "
                "overwrite_output_dir=True, or resume the run in it by resume_from_checkpoint="
            )
        self._fitted = True
        resumed = resume_from_checkpoint
        wanted = resumed if isinstance(resumed, bool) or resumed is None else str(resumed)
        self._config = self._config.model_copy(update={"resume_from_checkpoint": wanted})
        start = folder, _ = durable.checkpoint_to_resume(self._config)
        self._state.config = self._state.config.model_copy(
            update={"resume_from_checkpoint": wanted, "report_to": self._config.report_to}
        )
        self._state.tracker = Trackers.of(self._state.config, folder)
        self._state.stop = Stop()
        try:
            trainer.fit(self._state, self.records, start, self._observer)
        except Interrupted as stop:
            if stop.signal == signal.SIGINT:
                raise KeyboardInterrupt(str(stop)) from None
            raise SystemExit(128 + stop.signal) from None
        hub.push(self._state.config)
        return log.train_metrics(self._state)

    def evaluate(self, eval_dataset: Any = None) -> dict[str, Any]:
        """Compare the policy with its reference; returns the metrics, `eval_reward` among them.

        Args:
            eval_dataset: other rows than the trainer's own.
        """
        state = self._state
        own = (state.eval_prompts, state.before, state.eval_is_held_out)
        if eval_dataset is not None:
            state.eval_prompts = self._encode(eval_dataset)[: state.config.eval_max_samples]
            state.before, state.eval_is_held_out = None, True
        try:
            evaluation.evaluate(state)
        finally:
            if eval_dataset is not None:
                state.eval_prompts, state.before, state.eval_is_held_out = own
        metrics = dict(state.evaluations[-1])
        metrics.pop("step", None)
        self._observer.sync(state)
        self._observer.call("on_evaluate", metrics=metrics)
        return metrics

    def generate_completions(self, dataset: Any = None) -> list[dict[str, Any]]:
        """Sample the policy once on each prompt: rows with prompt, completion and reward.

        Args:
            dataset: rows as in `train_dataset`; None is the evaluation's prompts.
        """
        state = self._state
        prompts = state.eval_prompts if dataset is None else self._encode(dataset)
        answers = answer(state, "actor", prompts)
        found = zip(prompts, answers.texts, answers.rewards, strict=True)
        return [{"prompt": p.text, "completion": text, "reward": r} for p, text, r in found]

    def step(self, *_: Any, **__: Any) -> None:
        """TRL 0.9.6's step on responses that were sampled elsewhere: refused, with the way here."""
        raise UserError(
            f"{SOURCE}: step: is TRL 0.9.6's; give reward_funcs and call train(), or write the "
            "loop with fastppo.init_state and fastppo.step_update"
        )

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Save the policy, its value head or critic, and the tokenizer, as the run's end does."""
        folder = Path(output_dir or self.config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save(self._state, folder)

    def push_to_hub(self, *_: Any, **__: Any) -> None:
        """Upload the policy in `output_dir` and its card to the hub, into `args.hub_model_id`.

        `train` does so at its end with `push_to_hub=True`; without a change nothing is sent anew.
        TRL's arguments (a commit message, tags of the card) are accepted and not used.
        """
        hub.upload(self.config)

    def save_value_model(self, output_dir: str | Path) -> None:
        """Save the critic's model and head as TRL's AutoModelForCausalLMWithValueHead is saved.

        With `critic: shared` that is the policy with its head.
        """
        roles = self._state.roles
        if roles.critic_head is None:
            raise UserError(
                f"{SOURCE}: save_value_model: advantage: {self.config.advantage} has no critic; "
                "use save_model"
            )
        place = roles.places["critic"]
        save_with_value_head(
            place.model,
            roles.critic_head,
            self.processing_class,
            Path(output_dir),
            place.adapter or "default",
        )

    def _encode(self, dataset: Any) -> list[Prompt]:
        """The prompts of further rows."""
        config, state = self._state.config, self._state
        rows = make_records(dataset, "dataset", state.tokenizer, config.template)
        room = (config.cutoff_len, config.default_system)
        return encode_prompts(rows, state.template, *room, lf_truncation=config.lf_truncation)


def untracked(config: Config) -> Config:
    """The configuration without trackers, which start with training."""
    return config.model_copy(update={"report_to": "none"})


def check_stop_token(token: int | None, state: State) -> None:
    """Refuse a `stop_token_id` that does not end a response here."""
    if token is not None and token not in state.template.stop_ids:
        raise UserError(
            f"{SOURCE}: stop_token_id: {token} is none of the tokens that end a response "
            f"({', '.join(map(str, state.template.stop_ids))}); make it the tokenizer's EOS "
            "(processing_class.eos_token), or use template"
        )
