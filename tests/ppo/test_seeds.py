"""Runs with neighbouring seeds share nothing that is drawn."""

from __future__ import annotations

from itertools import product

import torch

from fastppo.ppo import ptx, sampling, trainer, update
from fastppo.ppo.evaluation import evaluate
from fastppo.ppo.state import prompt_order
from fastppo.seeds import seed_of

PURPOSES = ("step", "prompt order", "mini-batches", "evaluation", "ptx", "group", "pass")


def test_no_two_places_of_a_large_grid_share_a_seed():
    grid = list(product(range(100), PURPOSES, range(300)))
    seeds = {seed_of(seed, purpose, step) for seed, purpose, step in grid}
    assert len(seeds) == len(grid) == 210_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    # nor do lists of steps that read alike when they are put together
    assert seed_of(1, "a", 23) != seed_of(12, "a", 3) != seed_of(1, "a", 2, 3)


def orders_of(run: trainer.State, seed: int, epochs: int) -> list[tuple[str, ...]]:
    """The order of the prompts in each of a run's first epochs."""
    run.config = run.config.model_copy(update={"seed": seed})
    run.prompt_order = prompt_order(run.config, len(run.prompts))
    size = len(run.prompts) // run.config.prompts_a_step
    orders = []
    for epoch in range(epochs):
        order: list[str] = []
        for run.step in range(epoch * size, (epoch + 1) * size):
            order += [prompt.text for prompt in trainer.next_prompts(run)]
        orders.append(tuple(order))
    return orders


def test_no_epoch_of_a_hundred_neighbouring_runs_has_the_order_of_another(state):
    """Of 24 prompts: by chance two of 500 orders agree once in 10**18 such tests."""
    run = state()
    run.prompts = [
        type(prompt)(prompt.ids, f"{prompt.text} {i}") for i in range(6) for prompt in run.prompts
    ]
    orders = [order for seed in range(1, 101) for order in orders_of(run, seed, 5)]
    assert len(set(orders)) == len(orders) == 500
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(orders[0]))}


def seeds_drawn_with(run: trainer.State, monkeypatch) -> list[tuple[str, int]]:
    """What two steps with PTX and an evaluation seed generators with, by who asks."""
    seeds: list[tuple[str, int]] = []

    def noting(owner, name, keyword, at):
        inner = getattr(owner, name)

        def noted(*args, **kwargs):
            seeds.append((name, kwargs[keyword] if keyword in kwargs else args[at]))
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    noting(sampling, "splitmix64", "key", 0)
    noting(update, "mini_batches", "seed", 2)
    noting(ptx, "shuffled_batch", "seed", None)
    for _ in range(2):
        trainer.step_update(run)
    evaluate(run)
    monkeypatch.undo()
    return seeds


def test_no_generator_of_a_run_is_one_of_the_next_run(state, tmp_path, monkeypatch):
    """Sampling in groups, mini-batches over epochs, evaluation in batches, PTX."""
    answers = tmp_path / "answers.json"
    answers.write_text('[{"instruction": "Say.", "output": "aeiou"}]')
    changes = {
        "generation_batch": 2,
        "per_device_eval_batch_size": 2,
        "ptx_dataset": str(answers),
        "ptx_coef": 0.1,
        "overwrite_output_dir": True,
        "max_new_tokens": 2,
    }
    runs = [set(seeds_drawn_with(state(seed=seed, **changes), monkeypatch)) for seed in (1, 2)]
    together = set().union(*runs)
    assert len(together) == sum(map(len, runs))
    # Nor do two purposes of one run draw the same numbers.
    assert len({seed for _, seed in together}) == len(together)


def test_different_seeds_give_different_random_numbers():
    """PyTorch's CPU generator reads 32 bits of a seed: those of a hash are enough."""
    first = {
        tuple(torch.randperm(24, generator=torch.Generator().manual_seed(seed_of(s, "x"))).tolist())
        for s in range(2000)
    }
    assert len(first) == 2000
