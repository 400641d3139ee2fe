"""The shapes by their numbers alone: no false verdict on synthetic gradients, the right name for each matrix."""

import numpy as np
import pytest

from ddpcall.mixing.judge import judge_records
from ddpcall.mixing.record import PRESENT, Column, RankSketches
from ddpcall.mixing.shapes import SHAPES, Batch, find_eta, find_groups, fit, judge, solve

BUCKETS = 64
WRONG_FOR = {
    "averaged": set(SHAPES) - {"averaged", "unidentifiable"},
    # Ranks that use local gradients do use different ones: said where they are too like to say more.
    "local": set(SHAPES) - {"local", "different", "unidentifiable"},
}


def make_own(rng, num_trials, num_ranks, likeness=0.3, ratio=1.0, backwards=1):
    """Return own gradients: a common part and a private one; the last rank's are `ratio` times as large."""
    common = rng.standard_normal((num_trials, 1, backwards, BUCKETS))
    private = rng.standard_normal((num_trials, num_ranks, backwards, BUCKETS))
    own = np.sqrt(likeness) * common + np.sqrt(1 - likeness) * private
    own[:, -1] *= ratio
    return own


def add_rounding(rng, used, own, eta):
    """Add what a reduction of these gradients is off by."""
    size = np.linalg.norm(own, axis=-1).mean(axis=(1, 2), keepdims=True) * eta / np.sqrt(BUCKETS)
    noise = rng.standard_normal(used.shape)
    return used + size * noise


def make_batch(used, own, dtype="float32", numel=4096, **options):
    count = len(used)
    eta = np.full(count, find_eta(dtype, own.shape[1]))
    return Batch(used, own, eta, np.full(count, numel), **options)


def mix(own, matrix):
    """Return what the ranks use; matrix: (ranks, ranks)."""
    return np.einsum("ij,tjkb->tib", matrix, own)


