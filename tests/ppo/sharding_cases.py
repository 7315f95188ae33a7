"""What each process of tests/ppo/test_sharding.py runs: PPO steps with a base that is sharded."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fastppo.models.load import text_model
from fastppo.models.shared_layers import all_adapters
from fastppo.offload.activations import find_layers
from fastppo.ppo import evaluation, rollout, trainer, update
from fastppo.ppo.state import State, init_state
from fastppo.run.world import World
from tests.reliability import runs
from tests.tiny import make_config, stir

# A step has 6 responses, an optimiser step 3: so the processes differ in how many micro-batches,
# steps of decoding and groups of an evaluation they have.
STEP: dict[str, Any] = {
    "per_device_train_batch_size": 3,
    "ppo_buffer_size": 2,
    "ppo_epochs": 2,
    "max_new_tokens": 7,
    "max_steps": 3,
    "learning_rate": 1e-3,  # what Adam makes of a gradient's rounding is at most that
    "max_grad_norm": 0.5,
    "per_device_eval_batch_size": 1,
    "eval_max_samples": 3,
    "save_strategy": "no",
}
CASES: dict[str, dict[str, Any]] = {
    # Activations are recomputed, and a micro-batch is one row; reward and critic are adapters.
    "gae": {
        "reward_model_type": "lora",
        "disable_gradient_checkpointing": False,
        "ppo_micro_batch_size_per_gpu": 1,
        "critic_warmup": 1,
        "ptx_coef": 0.2,
    },
    # Activations are kept; the critic is a head, and the lowest layer has no adapter.
    "shared": {
        "critic": "shared",
        "kl_penalty": "full",
        "num_generations": 2,
        "lora_layers": 2,
        "padding_free": True,
        "generation_batch": 1,
    },
    # Reference and critic are models of their own, with other layers than the actor's.
    "models": {"ref_model": "other", "critic": "model", "critic_model": "other"},
}
LAYERS, OTHER_LAYERS = 3, 2


def make_state(world: World, folder: Path, name: str, **changes: Any) -> State:
    """A run with every adapter stirred, whose responses end at many tokens: of ragged lengths."""
    own = folder / f"{name}-{world.size}-{world.rank}-{len(changes)}"
    own.mkdir(parents=True, exist_ok=True)
    settings = {**STEP, **CASES[name], **changes}
    if settings.get("ptx_coef"):
        answers = [{"instruction": f"Say {i}.", "output": "aeiou " * i} for i in range(1, 4)]
        runs.write_once(own / "answers.json", answers)
        settings["ptx_dataset"] = str(own / "answers.json")
    for key, value in settings.items():
        if value == "other":
            settings[key] = str(folder / "other")
    if settings.get("reward_model_type") == "lora":
        settings["reward_model"] = str(folder / "reward")
    state = init_state(make_config(folder / "model", own, **settings), world=world)
    roles = state.roles
    stir(roles.trainable_parameters("actor"), 3)
    assert roles.critic_head is not None
    if not roles.shares_trunk:
        stir(roles.trainable_parameters("critic"), 4)
    stir(list(roles.critic_head.parameters()), 5, 1.0)
    state.template.stop_ids = (*state.template.stop_ids, *range(40, 70))
    return state


def models_of(state: State) -> list[torch.nn.Module]:
    """The models of all roles, each once."""
    places = state.roles.places.values()
    return list({id(place.model): place.model for place in places}.values())


def frozen_of_layers(state: State) -> list[torch.nn.Parameter]:
    """The models' own weights in their decoder layers, as they are at this moment."""
    found: list[torch.nn.Parameter] = []
    for model in models_of(state):
        adapters = {id(parameter) for parameter in all_adapters(model)}
        layers = find_layers(text_model(model))
        assert len(layers) in (LAYERS, OTHER_LAYERS)
        found += [p for p in layers.parameters() if id(p) not in adapters]
    return found


def steps_of_run(world: World, folder: Path, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Two steps and an evaluation; after each forward, backward and sampling, what is sharded."""
    state = make_state(world, folder, name, **changes)
    sharded: dict[str, list[bool]] = defaultdict(list)
    texts: list[list[str]] = []

    inners: list[tuple[Any, str, Any]] = []

    def look(owner: Any, function: str) -> None:
        inner = getattr(owner, function)
        inners.append((owner, function, inner))

        def run(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            sharded[function].append(all(isinstance(p, DTensor) for p in frozen_of_layers(state)))
            if function == "update":
                texts.append(args[1].scored.rollout.texts)
            return result

        setattr(owner, function, run)

    whole: list[bool] = []
    layer: Any = find_layers(text_model(state.roles.model))[0]
    # A hook that is made here runs within those of FSDP2, as the layer itself does.
    layer.input_layernorm.register_forward_pre_hook(
        lambda module, _: whole.append(not isinstance(module.weight, DTensor))
    )
    for owner, function in (
        (trainer, "sample"),
        (trainer, "score"),
        (update, "forward_backward"),
        (trainer, "update"),
        (rollout, "make_rollout"),
    ):
        look(owner, function)
    before = held_bytes(state)
    try:
        for _ in range(2):
            trainer.step_update(state)
        compared = evaluation.compare(state)
    finally:
        for owner, function, inner in inners:
            setattr(owner, function, inner)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    frozen = sum(p.nbytes for p in frozen_of_layers(state))
    return {
        "sharded": dict(sharded),
        "whole inside": all(whole),
        "bytes": (before, held_bytes(state)),
        # Of a DTensor nbytes is that of the whole weight.
        "layers and all": (
            frozen,
            sum(p.nbytes for model in models_of(state) for p in model.parameters()),
        ),
        "texts": texts,
        "parameters": [p.detach().clone() for p in parameters],
        "rows": [
            {k: v for k, v in row.items() if k not in runs.CLOCKS} for row in state.metrics.rows
        ],
        "before": vars(compared.before),
        "after": vars(compared.after),
        "notes": state.notes,
    }


def held_bytes(state: State) -> int:
    """Bytes of the storages of the model's weights in this process."""
    parameters: list[Any] = [p for model in models_of(state) for p in model.parameters()]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    storages = [x.untyped_storage() for x in local]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def runs_of(
    world: World, folder: Path, names: list[str], changes: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """These cases, with the same changes."""
    return {name: steps_of_run(world, folder, name, changes) for name in names}
