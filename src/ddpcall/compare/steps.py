"""One training step as a comparison knows it: sketches of gradients and updates, loss, outputs by sample."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ddpcall.compare.batches import copy_batch
from ddpcall.compare.samples import NUM_NUMBERS, SampleOutputs, SampleRecorder, join_outputs
from ddpcall.compare.step_mode import StepMode
from ddpcall.mixing import MixingCollector, RankSketches
from ddpcall.mixing.parameters import gather_parameters
from ddpcall.mixing.shards import find_places, is_flattened

# Two roundings to the nearest number, each even over one unit in the last place: 0.41 units, and units of numbers
# between two powers of two are 0.75 eps in the mean.
_ROUNDING = 0.3

MakeOptimizer = Callable[[Any], Optimizer]


@dataclass(frozen=True)
class StepRecord:
    """What one rank knows of one step.

    Attributes:
        sketches: Of its own gradients and of those it used.
        updates: Shape (parameters, buckets): sketches of what the optimizer added, in the order of
            `sketches.names`; no rows where there is no optimizer.
        rounding: By parameter: how far storing its new weights moves an update, as a norm.
        loss: What `step` returned; nan where that is no number.
        outputs: What modules computed, by sample.
        num_targets: By call of a loss that takes a mean: its targets.
        num_dropouts: Dropouts that were left out.
        eps: The coarsest precision in which a module computed: distance from 1 to the next number.
    """

    sketches: RankSketches
    updates: np.ndarray
    rounding: np.ndarray
    loss: float
    outputs: SampleOutputs
    num_targets: list[int]
    num_dropouts: int
    eps: float

    def to_bytes(self) -> bytes:
        """Return the record as bytes that hold nothing but numbers and text."""
        plain = {name: getattr(self, name) for name in ("loss", "num_targets", "num_dropouts", "eps")}
        plain["places"], plain["kinds"] = list(self.outputs.outputs), self.outputs.kinds
        plain["widths"] = self.outputs.widths
        outputs = np.array(list(self.outputs.outputs.values()) or np.empty((0, 0, NUM_NUMBERS)))
        stream = io.BytesIO()
        np.savez(
            stream,
            sketches=np.frombuffer(self.sketches.to_bytes(), np.uint8),
            plain=np.frombuffer(json.dumps(plain).encode(), np.uint8),
            updates=self.updates,
            rounding=self.rounding,
            samples=np.array(self.outputs.samples, np.int64),
            outputs=outputs,
        )
        return stream.getvalue()

    def rename(self, clean: Callable[[str], str]) -> StepRecord:
        """Return the record with other names of parameters and modules."""
        outputs = SampleOutputs(
            self.outputs.samples,
            {(clean(name), call): rows for (name, call), rows in self.outputs.outputs.items()},
            {clean(name): kind for name, kind in self.outputs.kinds.items()},
            {clean(name): width for name, width in self.outputs.widths.items()},
        )
        names = tuple(clean(name) for name in self.sketches.names)
        return replace(self, sketches=replace(self.sketches, names=names), outputs=outputs)

    @staticmethod
    def from_bytes(data: bytes) -> StepRecord:
        """Read what `to_bytes` wrote."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            plain = json.loads(arrays["plain"].tobytes())
            places = [(name, call) for name, call in plain.pop("places")]
            outputs = dict(zip(places, arrays["outputs"], strict=True))
            samples = SampleOutputs(
                arrays["samples"].tolist(), outputs, plain.pop("kinds"), plain.pop("widths", {})
            )
            sketches = RankSketches.from_bytes(arrays["sketches"].tobytes())
            return StepRecord(
                sketches=sketches, updates=arrays["updates"], rounding=arrays["rounding"], outputs=samples, **plain
            )


def take_steps(
    step: Callable[[Any, Any], Any],
    trained: nn.Module,
    inner: nn.Module,
    batch: Any,
    make_optimizer: MakeOptimizer | None,
    num_steps: int,
    samples: Sequence[Sequence[int]] | None = None,
) -> list[StepRecord]:
    """Train and record every step.

    Args:
        step: The user's.
        trained: What `step` is given.
        inner: The user's own module under it.
        batch: What `step` is given, as a copy each time.
        make_optimizer: Makes the optimizer of the parameters; None: gradients alone.
        num_steps: How often.
        samples: By step: digests to use in place of those of the rows.

    Raises:
        ValueError: the model has no parameter to train, or the optimizer holds none.
    """
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("the model has no parameter that requires a gradient: there is nothing to compare")
    # A step of size zero, where the user gives none: gradients are read when an optimizer is about to use them.
    optimizer = SGD(parameters, lr=0.0) if make_optimizer is None else make_optimizer(parameters)
    named = choose_named(trained, inner, [optimizer])
    records = []
    for index in range(num_steps):
        recorder = SampleRecorder(inner, samples[index] if samples else None)
        collector = MixingCollector.of_model(named, optimizer)
        places = find_places(named, [optimizer])
        before = [place.stepped.detach().clone() for place in places]
        optimizer.zero_grad(set_to_none=True)
        collector.start()
        try:
            with torch.enable_grad(), StepMode() as mode, recorder.on():
                loss = step(trained, copy_batch(batch))
            optimizer.step()
            sketches = collector.take()
        finally:
            collector.stop()
        updates = [
            place.sketch_used(place.stepped.detach() - old).cpu().numpy()
            for place, old in zip(places, before, strict=True)
        ]
        records.append(
            StepRecord(
                sketches,
                np.stack(updates) if make_optimizer is not None else np.empty((0, 0)),
                np.array([measure_rounding(old) for old in before]),
                _to_number(loss),
                recorder.finish(),
                mode.num_targets,
                mode.num_dropouts,
                recorder.eps,
            )
        )
    return records


