"""A draw: right in distribution, a function of seed, row and position, and recorded as drawn."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastppo.ppo import sampling as sampling_module
from fastppo.ppo.sampling import (
    Draws,
    Sampling,
    Stops,
    StopStrings,
    inverse_cdf,
    splitmix64,
    uniforms,
)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_generator_gives_its_published_numbers():
    """The reference implementation's first outputs of the key 1234567."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(1234567, 5).tolist() == expected


def test_numbers_are_uniform_and_those_of_neighbours_independent():
    rows = np.stack([uniforms(7, row, 64) for row in range(256)])
    assert ((rows >= 0) & (rows < 1)).all()
    cells = np.histogram(rows, bins=16, range=(0, 1))[0]
    assert chi_square(cells, np.full(16, rows.size / 16)) < 37.7  # p = 0.001, 15 degrees
    other = np.stack([uniforms(8, row, 64) for row in range(256)])
    for a, b in ((rows[1:], rows[:-1]), (rows[:, 1:], rows[:, :-1]), (rows, other)):
        table = np.histogram2d(a.ravel(), b.ravel(), bins=8, range=((0, 1), (0, 1)))[0]
        assert chi_square(table, np.full((8, 8), a.size / 64)) < 103.4  # p = 0.001, 63 degrees


@pytest.mark.parametrize("block", [1, 2, 4, 256])  # of six tokens: whole blocks, and a rest
def test_tokens_come_as_often_as_the_distribution_says(block, monkeypatch):
    monkeypatch.setattr(sampling_module, "BLOCK", block)
    scores_V = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -1.0, 0.5])
    numbers = np.concatenate([uniforms(3, row, 100) for row in range(200)])
    tokens = inverse_cdf(scores_V.expand(len(numbers), -1), torch.from_numpy(numbers))
    counts = np.bincount(tokens.numpy(), minlength=6)
    expected = scores_V.double().softmax(0).numpy() * len(numbers)
    assert counts[2] == 0
    live = expected > 0
    assert chi_square(counts[live], expected[live]) < 18.5  # p = 0.001, 4 degrees


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-52])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_what_cannot_be_drawn_is_not_at_either_end(uniform, scale):
    torch.manual_seed(0)
    scores_BV = scale * torch.randn(64, 1000)
    scores_BV[:, :7] = scores_BV[:, -9:] = -torch.inf
    uniform_B = torch.full((64,), uniform, dtype=torch.float64)
    tokens = inverse_cdf(scores_BV, uniform_B)
    assert ((tokens >= 7) & (tokens < 991)).all()
    assert scores_BV.gather(1, tokens[:, None]).isfinite().all()


def test_a_number_finds_the_token_whose_share_it_is_in():
    """Over several blocks: against the cumulative sum of the whole row, in float64."""
    torch.manual_seed(0)
    scores_BV = 3 * torch.randn(200, 1000)
    uniform_B = torch.from_numpy(uniforms(1, 1, 200))
    cdf_BV = scores_BV.double().softmax(-1).cumsum(-1)
    token_B = inverse_cdf(scores_BV, uniform_B)
    below_B = (cdf_BV - scores_BV.double().softmax(-1)).gather(1, token_B[:, None]).squeeze(1)
    above_B = cdf_BV.gather(1, token_B[:, None]).squeeze(1)
    assert ((below_B - 1e-6 <= uniform_B) & (uniform_B <= above_B + 1e-6)).all()


@pytest.mark.parametrize("do_sample", [True, False])
def test_log_probs_are_of_the_distribution_that_is_drawn_from(do_sample):
    torch.manual_seed(0)
    scores_BV, ids_BT = torch.randn(3, 12), torch.tensor([[4, 4], [5, 4], [6, 6]])
    sampling = Sampling(8, do_sample=do_sample, temperature=0.5, top_k=5, repetition_penalty=1.3)
    draws = Draws(sampling, seed=1)
    token_B, logprob_B = draws.draw(ids_BT, scores_BV.clone(), [0, 1, 2], [0, 3, 7])
    for b in range(3):
        scores = scores_BV[b].clone()
        for token in set(ids_BT[b].tolist()):
            scores[token] = scores[token] / 1.3 if scores[token] > 0 else scores[token] * 1.3
        if do_sample:
            scores = scores / 0.5
            scores[scores < scores.sort().values[-5]] = -torch.inf
        assert scores.isfinite()[token_B[b]]
        torch.testing.assert_close(logprob_B[b], scores.log_softmax(0)[token_B[b]])
        if not do_sample:
            assert token_B[b] == scores.argmax()


def test_a_draw_depends_on_seed_row_and_position_and_on_nothing_beside_it():
    scores_BV = torch.zeros(4, 5000)
    draw = Draws(Sampling(8), seed=1).draw
    none = torch.empty(4, 0, dtype=torch.long)
    tokens, _ = draw(none, scores_BV, [0, 1, 2, 0], [0, 0, 5, 1])
    assert len(set(tokens.tolist())) == 4
    back, _ = draw(none, scores_BV, [0, 2, 1, 0], [1, 5, 0, 0])
    assert back.tolist() == [tokens[3], tokens[2], tokens[1], tokens[0]]
    part = Draws(Sampling(8), seed=1, first_row=2).draw(none[:1], scores_BV[:1], [0], [5])[0]
    assert part.tolist() == tokens[2:3].tolist()
    assert Draws(Sampling(8), seed=2).draw(none, scores_BV, [0, 1, 2, 0], [0, 0, 5, 1])[
        0
    ].tolist() != (tokens.tolist())


def test_stop_strings_are_found_over_tokens_and_only_at_the_end(tokenizer):
    search = StopStrings(tokenizer, ("abc", "q"))
    offset = tokenizer.encode("x", add_special_tokens=False)[0] - ord("x")
    rows = [[byte + offset for byte in text] for text in (b"xxabc", b"bc", b"abcx", b"q", b"ab")]
    assert search.found(rows) == [True, False, False, True, False]


def test_no_stop_token_is_drawn_before_min_new_tokens():
    template = SimpleNamespace(stop_ids=(2, 4), stop_strings=())
    stops = Stops(Sampling(8, min_new_tokens=3), template, None)
    scores_BV = torch.randn(2, 6)
    found_BV = stops.forbid(scores_BV, [2, 3])
    assert found_BV[0].isinf().tolist() == [False, False, True, False, True, False]
    assert torch.equal(found_BV[1], scores_BV[1])
    assert torch.equal(found_BV[0, [0, 1, 3, 5]], scores_BV[0, [0, 1, 3, 5]])