TRIALS = {2: 12_000, 4: 8_000, 16: 4_000, 64: 800, 256: 150, 1024: 50}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["averaged", "local"])
@pytest.mark.parametrize("num_ranks", list(TRIALS))
def test_no_false_verdict_on_synthetic_gradients(num_ranks, kind, dtype):
    """100,000 trials over all cases: 2 to 1,024 ranks, gradients unlike to almost the same, and of unlike size."""
    rng = np.random.default_rng(num_ranks)
    matrix = np.full((num_ranks, num_ranks), 1 / num_ranks) if kind == "averaged" else np.eye(num_ranks)
    settings = [(0.0, 1), (0.3, 1), (0.9, 1), (0.9999, 1), (0.3, 100), (0.3, 1e4)]
    for likeness, ratio in settings:
        own = make_own(rng, TRIALS[num_ranks] // len(settings), num_ranks, likeness, ratio)
        exact = mix(own, matrix)
        eta = find_eta(dtype, num_ranks)
        # All ranks get one reduction's result; without any, a gradient is what it was.
        used = add_rounding(rng, exact[:, :1], own, eta).repeat(num_ranks, 1) if kind == "averaged" else exact
        shapes = [verdict.shape for verdict in judge(make_batch(used, own, dtype))]
        assert not WRONG_FOR[kind] & set(shapes), (likeness, ratio, {s: shapes.count(s) for s in set(shapes)})
        if likeness < 0.9 and ratio == 1:
            assert set(shapes) == {kind}


@pytest.mark.parametrize("numel", [1, 2, 7])
def test_a_few_elements_accuse_nobody(numel):
    rng = np.random.default_rng(0)
    own = np.zeros((5000, 2, 1, BUCKETS))
    own[..., :numel] = rng.standard_normal((5000, 2, 1, numel))
    for used in (mix(own, np.full((2, 2), 0.5)), mix(own, np.eye(2))):
        assert {verdict.shape for verdict in judge(make_batch(used, own, numel=numel))} == {"unidentifiable"}


def blocks(*sizes):
    matrix = np.zeros((sum(sizes), sum(sizes)))
    first = 0
    for size in sizes:
        matrix[first : first + size, first : first + size] = 1 / size
        first += size
    return matrix


MATRICES = {
    "averaged": np.full((4, 4), 0.25),
    "summed": np.ones((4, 4)),
    "scaled": np.full((4, 4), 0.25) * 0.37,
    "local": np.eye(4),
    "groups": blocks(2, 2),
    "dropped": np.array([[0.25, 0.25, 0, 0.25]] * 4),
    "weighted": np.array([[0.1, 0.2, 0.3, 0.4]] * 4),
    "different": (np.eye(4) + np.roll(np.eye(4), 1, 1)) / 2,
    "thrown_away": np.zeros((4, 4)),
}


@pytest.mark.parametrize("shape", list(MATRICES))
def test_each_matrix_has_its_name(shape):
    rng = np.random.default_rng(1)
    own = make_own(rng, 50, 4)
    assert [verdict.shape for verdict in judge(make_batch(mix(own, MATRICES[shape]), own))] == [shape] * 50


@pytest.mark.parametrize("sizes", [(1, 3), (2, 2, 2, 2), (5, 3), (4, 4, 4, 4, 4, 4, 4, 4)], ids=str)
def test_groups_of_any_sizes(sizes):
    rng = np.random.default_rng(2)
    own = make_own(rng, 5, sum(sizes))
    for verdict in judge(make_batch(mix(own, blocks(*sizes)), own)):
        assert verdict.shape == "groups"
        assert tuple(map(len, verdict.groups)) == sizes


def test_equal_gradients_that_are_no_mixture_are_transformed():
    rng = np.random.default_rng(3)
    own = make_own(rng, 20, 4)
    used = np.sign(mix(own, MATRICES["averaged"]))
    assert {verdict.shape for verdict in judge(make_batch(used, own))} == {"transformed"}
    assert {verdict.shape for verdict in judge(make_batch(np.sign(mix(own, np.eye(4))), own))} == {"different"}


def test_too_few_numbers_for_a_solve_are_no_transformation():
    rng = np.random.default_rng(4)
    own = make_own(rng, 5, 64)
    used = mix(own, np.array([rng.random(64)] * 64) / 64)
    [verdict] = {v.shape: v for v in judge(make_batch(used, own))}.values()
    assert verdict.shape == "unidentifiable"
    assert "too few numbers" in verdict.reason


def test_a_last_backward_that_is_not_used_is_late_and_one_only_looked_at_is_not():
    rng = np.random.default_rng(5)
    own = make_own(rng, 10, 4, backwards=3)
    used = own[:, :, :2].sum(axis=2).mean(axis=1, keepdims=True).repeat(4, 1)
    assert {verdict.shape for verdict in judge(make_batch(used, own))} == {"late"}
    looked_at = judge(make_batch(used, own, captured=frozenset([2])))
    assert {verdict.shape for verdict in looked_at} == {"averaged"}


def test_what_the_step_before_computed_is_late():
    rng = np.random.default_rng(6)
    own, earlier = make_own(rng, 10, 4), make_own(rng, 10, 4)
    used = earlier[:, :, 0].mean(axis=1, keepdims=True).repeat(4, 1)
    assert {v.shape for v in judge(make_batch(used, own, earlier=earlier))} == {"late"}
    assert {v.shape for v in judge(make_batch(used, own))} == {"transformed"}


def test_what_lay_in_the_gradient_before_is_no_transformation():
    rng = np.random.default_rng(7)
    own = make_own(rng, 10, 4)
    carry = rng.standard_normal((10, 1, BUCKETS)).repeat(4, 1)
    used = mix(own, MATRICES["averaged"]) + 0.9 * carry
    assert {v.shape for v in judge(make_batch(used, own, carry=carry))} == {"averaged"}


def test_the_same_gradient_everywhere_tells_nothing():
    rng = np.random.default_rng(8)
    own = make_own(rng, 10, 4, likeness=1.0)
    for verdict in judge(make_batch(own[:, :, 0], own)):
        assert verdict.shape == "unidentifiable"
        assert "its own batch" in verdict.reason


def test_gradients_that_nearly_cancel_are_still_averaged():
    rng = np.random.default_rng(9)
    own = make_own(rng, 100, 2, likeness=0)
    own[:, 1] = -own[:, 0] + 1e-4 * own[:, 1]
    used = add_rounding(rng, mix(own, np.full((2, 2), 0.5))[:, :1], own, 3e-7).repeat(2, 1)
    assert {v.shape for v in judge(make_batch(used, own))} <= {"averaged", "scaled"}


def test_standard_errors_of_the_solve_are_right():
    """An entry is off by its standard error, in the mean: checked at two sizes and two precisions."""
    rng = np.random.default_rng(10)
    for num_ranks, eta in ((8, 3e-7), (16, 5e-3)):
        off = []
        for _ in range(40):
            columns = rng.standard_normal((num_ranks, 4 * num_ranks))
            used = columns.mean(axis=0)
            used = used + eta * np.linalg.norm(used) / np.sqrt(len(used)) * rng.standard_normal(used.shape)
            matrix, errors, _ = solve(columns, used[None], eta)
            off += ((matrix - 1 / num_ranks) / errors).ravel().tolist()
        assert 0.8 < np.std(off) < 1.25


def test_a_zero_column_has_no_entry():
    rng = np.random.default_rng(11)
    columns = rng.standard_normal((3, 32))
    columns[1] = 0
    matrix, _, residual = solve(columns, columns[:1], 3e-7)
    np.testing.assert_allclose(matrix, [[1, np.nan, 0]], atol=1e-12)
    assert residual[0] < 1e-12


def test_groups_are_found_by_equal_rows():
    rows = np.random.default_rng(12).standard_normal((2, 8))
    assert find_groups(rows[[0, 1, 0, 1, 0]]) == ((0, 2, 4), (1, 3))


def test_a_fit_of_parallel_vectors_leaves_nothing_of_what_they_span():
    basis = np.array([[[1.0, 0, 0, 0], [1.0, 0, 0, 0]]])
    coefficients, rest = fit(basis, np.array([[2.0, 0, 3.0, 0]]))
    np.testing.assert_allclose(coefficients, [[1, 1]])
    np.testing.assert_allclose(rest, [[0, 0, 3, 0]], atol=1e-12)


@pytest.mark.parametrize(
    ("size", "shape"), [(1e-42, "unidentifiable"), (1e-40, "unidentifiable"), (1e-30, "averaged")]
)
def test_gradients_below_the_smallest_normal_numbers_are_no_evidence(size, shape):
    """A mean of numbers that have three digits left is off by far more than a reduction's rounding."""
    rng = np.random.default_rng(0)
    own = (rng.standard_normal((2, BUCKETS)) * size).astype(np.float32)
    used = own[0] / np.float32(2) + own[1] / np.float32(2)
    records = [
        RankSketches(
            rank=rank,
            names=("weight",),
            numel=(256,),
            dtypes=("float32",),
            used=used[None].astype(float),
            states=(PRESENT,),
            own=own[rank, None].astype(float),
            columns=(Column(0, 0),),
            carry=np.zeros((1, BUCKETS)),
            before=np.zeros(1, np.int64),
            after=np.zeros(1, np.int64),
            own_parts=((),),
            own_sum=((),),
            own_unit=((),),
            used_parts=((),),
            weight_parts=((),),
            steps_of=(1,),
            num_steps=1,
        )
        for rank in range(2)
    ]
    assert judge_records(records).shape == shape
