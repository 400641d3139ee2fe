"""The result: whether ranks and one process computed the same, and if not, what differs first."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

CAUSES = ("same", "scaled", "weighted", "module", "loss", "some_parameters", "update", "unexplained")


@dataclass(frozen=True)
class ParameterNumbers:
    """How far one parameter's gradient is from that of one process; sizes relative to the latter's norm.

    Attributes:
        difference: Of the rank that is farthest off.
        tolerance: What counts as a difference.
        ratio: What the gradient of one process would have to be multiplied by to come nearest.
        update_difference: The same of what the optimizer added; nan without an optimizer.
        update_tolerance: What counts as a difference of updates.
    """

    difference: float
    tolerance: float
    ratio: float
    update_difference: float = math.nan
    update_tolerance: float = math.nan


@dataclass(frozen=True)
class OneProcessComparison:
    """What `same_as_one_process` found.

    Attributes:
        same: Gradients, and updates where there is an optimizer, are those of one process within the tolerance.
        cause: One of `ddpcall.compare.CAUSES`.
        scale: Every gradient is so many times that of one process; nan where no one number says it.
        weights: How much each rank's own gradient weighs in what the ranks used, or that of each of its
            micro-batches; empty where that is not known.
        reference_weights: How much one process weighs the same gradients.
        where: The first module or parameter that differs; empty where all or none do.
        message: All this in sentences.
        step: The step that was judged, from 0: the first that differs, else the last.
        tolerance: The largest of all gradients together, relative to the gradient of one process.
        loss: Mean over ranks of what `step` returned; nan where that is no number.
        reference_loss: What `step` returned in one process.
        parameters: By name.
    """

    same: bool
    cause: str
    message: str
    scale: float = math.nan
    weights: tuple[float, ...] = ()
    reference_weights: tuple[float, ...] = ()
    where: str = ""
    step: int = 0
    tolerance: float = math.nan
    loss: float = math.nan
    reference_loss: float = math.nan
    parameters: Mapping[str, ParameterNumbers] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers, lists and texts; nan as None."""
        return without_nan(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> OneProcessComparison:
        """Read what `json.dumps(comparison.to_json())` wrote."""
        plain: dict[str, Any] = json.loads(text)
        plain |= {name: math.nan for name, value in plain.items() if value is None}
        numbers = {
            name: ParameterNumbers(**{key: math.nan if x is None else x for key, x in one.items()})
            for name, one in plain.pop("parameters").items()
        }
        plain |= {name: tuple(plain[name]) for name in ("weights", "reference_weights")}
        return OneProcessComparison(**plain, parameters=numbers)

    def __str__(self) -> str:
        return self.message


def without_nan(value: Any) -> Any:
    """Return nested numbers with None in place of nan and inf, as JSON has neither."""
    if isinstance(value, Mapping):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
