"""Replicas apart by rounding, or by what they were trained with: the border, on measured tensors."""

import torch

from ddpcall.watch.compare.drift import Drift, largest, measure, read_drift, sketch_tensor


def drift_of(start, first, second):
    origin = sketch_tensor(start, "w")
    return read_drift({0: measure(first, "w", origin), 1: measure(second, "w", origin)})


def take_steps(weights, rate, share, dtype=torch.float32):
    """Two ranks train five steps; their gradients differ by a share of themselves, and each step rounds."""
    generator = torch.Generator().manual_seed(0)
    ranks = [weights.to(dtype), weights.to(dtype)]
    for _ in range(5):
        gradient = torch.randn(weights.shape, generator=generator)
        own = torch.randn(weights.shape, generator=generator) * share
        ranks = [ranks[0] - (rate * gradient).to(dtype), ranks[1] - (rate * (gradient + own)).to(dtype)]
    return drift_of(weights.to(dtype), *ranks)


WEIGHTS = torch.linspace(-1, 1, 4096)


def test_another_order_of_sums_is_rounding():
    assert take_steps(WEIGHTS, 1e-2, 1e-6).is_rounding(5)
    assert take_steps(WEIGHTS, 1e-5, 1e-6).is_rounding(5)


def test_other_gradients_are_none_however_small_the_rate():
    for rate, dtype in (
        (1e-2, torch.float32),
        (1e-7, torch.float32),
        (1e-2, torch.bfloat16),
        (1e-3, torch.bfloat16),
    ):
        assert not take_steps(WEIGHTS, rate, 0.3, dtype).is_rounding(5)
    assert take_steps(WEIGHTS, 1e-7, 0.3).is_small(5)
    assert not take_steps(WEIGHTS, 1e-2, 0.3).is_small(5)


def test_what_was_added_and_taken_back_is_rounding():
    other = (WEIGHTS + 0.3) - 0.3 + 1e-3
    assert drift_of(WEIGHTS, WEIGHTS + 1e-3, other).is_rounding(1)


def test_a_value_that_is_not_a_number_on_one_rank_is_no_rounding():
    assert not drift_of(WEIGHTS, WEIGHTS + 1, WEIGHTS * float("nan")).is_rounding(1)


def test_whole_numbers_are_measured_too():
    ones = torch.ones(8, dtype=torch.uint8)
    assert not drift_of(ones, ones, 2 * ones).is_rounding(1)


def test_what_no_rank_measured_differently_is_nowhere_apart():
    assert read_drift({}).is_rounding(1)
    assert largest([]) == 0
    assert largest([Drift(1e-3, 10.0, 1.0, 1e-7)]) == 1e-4
