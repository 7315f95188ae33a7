"""PTX: its gradient beside PPO's, its stream, its files."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch

from fastppo.errors import UserError
from fastppo.models.batch import shuffled_batch
from fastppo.ppo import checkpoint, trainer
from fastppo.ppo.optimizer import make_optimizer
from fastppo.ppo.ptx import Demonstrations, ptx_backward
from fastppo.ppo.update import update
from fastppo.run.preflight import check

RECORDS = [
    {"instruction": "Hi", "output": "Hello."},
    {"instruction": "What is rain?", "output": "Water."},
    {"instruction": "Bread?", "output": "Yes, please, with butter."},
]


@pytest.fixture
def ptx_file(tmp_path):
    path = tmp_path / "ptx.json"
    path.write_text(json.dumps(RECORDS))
    return str(path)


@pytest.fixture
def demonstrations(config, ptx_file, template):
    settings = config(ptx_coef=0.5, ptx_dataset=ptx_file, per_device_train_batch_size=2)
    return Demonstrations.of(check(settings).ptx, template, settings)


def flat_grad(made):
    return torch.cat([p.grad.flatten() for p in made.trainable_parameters("actor")])


def test_its_gradient_is_the_cross_entropy_of_the_answers_alone(
    tiny_roles, demonstrations, template
):
    made = tiny_roles()
    made.model.double()
    batch = next(demonstrations.stream(0, made.device))
    loss = ptx_backward(made, batch, 0.5)
    got = flat_grad(made)
    made.model.zero_grad(set_to_none=True)
    terms = []
    for number in batch_pairs(demonstrations, 0):
        prompt, answer = demonstrations.pairs[number]
        assert answer[-1] == template.eos_id
        with made.use("actor"):
            logits = made.base(input_ids=torch.tensor([prompt + answer])).logits[0]
        logprob = logits[len(prompt) - 1 : -1].log_softmax(-1)
        terms.append(logprob.gather(1, torch.tensor(answer)[:, None]))
    mean = -torch.cat(terms).mean()
    (0.5 * mean).backward()
    torch.testing.assert_close(loss, mean.detach(), atol=1e-10, rtol=0)
    torch.testing.assert_close(got, flat_grad(made), atol=1e-10, rtol=0)


def batch_pairs(demonstrations, number):
    n, size = len(demonstrations.pairs), demonstrations.batch_size
    return shuffled_batch(n, number, size, seed=demonstrations.seed)


def test_the_stream_takes_every_record_once_an_epoch_and_goes_on_where_it_was(demonstrations):
    seen = [i for number in range(3) for i in batch_pairs(demonstrations, number)]
    assert sorted(seen[:3]) == sorted(seen[3:]) == [0, 1, 2]
    straight = list(islice(demonstrations.stream(0, torch.device("cpu")), 4))
    resumed = list(islice(demonstrations.stream(2, torch.device("cpu")), 2))
    for a, b in zip(straight[2:], resumed, strict=True):
        assert torch.equal(a.input_ids_BT, b.input_ids_BT)


def test_ptx_is_added_to_every_optimiser_step(
    tiny_roles, config, rollout, experience_of, demonstrations
):
    """With advantages of 0 PPO itself teaches the actor nothing: what is left is PTX."""
    settings = config(
        ppo_epochs=3, ptx_coef=0.5, ptx_dataset="x.json", learning_rate=0.01, vf_coef=0.0
    )
    made = tiny_roles()
    experience = experience_of(made, rollout, settings)
    still = replace(experience, advantage_N=torch.zeros_like(experience.advantage_N))
    batches = demonstrations.stream(0, made.device)
    fixed = next(batches)
    before = ptx_backward(made, fixed, 0.0)
    stream = iter([fixed] * 4)
    optimizer = make_optimizer(settings, made)
    learned = update(made, still, settings, optimizer, seed=0, ptx=stream)
    assert len(list(stream)) == 1  # three were taken
    assert 0 < learned["ptx_loss"] < before
    assert ptx_backward(made, fixed, 0.0) < before


def test_a_run_with_ptx_logs_it_and_resumes_bit_for_bit(state, ptx_file, tmp_path):
    changes = {"ptx_coef": 0.5, "ptx_dataset": ptx_file, "max_steps": 2}
    runs = []
    for name in ("straight", "resumed"):
        run = state(metrics_dir=str(tmp_path / name), **changes)
        if name == "resumed":
            checkpoint.resume(run, tmp_path / "checkpoint-1")
        while run.step < 2:
            trainer.step_update(run)
            if run.step == 1:
                checkpoint.save_to_resume(run, tmp_path)
        runs.append(run)
    assert runs[0].metrics.rows[1]["ptx_loss"] == runs[1].metrics.rows[1]["ptx_loss"] > 0
    pairs = zip(
        checkpoint.trainable_parameters(runs[0]),
        checkpoint.trainable_parameters(runs[1]),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_second_step_takes_the_records_behind_those_of_the_first(state, ptx_file, monkeypatch):
    run = state(ptx_coef=0.5, ptx_dataset=ptx_file, ppo_epochs=3)
    firsts, stream = [], Demonstrations.stream

    def counted(self, first, device):
        firsts.append(first)
        return stream(self, first, device)

    monkeypatch.setattr(Demonstrations, "stream", counted)
    trainer.step_update(trainer.step_update(run))
    assert firsts == [0, 3]


def test_a_record_without_an_answer_is_refused_before_anything_runs(config, tmp_path):
    path = tmp_path / "ptx.json"
    path.write_text(json.dumps([RECORDS[0], {"instruction": "What?"}]))
    with pytest.raises(UserError, match=r"ptx\.json row 2: ptx_dataset learns from answers"):
        check(config(ptx_coef=0.5, ptx_dataset=str(path)))


def test_a_long_answer_is_cut_and_keeps_its_eos(config, ptx_file, template):
    settings = config(ptx_coef=0.5, ptx_dataset=ptx_file, cutoff_len=40)
    made = Demonstrations.of(check(settings).ptx, template, settings)
    assert all(len(prompt) + len(answer) <= 40 for prompt, answer in made.pairs)
    assert all(answer[-1] == template.eos_id for _, answer in made.pairs)
    assert max(len(prompt) + len(answer) for prompt, answer in made.pairs) == 40
