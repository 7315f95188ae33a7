"""One tiny Llama with a real tokenizer for all trainer tests; adapters far from 0."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastppo import toy
from fastppo.config import Config
from fastppo.config.rewards import reward_specs
from fastppo.models import build as roles
from fastppo.models.batch import Batch, Budget
from fastppo.ppo import trainer
from fastppo.ppo.advantage import KLController, RunningScore, estimate
from fastppo.ppo.score import score
from fastppo.rewards.function import FunctionReward
from fastppo.rewards.reward import Reward
from fastppo.run import plots, save
from fastppo.templates import Template, get_template
from fastppo.types import Experience, Prompt, Rollout
from tests.shared import BuiltOnce, unchanged


def preferences(count: int) -> list[dict[str, str]]:
    """Records of stage rm: answers of vowels are better than others."""
    return [
        {"instruction": f"Word {i}", "chosen": "aeiou " * (i % 3 + 1), "rejected": "xyz " * 3}
        for i in range(count)
    ]


def write_rm(folder: Path, model: Path, **changes: Any) -> None:
    """A user's folder for stage rm: `rm.yaml` and 12 pairs, of which 4 are held out."""
    settings = {
        "stage": "rm",
        "model_name_or_path": str(model),
        "dataset": "pairs.json",
        "val_size": 4,
        "template": "chatml",
        "output_dir": "out",
        "learning_rate": 1e-2,
        **changes,
    }
    (folder / "pairs.json").write_text(json.dumps(preferences(12)))
    (folder / "rm.yaml").write_text(yaml.safe_dump(settings))


PROMPTS = ["Hi", "What is rain?", "A line on tea, please.", "Tell me of the sea and of bread."]


