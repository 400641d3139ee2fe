"""What an observer has counted, taken out and put back when a trial is saved and resumed."""

from __future__ import annotations

from typing import Any, ClassVar


class Kept:
    """An observer whose counts are some of its attributes: lists, dicts, numbers, text and tensors.

    Attributes:
        kept: Names of those attributes.
    """

    kept: ClassVar[tuple[str, ...]] = ()

    def flush(self) -> None:
        """Finish what was only begun. May be a collective: every rank must call it after the same step."""

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted so far. May be a collective, as `flush` is."""
        self.flush()
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what another process had counted."""
        for name in self.kept:
            setattr(self, name, state[name])
