"""What one rank knows of one optimizer step: sketches and digests, as plain arrays."""

from __future__ import annotations

import io
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace

import numpy as np

UNREAD, NO_GRADIENT, PRESENT, NOT_FINITE, FOREIGN = range(5)
"""States of a used gradient: no step read it; `.grad` was None; read; inf or nan; read from another tensor (a
float32 master copy of the parameter)."""


@dataclass(frozen=True)
class Column:
    """Where an own gradient came from.

    Attributes:
        parameter: Index into `RankSketches.names`.
        backward: Number of the backward in its window, from 0; those of the window before count down from -1.
        first: Seen ahead of the parameter's other tensor hooks; the same gradient is also there as they left it.
        captured: Asked for by `torch.autograd.grad`: it never went into `.grad`.
    """

    parameter: int
    backward: int
    first: bool = False
    captured: bool = False


@dataclass(frozen=True)
class RankSketches:
    """One rank's record of one optimizer step.

    Attributes:
        rank: Global rank.
        names: The parameters, in the model's order.
        numel: Elements of each whole parameter.
        dtypes: The precision in which each gradient was reduced, as far as it is known: such as "float32".
        used: Shape (parameters, buckets): sketches of what the optimizer consumed; zeros where it had nothing.
        used_digests: Digest of it, bit by bit, by parameter; 0 of shards, and where it cannot be read.
        states: One of the five states above for each parameter.
        own: Shape (columns, buckets): sketches of what this rank computed.
        columns: Says of each row of `own` what it is.
        carry: Shape (parameters, buckets): what lay in `.grad` before the window's first backward.
        before: Digest of the weights before the step, by parameter.
        after: The same when the record was taken.
        own_parts: By parameter: ranks that hold shards of its own gradient; empty where this rank holds it whole.
        own_sum: The same and, where the gradient is a DTensor `Partial`, the ranks whose parts add up.
        own_unit: By parameter: ranks that compute one replica of it together (tensor parallelism).
        used_parts: By parameter: ranks whose used sketches make up the whole; empty where it is here.
        weight_parts: By parameter: ranks that hold shards of the weights.
        steps_of: By parameter: steps that used it since the last record, also those that a GradScaler skipped.
        num_steps: Optimizer steps taken since the last record.
        num_skipped: Steps that a GradScaler skipped.
        is_waiting: Own gradients were computed that no step has used.
        failure: Why measuring ended early; empty if it did not.
        targets: By line of a loss that takes a mean (the watch's alone): `file:line`, targets, the sum of what the
            means were multiplied by, and means in one backward.
    """

    rank: int
    names: tuple[str, ...] = ()
    numel: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    used: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    used_digests: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    states: tuple[int, ...] = ()
    own: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    columns: tuple[Column, ...] = ()
    carry: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    before: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    after: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    own_parts: tuple[tuple[int, ...], ...] = ()
    own_sum: tuple[tuple[int, ...], ...] = ()
    own_unit: tuple[tuple[int, ...], ...] = ()
    used_parts: tuple[tuple[int, ...], ...] = ()
    weight_parts: tuple[tuple[int, ...], ...] = ()
    steps_of: tuple[int, ...] = ()
    num_steps: int = 0
    num_skipped: int = 0
    is_waiting: bool = False
    failure: str = ""
    targets: tuple[tuple[str, int, float, int], ...] = ()

    def without(self, names: Collection[str]) -> RankSketches:
        """Return the record without some parameters."""
        if not names:
            return self
        kept = [index for index, name in enumerate(self.names) if name not in names]
        place = {index: new for new, index in enumerate(kept)}
        rows = [row for row, column in enumerate(self.columns) if column.parameter in place]
        columns = tuple(replace(self.columns[row], parameter=place[self.columns[row].parameter]) for row in rows)
        by_parameter = {
            name: type(values)(values[index] for index in kept) if isinstance(values, tuple) else values[kept]
            for name, values in vars(self).items()
            if name in _BY_PARAMETER and len(values)
        }
        return replace(self, own=self.own[rows], columns=columns, **by_parameter)

    def to_bytes(self) -> bytes:
        """Return the record as bytes that hold nothing but numbers and text."""
        plain = {name: value for name, value in vars(self).items() if name not in _ARRAYS}
        plain["columns"] = [list(asdict(column).values()) for column in self.columns]
        header = np.frombuffer(json.dumps(plain).encode(), np.uint8)
        stream = io.BytesIO()
        np.savez(stream, header=header, **{name: getattr(self, name) for name in _ARRAYS})
        return stream.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> RankSketches:
        """Read what `to_bytes` wrote."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            plain = json.loads(arrays["header"].tobytes())
            columns = tuple(Column(*column) for column in plain.pop("columns"))
            tuples = {name: _freeze(value) for name, value in plain.items()}
            return RankSketches(**tuples, columns=columns, **{name: arrays[name] for name in _ARRAYS})


_BY_PARAMETER = (
    "names", "numel", "dtypes", "used", "used_digests", "states", "carry", "before", "after",
    "own_parts", "own_sum", "own_unit", "used_parts", "weight_parts", "steps_of",
)  # fmt: skip
_ARRAYS = ("used", "used_digests", "own", "carry", "before", "after")


def _freeze(value: object) -> object:
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value