@pytest.fixture(autouse=True)
def _curves(
    _nothing_is_left_behind: None,  # looks after monkeypatch has put things back
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Drawing a run's picture takes longer than the run: tests that are about it draw it."""
    killed = request.node.path.parent.name == "reliability"  # in the midst of drawing, too
    if request.node.get_closest_marker("pictures") is None and not killed:
        monkeypatch.setattr(plots, "draw_curves", lambda rows, path, title: path.write_bytes(b""))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    toy.write_model(folder)
    with unchanged(folder):
        yield folder


def stir(parameters: list[torch.nn.Parameter], seed: int, scale: float = 0.1) -> None:
    """Random weights: LoRA's B starts at 0, where every role says the same."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.fixture(scope="session")
def reward_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A reward model as stage rm writes it, with random weights."""
    folder = tmp_path_factory.mktemp("reward")
    config = make_config(model_dir, folder, reward_model_type="function", critic="adapter")
    made = roles.build(config, torch.device("cpu"))
    stir(made.trainable_parameters("actor"), 1)
    stir(list(made.critic_head.parameters()), 2, 1.0)
    save.save_model(made.model, made.critic_head, toy.byte_tokenizer(), folder)
    record = {"score_at": "eos", "template": "chatml", "fastppo": "test"}
    (folder / "fastppo_reward.json").write_text(json.dumps(record))
    with unchanged(folder):
        yield folder


def make_config(model_dir: Path, folder: Path, **changes: Any) -> Config:
    """A small PPO configuration whose files all lie below `folder`."""
    prompts = folder / "prompts.json"
    if not prompts.exists():
        prompts.write_text(json.dumps([{"instruction": text} for text in PROMPTS]))
    settings: dict[str, Any] = {
        "stage": "ppo",
        "model_name_or_path": str(model_dir),
        "reward_model": "fastppo.toy:vowels",
        "reward_model_type": "function",
        "dataset": str(prompts),
        "template": "chatml",
        "default_system": "",
        "output_dir": str(folder / "out"),
        "metrics_dir": str(folder / "metrics"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_new_tokens": 8,
        "max_steps": 2,
        "ppo_epochs": 2,
        "learning_rate": 1e-3,
        "disable_gradient_checkpointing": True,
        **changes,
    }
    return Config(**settings)


@pytest.fixture
def config(model_dir: Path, tmp_path: Path) -> Callable[..., Config]:
    return lambda **changes: make_config(model_dir, tmp_path, **changes)


@pytest.fixture(scope="session")
def built_once() -> BuiltOnce:
    return BuiltOnce()


@pytest.fixture
def build(built_once: BuiltOnce, tmp_path: Path) -> Callable[[Config, torch.device], roles.Roles]:
    return lambda config, device: built_once(config, device, tmp_path)


@pytest.fixture
def tiny_roles(
    config: Callable[..., Config], build: Callable[[Config, torch.device], roles.Roles]
) -> Callable[..., roles.Roles]:
    """Roles with every adapter stirred, so that no two of them say the same."""

    def make(stirred: bool = True, **changes: Any) -> roles.Roles:
        made = build(config(**changes), torch.device("cpu"))
        if stirred:
            stir(made.trainable_parameters("actor"), 3)
            if made.has_critic and not made.shares_trunk:
                stir(made.trainable_parameters("critic"), 4)
            if made.has_critic:
                stir(list(made.critic_head.parameters()), 5, 1.0)
        return made

    return make


@pytest.fixture
def state(
    config: Callable[..., Config],
    build: Callable[[Config, torch.device], roles.Roles],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., trainer.State]:
    monkeypatch.setattr("fastppo.ppo.state.build", build)
    return lambda **changes: trainer.init_state(config(**changes))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return toy.byte_tokenizer()


@pytest.fixture(scope="session")
def template(tokenizer: Any) -> Template:
    return get_template("chatml", tokenizer)


@pytest.fixture
def rollout(template: Template, tokenizer: Any) -> Rollout:
    """Four hand-made responses: an EOS alone, a truncated one, and two ordinary ones."""
    responses = [
        [template.eos_id],
        [70, 71, 72],
        [80, 81, 82, 83, template.eos_id],
        [90, template.eos_id],
    ]
    return make_rollout(PROMPTS, responses, template)


@pytest.fixture
def lay_out(template: Template) -> Callable[..., Rollout]:
    return lambda texts, responses: make_rollout(texts, responses, template)


@pytest.fixture
def vowels() -> Reward:
    """The share of vowels in a response."""
    name = "fastppo.toy:vowels"
    return Reward(reward_specs(name, "function", None), (FunctionReward(name),))


@pytest.fixture
def experience_of(vowels: Reward) -> Callable[..., Experience]:
    """What the update learns from, scored by the share of vowels."""

    def make(
        made: roles.Roles,
        rollout: Rollout,
        settings: Config,
        batch_size: int = 4,
        keep: int = 0,
        budget: Budget | None = None,
    ) -> Experience:
        scored = score(
            made,
            rollout,
            vowels(rollout),
            temperature=settings.temperature,
            budget=budget or Budget(rows=batch_size),
            exact_kl=settings.kl_penalty == "full",
            keep=keep,
        )
        return estimate(scored, settings, KLController(0.1, 6.0, 10000), RunningScore())

    return make


def make_rollout(texts: list[str], responses: list[list[int]], template: Template) -> Rollout:
    """Lay prompts and given response ids side by side, padded right."""
    prompts = [
        Prompt(
            template.encode_prompt([{"role": "user", "content": text}], ""),
            text,
            messages=[{"role": "user", "content": text}],
        )
        for text in texts
    ]
    rows = [prompt.ids + ids for prompt, ids in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    return Rollout(
        prompts=prompts,
        input_ids_BT=torch.tensor([row + [template.pad_id] * (width - len(row)) for row in rows]),
        prompt_lengths=[len(prompt.ids) for prompt in prompts],
        response_lengths=[len(ids) for ids in responses],
        terminated=[ids[-1] in template.stop_ids for ids in responses],
        sampler_logprob_N=torch.zeros(sum(map(len, responses))),
        texts=["x"] * len(texts),
    )


@pytest.fixture(scope="session")
def sft_dirs(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Two SFT adapters, the second with a norm and a head of its own (modules_to_save)."""
    folders = []
    for seed, extra in ((11, {}), (12, {"additional_target": "norm,lm_head"})):
        folder = tmp_path_factory.mktemp("sft")
        made = roles.build(make_config(model_dir, folder, **extra), torch.device("cpu"))
        own = made.trainable_parameters("actor")
        stir([p for p in own if p.dim() > 1 and min(p.shape) < 9], seed)
        with torch.no_grad():
            for parameter in own:
                parameter.mul_(1.1)
        save.save_model(made.model, made.critic_head, toy.byte_tokenizer(), folder)
        folders.append(str(folder))
    with unchanged(Path(folders[0])), unchanged(Path(folders[1])):
        yield folders


@pytest.fixture(scope="session")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A model of another width with the same tokenizer."""
    folder = tmp_path_factory.mktemp("other") / "model"
    toy.write_model(folder, seed=5, hidden_size=16)
    with unchanged(folder):
        yield str(folder)


def settings_of(name: str, sft: list[str], model: Path, other: str, reward: Path) -> dict[str, Any]:
    """Each combination that a user can ask for, by a name that a failing test can show."""
    lora_reward = {"reward_model_type": "lora", "reward_model": str(reward)}
    return {
        "lora": {},
        "lora shared": {"critic": "shared"},
        "lora reward": lora_reward,
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "lora norm,lm_head": {"additional_target": "norm,lm_head,embed_tokens"},
        "sft": {"adapter_name_or_path": sft[0]},
        "sft shared": {"adapter_name_or_path": sft[0], "critic": "shared"},
        "sft reward": {"adapter_name_or_path": sft[0], **lora_reward},
        "sft with modules_to_save": {"adapter_name_or_path": sft[1]},
        "sft merged": {"adapter_name_or_path": sft[1], "create_new_adapter": True},
        "sft two": {"adapter_name_or_path": ",".join(sft)},
        "sft two merged": {"adapter_name_or_path": ",".join(sft), "create_new_adapter": True},
        "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
        "freeze shared": {
            "finetuning_type": "freeze",
            "freeze_trainable_layers": -1,
            "freeze_extra_modules": "norm,lm_head",
            "critic": "shared",
        },
        "freeze model": {
            "finetuning_type": "freeze",
            "freeze_trainable_modules": "mlp",
            "critic": "model",
        },
        "full": {"finetuning_type": "full"},
        "full shared": {"finetuning_type": "full", "critic": "shared"},
        "full model": {"finetuning_type": "full", "critic": "model"},
        "critic full": {"critic": "model", "critic_finetuning_type": "full"},
        "critic full reward": {
            "critic": "model",
            "critic_finetuning_type": "full",
            **lora_reward,
        },
        "critic other": {"critic": "model", "critic_model": other},
        "ref_model": {"ref_model": str(model)},
        "full ref_model": {"finetuning_type": "full", "ref_model": str(model)},
        "lora grpo": {"advantage": "grpo", "num_generations": 2},
        "full rloo": {"advantage": "rloo", "num_generations": 2, "finetuning_type": "full"},
        "ref_model with sft": {
            "adapter_name_or_path": ",".join(sft),
            "ref_model": str(model),
            "ref_model_adapters": ",".join(sft),
        },
    }[name]


NAMES = [
    *("lora", "lora shared", "lora reward", "rslora", "dora", "lora norm,lm_head"),
    *("sft", "sft shared", "sft reward", "sft with modules_to_save", "sft merged"),
    *("sft two", "sft two merged", "freeze", "freeze shared", "freeze model", "full"),
    *("full shared", "full model", "critic full", "critic full reward", "critic other"),
    *("ref_model", "full ref_model", "ref_model with sft"),
]


def named(names: list[str], *fast: str, **more: Any) -> list[Any]:
    """Parameters for `made`, with settings of their own; all but `fast` are for the slow suite."""
    return [
        pytest.param(
            (name, more), id=name, marks=() if name in fast or not fast else pytest.mark.slow
        )
        for name in names
    ]


@pytest.fixture
def made(
    request: pytest.FixtureRequest,
    tiny_roles: Callable[..., roles.Roles],
    sft_dirs: list[str],
    model_dir: Path,
    other_dir: str,
    reward_dir: Path,
) -> roles.Roles:
    """Roles as they start, by the name and more settings in `.param`."""
    name, more = request.param
    chosen = settings_of(name, sft_dirs, model_dir, other_dir, reward_dir)
    return tiny_roles(stirred=False, **chosen, **more)


def hidden_as(made: roles.Roles, role: str, batch: Batch) -> torch.Tensor:
    """The last hidden states of a batch, as `role` has them."""
    with made.use(role), torch.no_grad():
        return made.hidden(batch.input_ids_BT, batch.mask_BT)
