"""Tests on ranks beside plugins that draw at random: every rank draws the same."""

import importlib.util
import subprocess
import sys

import pytest

RANDOM = """
import random
import pytest, torch, torch.distributed as dist

@pytest.mark.ranks(2)
def test_drawn(rank):
    drawn = torch.tensor([random.random()], dtype=torch.float64)
    total = drawn.clone()
    dist.all_reduce(total)
    assert total == 2 * drawn

@pytest.mark.ranks(2)
def test_fails_on_one(rank):
    assert rank.rank == 0
"""
EXAMPLES = """
import pytest, torch, torch.distributed as dist
from hypothesis import given, settings, strategies

@pytest.mark.ranks(2)
@settings(max_examples=5, deadline=None, database=None)
@given(number=strategies.integers(0, 10**6))
def test_drawn(rank, number):
    total = torch.tensor([number])
    dist.all_reduce(total)
    assert total == 2 * number

@pytest.mark.ranks(2)
def test_fails_on_one(rank):
    assert rank.rank == 0
"""


@pytest.mark.parametrize(("module", "source"), [("pytest_randomly", RANDOM), ("hypothesis", EXAMPLES)])
def test_ranks_draw_the_same_beside(module, source, tmp_path):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    (tmp_path / "test_drawn.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_drawn.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "test_fails_on_one - [rank 1]" in done.stdout
