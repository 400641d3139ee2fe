"""A few random faults, the same in every run; `make soak` draws others by the thousand."""

import pytest

from tests.soak.cases import Soak, draw

SEED, CASES = 400, 16


@pytest.fixture(scope="module")
def soak():
    with Soak() as soak:
        yield soak


def test_random_faults_break_no_promise(soak):
    broken = {
        f"python -m tests.soak --seed {seed} --cases 1": soak.run(draw(seed)) for seed in range(SEED, SEED + CASES)
    }
    assert {command: promises for command, promises in broken.items() if promises} == {}


def test_a_case_is_drawn_from_its_seed_alone():
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
