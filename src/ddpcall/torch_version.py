"""Is the torch that is installed one that ddpcall works with? Asked without importing it."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys

OLDEST = (2, 11)
_NEEDED = "{found}, and ddpcall needs torch 2.11 or newer. Write: pip install 'torch>=2.11'"


def require_torch() -> None:
    """Raise ImportError, with one sentence, where torch is missing or too old."""
    if trouble := explain_torch():
        raise ImportError(trouble, name="torch")


def explain_torch() -> str:
    """Say what is wrong with the installed torch and what to write; nothing where it is right."""
    try:
        version = _find_version()
    except ImportError:
        return _NEEDED.format(found="torch is not installed")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if (
        numbers is None or tuple(map(int, numbers.groups())) >= OLDEST
    ):  # a version that says nothing is let through
        return ""
    return _NEEDED.format(found=f"torch {version} is installed")


def _find_version() -> str:
    if "torch" in sys.modules and hasattr(sys.modules["torch"], "__version__"):
        return str(sys.modules["torch"].__version__)
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:  # a checkout of torch's source, on the path, has no metadata
        return str(importlib.import_module("torch").__version__)