def measure_rounding(weights: Any) -> float:
    """Return how far storing new weights moves an update, as a norm."""
    values = weights.to_local() if hasattr(weights, "placements") else weights
    return _ROUNDING * torch.finfo(values.dtype).eps * float(torch.linalg.vector_norm(values.to(torch.float64)))


def choose_named(trained: nn.Module, inner: nn.Module, optimizers: Sequence[Optimizer]) -> nn.Module:
    """Return the module whose parameters have the names that the user knows: FSDP1 replaces those of the inner."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return inner if held & {id(p) for p in inner.parameters()} and not is_flattened(trained) else trained


def _to_number(loss: Any) -> float:
    if isinstance(loss, Tensor) and loss.numel() == 1 and not hasattr(loss, "placements"):
        return float(loss.detach())
    return float(loss) if isinstance(loss, int | float) else math.nan


@dataclass(frozen=True)
class Step:
    """What all ranks together know of one step.

    Attributes:
        names: The parameters, in the model's order.
        numel: By parameter: its elements.
        used: By parameter: shape (ranks, buckets).
        own: By parameter: shape (ranks, backwards, buckets).
        update: By parameter: shape (ranks, buckets); empty without an optimizer.
        rounding: By parameter: how far storing its new weights moves an update, as rank 0 knows it.
        is_finite: Whether all gradients that were used are.
        losses: By rank.
        outputs: Of all ranks, by sample.
        num_samples: By rank.
        num_targets: By rank, and by call of a loss that takes a mean.
        num_dropouts: Of all ranks.
        eps: The coarsest precision in which a module computed.
        records: By rank.
    """

    names: tuple[str, ...]
    numel: dict[str, int]
    used: dict[str, np.ndarray]
    own: dict[str, np.ndarray]
    update: dict[str, np.ndarray]
    rounding: dict[str, float]
    is_finite: bool
    losses: tuple[float, ...]
    outputs: SampleOutputs
    num_samples: tuple[int, ...]
    num_targets: tuple[list[int], ...]
    num_dropouts: int
    eps: float
    failure: str = ""
    records: Sequence[RankSketches] = field(default_factory=tuple)


def join_ranks(records: Sequence[StepRecord]) -> Step:
    """Put what the ranks know of one step together, shards and replicas as well."""
    sketches = [record.sketches for record in records]
    parameters = gather_parameters(sketches)
    has_updates = len(records[0].updates) > 0
    return Step(
        names=tuple(parameter.name for parameter in parameters),
        numel={parameter.name: parameter.numel for parameter in parameters},
        used={parameter.name: parameter.used for parameter in parameters},
        own={parameter.name: parameter.own for parameter in parameters},
        update=join_rows(sketches, [record.updates for record in records]) if has_updates else {},
        rounding=dict(zip(sketches[0].names, records[0].rounding.tolist(), strict=True)),
        is_finite=all(bool(np.isfinite(parameter.used).all()) for parameter in parameters),
        losses=tuple(record.loss for record in records),
        outputs=join_outputs([record.outputs for record in records]),
        num_samples=tuple(len(record.outputs.samples) for record in records),
        num_targets=tuple(record.num_targets for record in records),
        num_dropouts=sum(record.num_dropouts for record in records),
        eps=max(record.eps for record in records),
        failure=next((one.failure for one in sketches if one.failure), ""),
        records=sketches,
    )


def join_rows(sketches: Sequence[RankSketches], rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Put sketches of weights together as their shards lie on the ranks.

    Args:
        sketches: Say where; by rank.
        rows: By rank: shape (parameters, buckets), in the order of its `sketches.names`.

    Returns:
        By parameter: shape (ranks, buckets).
    """
    joined = {}
    for name in sketches[0].names:
        at = [one.names.index(name) for one in sketches]
        parts = [
            one.weight_parts[place] or (rank,) for rank, (one, place) in enumerate(zip(sketches, at, strict=True))
        ]
        joined[name] = np.stack([sum(rows[part][at[part]] for part in own) for own in parts])
    return joined
