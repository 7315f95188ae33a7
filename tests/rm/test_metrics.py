"""Accuracy, margin and calibration, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastppo.rm.metrics import calibration_error, pair_metrics


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_calibration_by_hand():
    # Four pairs given p = 0.75: three right of four is calibrated, all four right is off by 0.25.
    margin = logit(0.75)
    assert calibration_error(np.array([margin] * 3 + [-margin])) == pytest.approx(0.0)
    assert calibration_error(np.array([margin] * 4)) == pytest.approx(0.25)
    # Two bins: 4 pairs at 0.75 (gap 0.25), 6 at 0.93 of which half are right (gap 0.43).
    high = logit(0.93)
    mixed = np.array([margin] * 4 + [high, -high] * 3)
    assert calibration_error(mixed) == pytest.approx(0.4 * 0.25 + 0.6 * 0.43)


def test_a_tie_is_half_right_and_calibrated():
    assert calibration_error(np.zeros(5)) == 0.0


def test_confident_and_wrong_has_calibration_error_1():
    assert calibration_error(np.array([-1000.0, -800.0])) == pytest.approx(1.0)


def test_accuracy_counts_no_ties_and_margins_have_their_sign():
    found = pair_metrics(np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 5.0, -1.0]))
    assert found["accuracy"] == 0.5
    assert found["margin"] == pytest.approx((1 + 0 - 2 + 1) / 4)
    assert found["chosen_score"] == 1.5
    assert found["rejected_score"] == 1.5
