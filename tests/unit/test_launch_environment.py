"""The launcher's variables are read in one file, whichever launcher set them."""

import ast
import os
from pathlib import Path

import pytest

from ddpcall.launch_environment import (
    Place,
    has_agent_store,
    is_of_a_launch,
    read_address,
    read_attempt,
    read_torch_place,
    variables_of_rank,
)

SOURCE = Path(__file__).parents[2] / "src" / "ddpcall"
PREFIXES = ("TORCHELASTIC_", "SLURM_", "OMPI_", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# The first must run in every child before anything is imported; exercises are scripts as users write them.
MAY_SPELL = ("watch/program/on_children_path/sitecustomize.py", "teach/exercises", "launch_environment.py")


def find_launcher_variables(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in texts if text in NAMES or (text.startswith(PREFIXES) and " " not in text)]


def test_no_other_file_spells_a_launchers_variable():
    others = [path for path in SOURCE.rglob("*.py") if not str(path.relative_to(SOURCE)).startswith(MAY_SPELL)]
    assert {str(path): found for path in others if (found := find_launcher_variables(path))} == {}
    assert len(find_launcher_variables(SOURCE / "launch_environment.py")) > 15  # the search sees them


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in filter(is_of_a_launch, list(os.environ)):
        monkeypatch.delenv(name)


def test_without_a_launcher_there_is_no_place_no_attempt_and_no_store():
    assert read_torch_place() is None
    assert (read_attempt(), read_address(), has_agent_store()) == (0, ("", ""), False)


def test_what_a_rank_is_given_is_what_it_reads(monkeypatch):
    for name, value in variables_of_rank(1, 3, 29511).items():
        assert is_of_a_launch(name)
        monkeypatch.setenv(name, value)
    assert read_torch_place() == Place(1, 3, 1, 3)
    assert (read_address(), has_agent_store()) == (("127.0.0.1", "29511"), True)


def test_ranks_without_local_ranks_are_all_on_one_host(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert read_torch_place() == Place(1, 2, 1, 2)


@pytest.mark.parametrize(
    ("size", "told"), [(None, "WORLD_SIZE is not set"), ("two", "WORLD_SIZE='two' is no number")]
)
def test_half_a_launch_is_named(monkeypatch, size, told):
    monkeypatch.setenv("RANK", "0")
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ValueError, match=told):
        read_torch_place()


@pytest.mark.parametrize("name", ["HOME", "RANKS", "OMP_NUM_THREADS"])
def test_other_variables_are_of_no_launch(name):
    assert not is_of_a_launch(name)
