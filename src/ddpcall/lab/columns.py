"""The verdicts as columns of a table: their titles, and which of them have anything to say."""

from __future__ import annotations

from collections.abc import Iterable

TITLES = {
    "gradients": "gradients",
    "mixing": "mixing",
    "hooks_wrapped": "hooks on wrapped",
    "hooks_inner": "hooks on inner",
    "hooks_submodules": "hooks below",
    "compiled": "code",
    "modes": "mode",
    "dropout": "dropout masks",
    "statistics": "running statistics",
    "evaluation_inner": "eval of inner",
    "evaluation_wrapped": "eval of wrapped",
    "precision": "precision",
}
_UNINTERESTING = {
    "precision": {"float32"},
    "modes": {"train"},
    "mixing": {"no data parallelism", "crashed"},  # gradients says so already
}


def is_interesting(name: str, words: Iterable[str]) -> bool:
    """Say whether a column of verdicts has anything to say."""
    return bool(set(words) - {"none"} - _UNINTERESTING.get(name, set()))
