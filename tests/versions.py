"""Tries ddpcall with every torch it supports, and writes the table of docs/versions.md.

`python -m tests.versions` makes fresh environments with the oldest supported torch, the one of constraints.txt
and the newest that the index offers, and with the one of constraints.txt on Python 3.12 and 3.13 where they are
found. In each it runs the watch, the pytest plugin, the claims and an experiment. `--environment DIR` tries
environments that exist instead; they stay as they are. Rows of other versions stay in the table. The exit code is
1 where anything failed.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- versions -->\n", "<!-- end versions -->"
PASSED = "passed"
LIMIT_S = 600
OTHER_PYTHONS = ("python3.12", "python3.13")
ASK = (
    "import json, platform, torch; print(json.dumps([torch.__version__.split('+')[0], platform.python_version()]))"
)

TRAINING = """
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
model = DistributedDataParallel(nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    loss = {call}(torch.randn(8, 4)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
dist.destroy_process_group()
"""
TESTS = """
import pytest, torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from ddpcall.pytest_plugin import assert_gradients_synchronized


@pytest.mark.ranks(2)
def test_ranks_reduce(rank):
    values = torch.tensor([float(rank.rank)])
    dist.all_reduce(values)
    assert values.item() == 1


@pytest.mark.ranks(2)
def test_a_bypass_is_caught(rank):
    ddp = DistributedDataParallel(nn.Linear(4, 2))
    batch = torch.randn(8, 4) + rank.rank
    ddp.module(batch).sum().backward()
    with pytest.raises(AssertionError, match="gradients differ"):
        assert_gradients_synchronized(ddp)
"""


@dataclass(frozen=True)
class Row:
    """What was measured with one torch on one Python: what each check said, and the day."""

    torch: str
    python: str
    cells: tuple[str, ...]
    measured: str

    @property
    def key(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rows of one torch and one Python's minor version take each other's place."""
        return numbers_of(self.torch), numbers_of(self.python)[:2]


@dataclass(frozen=True)
class Wanted:
    """An environment to make: an interpreter and a version of torch."""

    python: str
    torch: str


class Environment:
    """An interpreter with torch, and a directory of its own to run checks in."""

    def __init__(self, python: Path, directory: Path, library: Path | None = None) -> None:
        """Take the interpreter, the directory, and where ddpcall is installed if not beside torch."""
        self._python = python
        self._directory = directory
        # Not where the checkout is: the installed package is tried.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        paths = {"PYTHONPATH": str(library)} if library else {}
        self._variables = {**inherited, **paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(self, *arguments: str, expected: int = 0) -> str:
        """Run the interpreter; return what went wrong, or nothing."""
        command = [str(self._python), *arguments]
        try:
            done = subprocess.run(
                command, cwd=self._directory, env=self._variables, capture_output=True, text=True, timeout=LIMIT_S
            )
        except subprocess.TimeoutExpired:
            return f"still running after {LIMIT_S} s"
        if done.returncode == expected:
            return ""
        print(f"{' '.join(command)}\n{done.stdout}{done.stderr}", file=sys.stderr)
        return f"exit code {done.returncode}, not {expected}"

    def versions(self) -> tuple[str, str]:
        """Return the versions of torch and Python."""
        asked = [str(self._python), "-c", ASK]
        torch, python = json.loads(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)
        return torch, python

    def write(self, name: str, text: str) -> str:
        """Write a file in the directory; return its name."""
        (self._directory / name).write_text(text)
        return name

    def read(self, name: str) -> dict:
        """Return a JSON file that a check made."""
        return json.loads((self._directory / name).read_text())


def check_watch(environment: Environment) -> str:
    """A bypass is found on two ranks, and its clean twin is not blamed."""
    for name, call, code in (("bypass", "model.module", 1), ("clean", "model", 0)):
        script = environment.write(f"{name}.py", TRAINING.format(call=call))
        command = ("-m", "ddpcall", "watch", "-n", "2", "--json", f"{name}.json", script)
        if trouble := environment.run(*command, expected=code):
            return f"{name} script: {trouble}"
        found = {finding["code"] for finding in environment.read(f"{name}.json")["findings"]}
        if ("DC101" in found) != (name == "bypass"):
            return f"{name} script: found {', '.join(sorted(found)) or 'nothing'}"
    return ""


def check_plugin(environment: Environment) -> str:
    """Two tests on two ranks pass."""
    return environment.run("-m", "pytest", "-q", environment.write("test_two.py", TESTS))


def check_claims(environment: Environment) -> str:
    """Every claim's experiment is carried through."""
    return environment.run("-m", "ddpcall", "claims")


def check_lab(environment: Environment) -> str:
    """The main experiment shows what it expects."""
    return environment.run(str(ROOT / "launch" / "train.py"), "experiment=forward_bypass")


CHECKS: dict[str, Callable[[Environment], str]] = {
    "watch": check_watch,
    "pytest plugin": check_plugin,
    "claims": check_claims,
    "forward_bypass": check_lab,
}
HEADER = ("torch", "Python", *CHECKS, "measured")


def measure(environment: Environment) -> Row:
    """Run every check in an environment."""
    torch, python = environment.versions()
    cells = []
    for name, check in CHECKS.items():
        cells.append(check(environment) or PASSED)
        print(f"torch {torch}, Python {python}: {name}: {cells[-1]}", file=sys.stderr, flush=True)
    return Row(torch, python, tuple(cells), datetime.date.today().isoformat())


# ---- which versions ---------------------------------------------------------------------------------------------


def numbers_of(version: str) -> tuple[int, ...]:
    """Return a version's first three numbers."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def read_offered(output: str) -> list[str]:
    """Return the versions that `pip index versions` names, newest first."""
    line = next(line for line in output.splitlines() if line.startswith("Available versions:"))
    return line.removeprefix("Available versions:").replace(" ", "").split(",")


def read_lower_bound() -> str:
    """Return the torch that pyproject.toml asks for at least."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return next(each for each in project["dependencies"] if each.startswith("torch")).partition(">=")[2]


def read_constrained() -> str:
    """Return the torch of constraints.txt."""
    found = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def choose_versions(offered: Sequence[str], lower_bound: str, constrained: str) -> list[str]:
    """Return the oldest supported torch, the one of the constraints and the newest, each once."""
    supported = sorted((each for each in offered if numbers_of(each) >= numbers_of(lower_bound)), key=numbers_of)
    return sorted({supported[0], constrained, supported[-1]}, key=numbers_of)


def _offered() -> list[str]:
    asked = [sys.executable, "-m", "pip", "index", "versions", "torch"]
    return read_offered(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)


def _is_usable(python: str) -> bool:
    """Say whether a command starts a Python; pyenv's may not."""
    return shutil.which(python) is not None and not subprocess.run([python, "-V"], capture_output=True).returncode


# ---- environments -----------------------------------------------------------------------------------------------


def _build_wheel(directory: Path) -> Path:
    """Build from a copy, so that nothing of an earlier build gets in."""
    copy = directory / "checkout"
    for name in ("src", "conf"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    _pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(directory), str(copy))
    return next(directory.glob("*.whl"))


def _pip(python: str | Path, *arguments: str) -> None:
    subprocess.run([str(python), "-m", "pip", arguments[0], "--quiet", *arguments[1:]], check=True)


def _make(wanted: Wanted, wheel: Path, directory: Path) -> Environment:
    """Make an environment; with the torch of constraints.txt everything else is as there."""
    subprocess.run([wanted.python, "-m", "venv", str(directory / "venv")], check=True)
    python = directory / "venv" / "bin" / "python"
    constraints = ["-c", str(ROOT / "constraints.txt")] if wanted.torch == read_constrained() else []
    _pip(python, "install", *constraints, f"{wheel}[lab,test]", f"torch=={wanted.torch}")
    return Environment(python, directory)


def _measure_each(options: argparse.Namespace, directory: Path) -> Iterable[Row]:
    wheel = _build_wheel(directory)
    if options.environment:
        library = directory / "library"
        _pip(sys.executable, "install", "--no-deps", "--target", str(library), str(wheel))
        for number, each in enumerate(options.environment):
            (own := directory / f"given{number}").mkdir()
            yield measure(Environment(each.absolute() / "bin" / "python", own, library))
        return
    constrained = read_constrained()
    versions = options.torch or choose_versions(_offered(), read_lower_bound(), constrained)
    wanted = [Wanted(sys.executable, version) for version in versions]
    wanted += [Wanted(python, constrained) for python in options.python or filter(_is_usable, OTHER_PYTHONS)]
    for number, each in enumerate(wanted):
        (own := directory / f"made{number}").mkdir()
        yield measure(_make(each, wheel, own))
        shutil.rmtree(own)  # gigabytes each


# ---- the table --------------------------------------------------------------------------------------------------


def read_rows(text: str) -> list[Row]:
    """Return the rows of a page's table.

    Raises:
        ValueError: The page has no markers.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"no markers {BEGIN.strip()} … {END} in the page")
    table = text.partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:] if line]
    return [Row(torch, python, tuple(cells), measured) for torch, python, *cells, measured in rows]


def merge_rows(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Put new rows in the place of old ones of the same versions."""
    rows = {row.key: row for row in [*old, *new]}
    return [rows[key] for key in sorted(rows)]


def write_rows(text: str, rows: Iterable[Row]) -> str:
    """Return the page with these rows in its table."""
    lines = [HEADER, ("---",) * len(HEADER), *((row.torch, row.python, *row.cells, row.measured) for row in rows)]
    table = "".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |\n" for line in lines)
    return text.partition(BEGIN)[0] + BEGIN + table + END + text.partition(END)[2]


def show_rows(console: Console, rows: Iterable[Row]) -> None:
    """Print the table."""
    table = Table(*HEADER)
    for row in rows:
        cells = [f"[{'green' if cell == PASSED else 'bold red'}]{cell}[/]" for cell in row.cells]
        table.add_row(row.torch, row.python, *cells, row.measured)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.versions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--torch", action="append", metavar="VERSION", help="try this torch, not the three (repeatable)")
    add(
        "--python",
        action="append",
        metavar="COMMAND",
        help="try this Python with the torch of constraints.txt too",
    )
    add("--environment", action="append", type=Path, metavar="DIR", help="try an environment that exists instead")
    add("--dry-run", action="store_true", help="print the table and leave the page as it is")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory(prefix="ddpcall-versions-") as directory:
        for row in _measure_each(options, Path(directory)):
            rows.append(row)
            page = PAGE.read_text()
            if not options.dry_run:  # after each: the next may take minutes
                PAGE.write_text(write_rows(page, merge_rows(read_rows(page), [row])))
    show_rows(Console(), rows)
    return int(any(cell != PASSED for row in rows for cell in row.cells))


if __name__ == "__main__":
    sys.exit(main())
