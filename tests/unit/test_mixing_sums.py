"""Sums over ranks: what they certify, what they do not, and who is asked then. Pure numbers, no processes."""

from dataclasses import replace

import numpy as np
import pytest

from ddpcall.mixing.record import NOT_FINITE, PRESENT, Column, RankSketches
from ddpcall.mixing.sums import certify, pool

NUM_PARAMETERS = 100
_ROUNDING = {"float64": 1e-16, "float32": 3e-8, "bfloat16": 2e-3}


def make_records(
    matrix, num_parameters=NUM_PARAMETERS, dtype="float32", before=None, after=None, seed=0, own=None
):
    """Return the records of ranks whose gradients are mixed by a matrix, or by one a parameter."""
    rng = np.random.default_rng(seed)
    num_ranks = len(matrix[0]) if np.ndim(matrix) == 3 else len(matrix)
    matrices = np.broadcast_to(matrix, (num_parameters, num_ranks, num_ranks))
    if own is None:
        sizes = 10.0 ** rng.uniform(-4, 2, (num_parameters, 1))
        own = rng.standard_normal((num_ranks, num_parameters, 64)) * sizes
    used = np.einsum("pij,jpb->ipb", matrices, own)
    # Every rank rounds the same result alike.
    used *= 1 + _ROUNDING[dtype] * rng.standard_normal(used.shape[1:])
    parts = dict.fromkeys(
        ("own_parts", "own_sum", "own_unit", "used_parts", "weight_parts"), ((),) * num_parameters
    )
    return [
        RankSketches(
            rank,
            names=tuple(f"layer{index}" for index in range(num_parameters)),
            numel=(64,) * num_parameters,
            dtypes=(dtype,) * num_parameters,
            used=used[rank],
            used_digests=np.array([hash(row.tobytes()) for row in used[rank]]),
            states=(PRESENT,) * num_parameters,
            own=own[rank],
            columns=tuple(Column(index, 0) for index in range(num_parameters)),
            carry=np.zeros((num_parameters, 64)),
            before=np.full(num_parameters, 1 if before is None else before[rank]),
            after=np.full(num_parameters, 2 if after is None else after[rank]),
            steps_of=(1,) * num_parameters,
            num_steps=1,
            **parts,
        )
        for rank in range(num_ranks)
    ]


def add_up(records):
    """Return what the sums of all ranks say."""
    pooled = [each for record in records if (each := pool(record, len(records)))]
    assert len(pooled) == len(records)
    return certify(pooled[0], np.sum([each.to_sums() for each in pooled], axis=0), range(len(records)))


@pytest.mark.parametrize(
    ("num_ranks", "dtype"),
    [(2, "float32"), (3, "bfloat16"), (8, "bfloat16"), (8, "float64"), (64, "float32"), (200, "float32")],
)
@pytest.mark.parametrize(("factor", "shape"), [(1.0, "averaged"), (None, "summed"), (0.3, "scaled")])
def test_a_multiple_of_the_mean_is_certified(num_ranks, dtype, factor, shape):
    factor = num_ranks if factor is None else factor
    found = add_up(make_records(np.full((num_ranks, num_ranks), factor / num_ranks), dtype=dtype))
    assert (found.shape, found.num_ranks) == (shape, num_ranks)
    assert found.scale == pytest.approx(factor, rel=0.02)
    assert found.by_parameter == {shape: tuple(f"layer{index}" for index in range(NUM_PARAMETERS))}
    assert found.matrix.shape == ((num_ranks, num_ranks) if num_ranks <= 64 else (0, 0))


@pytest.mark.parametrize("num_ranks", [2, 3, 64])
@pytest.mark.parametrize("weights", ["first", "uneven", "without one"])
def test_one_parameter_among_many_that_is_not_the_mean_is_not_certified(num_ranks, weights):
    """It is as small as they come: ranks used the same of it, but not what all computed alike."""
    row = {
        "first": np.eye(num_ranks)[0],
        "uneven": np.arange(1, num_ranks + 1) / (num_ranks * (num_ranks + 1) / 2),
        "without one": (np.arange(num_ranks) > 0) / max(1, num_ranks - 1),
    }[weights]
    matrices = np.full((NUM_PARAMETERS, num_ranks, num_ranks), 1 / num_ranks)
    matrices[37] = row
    found = add_up(make_records(matrices))
    assert found.shape == "unidentifiable"
    assert "no multiple of the mean, of some of" in found.reason


def test_where_rounding_hides_a_parameter_nothing_is_certified():
    found = add_up(make_records(np.full((200, 200), 1 / 200), dtype="bfloat16"))
    assert found.shape == "unidentifiable"
    assert "too low a precision" in found.reason


def test_ranks_that_computed_the_same_certify_nothing():
    own = np.broadcast_to(
        np.random.default_rng(0).standard_normal((1, NUM_PARAMETERS, 64)), (4, NUM_PARAMETERS, 64)
    )
    found = add_up(make_records(np.full((4, 4), 0.25), own=own))
    assert found.shape == "unidentifiable"
    assert "computed the same gradient" in found.reason


def test_sums_travel_in_at_most_sixteen_groups_however_many_parameters_there_are():
    [first, _] = make_records(np.full((2, 2), 0.5), num_parameters=3000)
    pooled = pool(first, 2)
    assert pooled is not None
    assert len(pooled.own) <= 16
    assert pooled.to_sums().nbytes < 2_500


def test_shards_and_gradients_that_are_not_finite_are_not_added_up():
    [record, _] = make_records(np.full((2, 2), 0.5), num_parameters=3)
    assert pool(record, 2) is not None
    assert pool(replace(record, own_parts=((0, 1), (), ())), 2) is None
    assert pool(replace(record, states=(NOT_FINITE, *record.states[1:])), 2) is None
    assert pool(replace(record, num_steps=0), 2) is None
