"""The environment variables that torchrun sets: what is started anew must not inherit another launch's."""

from __future__ import annotations

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_of_a_launch(name: str) -> bool:
    """Say whether torchrun sets a variable of this name."""
    return name in _NAMES or name.startswith(("TORCHELASTIC_", "ROLE_", "GROUP_"))
