"""From a configuration to the cells of its grid, and from expectations to what one cell should show. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

from ddpcall.evidence import AXES, Cell
from ddpcall.lab.errors import WrongUse
from ddpcall.lab.schema import CellConfig, ExpectationConfig, PathConfig, TrainConfig, WrapperConfig
from ddpcall.paths import CallPath, Mode, SyncWindow
from ddpcall.verdicts import VERDICTS
from ddpcall.wrappers import WRAPPERS


@dataclass(frozen=True)
class Grid:
    """The cells to run, and those left out because the pair makes no sense, each with its reason."""

    cells: tuple[Cell, ...]
    left_out: tuple[str, ...]


def expand_grid(config: TrainConfig) -> Grid:
    """Cross the axes and keep the meaningful cells.

    Raises:
        WrongUse: An unknown name on an axis, or nothing meaningful left: the message lists the pairs that are.
    """
    cells, left_out = [], []
    for only in config.grid.cells or [CellConfig()]:
        for cell in _cross(config, only):
            reason = _why_meaningless(cell.wrapper, CallPath(cell.path), SyncWindow(cell.window))
            if reason:
                left_out.append(reason)
            else:
                cells.append(cell)
    if not cells:
        raise WrongUse("\n".join([*dict.fromkeys(left_out), "Pairs that make sense:", *_meaningful_pairs()]))
    return Grid(tuple(dict.fromkeys(cells)), tuple(dict.fromkeys(left_out)))


def _cross(config: TrainConfig, only: CellConfig) -> Iterator[Cell]:
    """Yield the cells of the grid's axes, with the values of one of its cells where that names any."""
    grid = config.grid

    def values(axis: str, default: str) -> list[str]:
        named = getattr(only, axis)
        return [named] if named is not None else getattr(grid, axis) or [default]

    wrappers = _words(list(WRAPPERS), values("wrapper", _choose(config.wrapper)), "wrapper")
    paths = _names(CallPath, values("path", _choose(config.path)), "path")
    for axis, names in (("wrapper", wrappers), ("path", paths)):
        if "custom" in names and not getattr(config, axis)._target_:
            raise WrongUse(f"{axis} custom is your own function. Write {axis}._target_=my.module.name too")
    windows = _names(SyncWindow, values("window", "plain"), "grid.window")
    hooks = _words(("early", "late"), values("hooks", "early"), "grid.hooks")
    modes = _names(Mode, values("mode", "train"), "grid.mode")
    models = values("model", str(config.model.get("_target_", "")))
    for model, wrapper, path, window, when, mode in product(models, wrappers, paths, windows, hooks, modes):
        yield Cell(wrapper=wrapper, path=path, window=window, hooks=when, mode=mode, model=model)


def _choose(node: WrapperConfig | PathConfig) -> str:
    return "custom" if node._target_ else node.name  # pyright: ignore[reportPrivateUsage]


def _names(kind: type[StrEnum], names: Sequence[str], axis: str) -> list[str]:
    return _words([member.value for member in kind], names, axis)


def _words(known: Sequence[str], names: Sequence[str], axis: str) -> list[str]:
    for name in names:
        if name not in known:
            raise WrongUse(f"{axis}: {name!r} is unknown; write one of: {', '.join(known)}")
    return list(dict.fromkeys(names))


def _why_meaningless(wrapper: str, path: CallPath, window: SyncWindow) -> str | None:
    if path not in WRAPPERS[wrapper].meaningful_paths():
        return (
            f"{wrapper} × {path} makes no sense: {wrapper} works in place, the wrapped object is the inner module"
        )
    if window not in WRAPPERS[wrapper].meaningful_windows():
        return f"{wrapper} × {window} makes no sense: {wrapper} has no no_sync() of its own"
    return None


def _meaningful_pairs() -> list[str]:
    return [f"  {wrapper} × {', '.join(spec.meaningful_paths())}" for wrapper, spec in WRAPPERS.items()]


def check_expectations(config: TrainConfig) -> None:
    """Refuse expectations that could never be compared.

    Raises:
        WrongUse: An unknown verdict word.
    """
    for expectation in config.expect:
        for name, spec in VERDICTS.items():
            word = getattr(expectation, name)
            if word is not None and word not in spec.words:
                raise WrongUse(f"expect: {name}: {word!r} is unknown; write one of: {', '.join(spec.words)}")


def expected_verdicts(
    cell: Cell, expectations: Sequence[ExpectationConfig], torch_version: str = "", device: str = "cpu"
) -> dict[str, str]:
    """Collect what the matching expectations say of one cell; a later one wins over an earlier one.

    Args:
        cell: The cell.
        expectations: In the order of the file.
        torch_version: The version measured; expectations for another one do not match.
        device: The kind of device measured on; likewise.
    """
    expected: dict[str, str] = {}
    for expectation in expectations:
        if not torch_version.startswith(expectation.torch or "") or expectation.device not in (None, device):
            continue
        if all(_matches(getattr(expectation, name), getattr(cell, name)) for name in AXES):
            stated = {name: getattr(expectation, name) for name in VERDICTS}
            expected |= {name: word for name, word in stated.items() if word is not None}
    return expected


def _matches(wanted: str | None, actual: str) -> bool:
    return wanted is None or wanted == actual or actual.endswith(f".{wanted}")
