"""The result: the mixing matrix of one step, its shape, and sentences that say what the shape means."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_SENTENCES = {
    "averaged": "Every rank used the mean of all ranks' gradients.",
    "summed": "Every rank used the sum of all ranks' gradients, {num_ranks} times their mean. Divide by the "
    "number of ranks, unless the loss is divided already or one loss is spread over the ranks.",
    "scaled": "Every rank used {scale:.4g} times the mean of all ranks' gradients (clipping, a loss scale or an "
    "accumulation factor does this).",
    "local": "Every rank used its own gradient alone: nothing was averaged. Usual cause: the forward went past "
    "the wrapper, as in model.module(x); write model(x).",
    "partly_local": "A part of what the ranks used was averaged, and a part is each rank's own.",
    "late": "A gradient was not used in the step it was computed for; it arrives in a later step, or never.",
    "groups": "The ranks average in groups that never meet.",
    "dropped": "What some ranks computed is in nobody's gradient.",
    "weighted": "Every rank used the same gradient, in which the ranks do not weigh the same.",
    "transformed": "Every rank used the same gradient, which is no mixture of what they computed (compression, "
    "clipping by parameter or by value, or weight decay does this; replicas stay equal).",
    "different": "The ranks used different gradients that no common mixture explains.",
    "thrown_away": "Gradients were computed, and the optimizer used none of them.",
    "unaccounted": "The optimizer used gradients that no backward on the model's parameters was seen to compute "
    "(master weights in float32, or torch.func).",
    "unidentifiable": "It cannot be told from this step who learns from whom.",
}


@dataclass(frozen=True)
class Mixing:
    """Who learned from whom in one optimizer step.

    Attributes:
        matrix: Shape (ranks, columns), float64: how much of each column is in what a rank used; nan where the
            step does not tell. Of the parameters in the largest group of `by_parameter`.
        columns: (rank, backward) of each column of `matrix`. Backwards that are mixed alike are one column;
            negative ones belong to the step before.
        scale: 1.0 if every rank used exactly the mean.
        residual: By rank: what the matrix does not explain, relative to the gradients that were mixed.
        shape: One of `ddpcall.mixing.SHAPES`.
        by_parameter: Parameters' names by shape.
        reason: What the shape's name does not say.
        num_ranks: Ranks that were compared.
        ranks: Their global ranks: the matrix's rows.
        weights: By what became of the replicas (equal, averaged, parted, different): parameters' names.
    """

    matrix: np.ndarray
    columns: tuple[tuple[int, int], ...]
    scale: float
    residual: tuple[float, ...]
    shape: str
    by_parameter: Mapping[str, tuple[str, ...]]
    reason: str
    num_ranks: int
    ranks: tuple[int, ...] = ()
    weights: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def explain(self) -> str:
        """Say in plain sentences what the shape means."""
        sentence = _SENTENCES[self.shape].format(scale=self.scale, num_ranks=self.num_ranks)
        return f"{sentence} {self.reason[:1].upper()}{self.reason[1:]}." if self.reason else sentence

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers, lists and texts; nan as None."""
        plain = dict(vars(self))
        plain["matrix"] = [[_plain(value) for value in row] for row in self.matrix.tolist()]
        plain["columns"] = [list(column) for column in self.columns]
        plain["scale"], plain["residual"] = _plain(self.scale), [_plain(value) for value in self.residual]
        plain["by_parameter"] = {shape: list(names) for shape, names in self.by_parameter.items()}
        plain["weights"] = {kind: list(names) for kind, names in self.weights.items()}
        return json.loads(json.dumps(plain))

    def __str__(self) -> str:
        lines = [f"mixing matrix ({self.shape}, scale {self.scale:.6g}): {self.explain()}"]
        if self.matrix.size and self.matrix.shape[1] <= 16:
            heads = "".join(f"{_head(column):>10}" for column in self.columns)
            lines.append(f"{'':>10}{heads}")
            for rank, row in zip(self.ranks, self.matrix, strict=True):
                lines.append(f"{f'rank {rank}':>10}" + "".join(f"{round(value, 4) + 0.0:>10.4f}" for value in row))
        for shape, names in self.by_parameter.items() if len(self.by_parameter) > 1 else ():
            lines.append(f"  {shape}: {name_some(names)}")
        return "\n".join(lines)


def _plain(value: float) -> float | None:
    return None if not math.isfinite(value) else float(value)


def _head(column: tuple[int, int]) -> str:
    rank, backward = column
    return f"rank {rank}" + (f" #{backward}" if backward else "")


def name_some(names: Sequence[str]) -> str:
    """Name the first five and count the others."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
