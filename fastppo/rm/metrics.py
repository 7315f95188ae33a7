"""How well the scores identify the better answer of a pair: accuracy, margin, calibration."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BINS = 10

Scores = NDArray[np.floating]


def calibration_error(margin_N: Scores, bins: int = BINS) -> float:
    r"""Expected calibration error of sigmoid(margin), in [0, 1].

        p = sigmoid(|margin|), the probability that the answer with the higher score is the better
        ECE = sum_b n_b / N * |accuracy_b - mean p_b|,   bins b of equal width over [0.5, 1]

    It is 0 if, among the pairs with probability p, the share p is right. A tie (p = 0.5) counts as
    half right.

    Args:
        margin_N: (N,), chosen score minus rejected score, N >= 1.
        bins: number of bins.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, equation 3.
    """
    margin_N = np.asarray(margin_N, dtype=np.float64)
    confidence_N = 1.0 / (1.0 + np.exp(-np.abs(margin_N)))
    right_N = np.where(margin_N == 0, 0.5, margin_N > 0)
    bin_N = np.minimum(((confidence_N - 0.5) * 2 * bins).astype(int), bins - 1)
    gap = 0.0
    for b in range(bins):
        inside_N = bin_N == b
        if inside_N.any():
            distance = abs(right_N[inside_N].mean() - confidence_N[inside_N].mean())
            gap += inside_N.mean() * distance
    return float(gap)


def pair_metrics(chosen_N: Scores, rejected_N: Scores) -> dict[str, float]:
    """Accuracy (share of chosen scores that are higher), margins, and their calibration."""
    margin_N = np.asarray(chosen_N, dtype=np.float64) - np.asarray(rejected_N, dtype=np.float64)
    return {
        "accuracy": float((margin_N > 0).mean()),
        "margin": float(margin_N.mean()),
        "margin_std": float(margin_N.std()),
        "calibration_error": calibration_error(margin_N),
        "chosen_score": float(np.mean(chosen_N)),
        "rejected_score": float(np.mean(rejected_N)),
    }
