"""A torch that is missing or too old is told of in one sentence, wherever somebody comes in."""

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ddpcall
from ddpcall import cli
from ddpcall.torch_version import OLDEST, explain_torch, require_torch
from tests.versions import read_lower_bound

ROOT = Path(__file__).parents[2]
OLD = "torch 2.9.1+cu128 is installed, and ddpcall needs torch 2.11 or newer. Write: pip install 'torch>=2.11'"
MISSING = "torch is not installed, and ddpcall needs torch 2.11 or newer. Write: pip install 'torch>=2.11'"
TESTS = """
import pytest
{imports}

@pytest.mark.ranks(2)
def test_on_ranks(rank):
    pass
"""


@pytest.fixture
def old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")


@pytest.fixture
def old_environment(tmp_path):
    """The variables of a process in which another torch is installed than the one that would be imported."""
    metadata = tmp_path / "installed" / "torch-2.9.1.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1+cu128\n")
    return os.environ | {"PYTHONPATH": str(metadata.parent.parent)}


@pytest.mark.parametrize(
    ("version", "trouble"),
    [
        ("2.9.1+cu128", OLD),
        ("1.13", OLD.replace("2.9.1+cu128", "1.13")),
        ("2.11.0a0+git1234", ""),
        ("2.13.0+cpu", ""),
        ("10.0", ""),
        ("unknown", ""),
    ],
)
def test_the_version_is_judged_by_its_first_two_numbers(monkeypatch, version, trouble):
    monkeypatch.setattr(torch, "__version__", version)
    assert explain_torch() == trouble


def test_without_an_imported_torch_its_metadata_is_asked_and_then_torch_itself(monkeypatch):
    def import_module(name: str) -> SimpleNamespace:
        assert name == "torch"
        return SimpleNamespace(__version__="2.9.1+cu128")

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(importlib.metadata, "version", {"torch": "2.13.0"}.__getitem__)
    assert explain_torch() == ""
    monkeypatch.setattr(importlib.metadata, "version", _raise(importlib.metadata.PackageNotFoundError("torch")))
    monkeypatch.setattr(importlib, "import_module", import_module)
    assert explain_torch() == OLD
    monkeypatch.setattr(importlib, "import_module", _raise(ModuleNotFoundError("No module named 'torch'")))
    assert explain_torch() == MISSING


def _raise(error: BaseException):
    def function(*_: object) -> None:
        raise error

    return function


def test_the_lower_bound_is_the_one_of_the_package():
    assert tuple(map(int, read_lower_bound().split("."))) == OLDEST
    require_torch()


@pytest.mark.parametrize(
    "arguments", [["watch", "train.py"], ["watch", "-n", "2", "train.py"], ["claims"], ["lab"], ["train"]]
)
@pytest.mark.usefixtures("old_torch")
def test_a_command_says_so_and_exits_with_2(arguments, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(f": {OLD}\n")


@pytest.mark.parametrize("arguments", [["watch", "train.py"], ["train"]])
@pytest.mark.usefixtures("old_torch")
def test_other_ranks_wait_for_the_first_to_say_so(arguments, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("ddpcall.watch.launch.time.sleep", _raise(KeyboardInterrupt()))  # the launcher stops it
    with pytest.raises(KeyboardInterrupt):
        cli.main(arguments)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("old_torch")
def test_a_page_of_a_finding_needs_no_torch(capsys):
    cli.main(["explain", "DC101"])
    assert "DC101" in capsys.readouterr().out


@pytest.mark.usefixtures("old_torch")
def test_a_watch_in_code_raises_the_sentence(tmp_path):
    with pytest.raises(ImportError, match=re.escape(OLD)):
        ddpcall.watch(json=tmp_path / "findings.json")
    assert not list(tmp_path.iterdir())


def test_the_lab_says_so_from_a_checkout(old_environment):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py")], env=old_environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"ddpcall: {OLD}\n")


@pytest.mark.parametrize("imports", ["", "from ddpcall.pytest_plugin import assert_replicated"])
def test_pytest_says_so_where_tests_need_ranks_and_only_there(tmp_path, old_environment, imports):
    (tmp_path / "test_ordinary.py").write_text("def test_ordinary(): pass\n")
    (tmp_path / "test_ranks.py").write_text(TESTS.format(imports=imports))
    for name, code in (("test_ranks.py", (2, 4)), ("test_ordinary.py", (0,))):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", name],
            cwd=tmp_path,
            env=old_environment,
            capture_output=True,
            text=True,
        )
        said = done.stdout + done.stderr
        assert done.returncode in code, said
        assert (OLD in said) == (name == "test_ranks.py")
        assert "Traceback" not in said
