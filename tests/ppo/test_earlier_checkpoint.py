"""A checkpoint that an earlier version wrote is resumed, and its run goes on as it did there.

tests/fixtures/earlier_checkpoint has `checkpoint-2` of a run of the tiny model, and the
training_metrics.csv that the same earlier version wrote when it resumed from there up to step 4.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from fastppo.ppo import rollout, trainer
from fastppo.ppo.row_batches import generation_config_of, left_pad, truncate_at_stop
from fastppo.run import durable
from fastppo.run.preflight import check
from fastppo.seeds import seed_of

EARLIER = Path(__file__).resolve().parents[1] / "fixtures" / "earlier_checkpoint"


def rows_in(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file, without its clocks."""
    with path.open(encoding="utf-8") as file:
        return [
            {name: float(cell) for name, cell in row.items() if "second" not in name}
            for row in csv.DictReader(file)
        ]


class EarlierSampler:
    """How that version drew: by torch.multinomial in transformers' generate, all rows together."""

    def __init__(self, roles, draws, stops, **_):
        self.roles, self.draws, self.stops = roles, draws, stops
        self.columns = []

    def record(self, ids_BT, scores_BV):
        self.columns.append(scores_BV.log_softmax(-1))
        return scores_BV

    def run(self, prompts):
        ids, mask = left_pad(prompts, 0, self.roles.device)
        settings = GenerationConfig(
            max_new_tokens=self.draws.sampling.max_new_tokens,
            do_sample=True,
            top_k=0,
            eos_token_id=list(self.stops.ids),
            pad_token_id=0,
        )
        with torch.random.fork_rng(devices=[]), generation_config_of(self.roles.base, settings):
            torch.manual_seed(seed_of(self.draws.seed, "group", 0))
            tokens = self.roles.base.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList([self.record]),
            )[:, ids.shape[1] :]
        scores = torch.stack(self.columns, 1).gather(2, tokens[:, :, None]).squeeze(2)
        return truncate_at_stop(tokens, scores, self.stops.ids)


def test_a_checkpoint_of_an_earlier_version_goes_on_as_it_did_there(
    config, tmp_path, capsys, monkeypatch
):
    """With its draws, the step after it has the same rollout, losses and gradients, to rounding."""
    monkeypatch.setattr(rollout, "Sampler", EarlierSampler)
    shutil.copytree(EARLIER / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    assert durable.checkpoint_fault(tmp_path / "out" / "checkpoint-2") is None
    settings = config(lora_rank=4, max_steps=4, save_steps=2, resume_from_checkpoint=True)
    trainer.run(settings, check(settings))
    assert "resumes after step 2" in capsys.readouterr().out
    expected = rows_in(EARLIER / "training_metrics.csv")
    found = rows_in(tmp_path / "metrics" / "training_metrics.csv")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert found[:2] == expected[:2]  # they are in the checkpoint
    for row, earlier in zip(found[2:], expected[2:], strict=True):
        assert row == pytest.approx(earlier, rel=1e-4, abs=1e-5)


def test_a_checkpoint_of_an_earlier_version_goes_on_with_the_draws_of_this_one(config, tmp_path):
    shutil.copytree(EARLIER / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    settings = config(lora_rank=4, max_steps=4, save_steps=2, resume_from_checkpoint=True)
    trainer.run(settings, check(settings))
    found = rows_in(tmp_path / "metrics" / "training_metrics.csv")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert found[:2] == rows_in(EARLIER / "training_metrics.csv")[:2]
    assert all(abs(row["sampler_gap"]) < 1e-5 for row in found[2:])
