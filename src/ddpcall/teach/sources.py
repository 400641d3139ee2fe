"""Where a behaviour stands in the source of what is installed: file, line and function, looked up each time."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A function or class in somebody's source.

    Attributes:
        module: Import path of the module it is defined in.
        name: Qualified name within the module.
        says: What is to be seen there.
    """

    module: str
    name: str
    says: str

    @property
    def file(self) -> str:
        """The file, as a path from the directory packages are installed in."""
        return self.module.replace(".", "/") + ".py"


@dataclass(frozen=True)
class Location:
    """Where a source was found: path on this machine and line, from 1."""

    path: Path
    line: int


def locate(source: Source) -> Location:
    """Find a source in the installed package.

    Raises:
        ImportError: The package is not installed, or has no such module in this version.
        AttributeError: The module has no such name in this version.
        OSError: Its source is not there to be read.
    """
    found: object = importlib.import_module(source.module)
    for part in source.name.split("."):
        found = getattr(found, part)
    found = inspect.unwrap(found)  # pyright: ignore[reportArgumentType] (a class is fine, too)
    file = inspect.getsourcefile(found)  # pyright: ignore[reportArgumentType]
    if file is None:
        raise OSError(f"no source file for {source.name}")
    return Location(Path(file), inspect.getsourcelines(found)[1])  # pyright: ignore[reportArgumentType]
