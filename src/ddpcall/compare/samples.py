"""What modules compute for each sample. A sample is told by the digest of its input, on whatever rank it is."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from ddpcall.taps import Undo, find_tensors, in_backward, outside_dynamo, remove_handles

NUM_NUMBERS = 8
"""Numbers that stand for one module's output for one sample."""

VARIES = -1

Place = tuple[str, int]
"""A module's name, and the number of its call within one forward of the model."""


@dataclass
class SampleOutputs:
    """What modules computed, by sample.

    Attributes:
        samples: Digests of the input rows, in the order in which the model was given them.
        outputs: By module, in forward order: shape (samples, NUM_NUMBERS), float64; nan where it was not called.
        kinds: By module: the name of its class.
        widths: By module: elements of its output for a sample; `VARIES` where calls or ranks differ in that.
    """

    samples: list[int] = field(default_factory=list)
    outputs: dict[Place, np.ndarray] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)

    def note_width(self, name: str, width: int) -> None:
        """Remember how many elements a module's output has for a sample."""
        self.widths[name] = width if self.widths.get(name, width) == width else VARIES

    def by_sample(self) -> dict[tuple[int, int], int]:
        """Return where each sample lies; equal samples are numbered."""
        places: dict[tuple[int, int], int] = {}
        seen: dict[int, int] = {}
        for place, sample in enumerate(self.samples):
            places[sample, seen.get(sample, 0)] = place
            seen[sample] = seen.get(sample, 0) + 1
        return places


def join_outputs(parts: Sequence[SampleOutputs]) -> SampleOutputs:
    """Put the samples of several ranks one after the other."""
    joined = SampleOutputs([sample for part in parts for sample in part.samples])
    for part in parts:
        joined.kinds |= part.kinds
        for name, width in part.widths.items():
            joined.note_width(name, width)
        for place in part.outputs:
            joined.outputs.setdefault(place, np.empty(0))
    for place in joined.outputs:
        rows = [part.outputs.get(place, np.full((len(part.samples), NUM_NUMBERS), np.nan)) for part in parts]
        joined.outputs[place] = np.concatenate(rows)
    return joined


class SampleRecorder:
    """Records the outputs of a model's modules while it is on.

    Args:
        model: The user's own module, before or after it is wrapped.
        samples: Digests to use in place of those of the rows, in the same order: for inputs that were perturbed.
        max_modules: Modules beyond these are not recorded.

    Blind to: outputs whose dim 0 is not the sample; sharded outputs (DTensor); forwards that a backward computes
    again; submodules that `torch.compile` has inlined.
    """

    def __init__(self, model: nn.Module, samples: Sequence[int] | None = None, max_modules: int = 512) -> None:
        self.recorded = SampleOutputs()
        self.eps = 0.0
        self.is_on = True
        self._given = samples
        self._model = model
        self._modules = dict(list(model.named_modules())[:max_modules])
        self._num_rows = 0
        self._first = 0
        self._calls: dict[str, int] = {}

    @contextmanager
    def on(self) -> Generator[SampleRecorder]:
        """Record within the block."""
        undo = self.start()
        try:
            yield self
        finally:
            undo()

    def start(self) -> Undo:
        """Put the hooks on and return the undo."""
        begin = outside_dynamo(self._begin)
        handles = [self._model.register_forward_pre_hook(begin, with_kwargs=True)]
        for name, module in self._modules.items():
            see = outside_dynamo(partial(self._see, name))
            handles.append(module.register_forward_hook(see))
        return remove_handles(*handles)

    def take(self) -> SampleOutputs:
        """Return what was recorded and begin anew."""
        recorded, self.recorded = self.recorded, SampleOutputs()
        self._num_rows = 0
        return recorded

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if in_backward() or not self.is_on:
            return
        self._calls = {}
        rows = digest_rows(find_tensors((args, kwargs)))
        self._first, self._num_rows = len(self.recorded.samples), len(rows)
        if self._given is not None:
            rows = list(self._given[self._first : self._first + len(rows)])
        self.recorded.samples += rows

    def _see(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if in_backward() or not self._num_rows or not self.is_on:
            return
        call = self._calls[name] = self._calls.get(name, -1) + 1
        for tensor in find_tensors(output):
            if tensor.dim() and tensor.size(0) == self._num_rows and tensor.is_floating_point():
                if not hasattr(tensor, "placements"):
                    self.eps = max(self.eps, torch.finfo(tensor.dtype).eps)
                    self.recorded.kinds[name] = type(module).__name__
                    self.recorded.note_width(name, tensor[0].numel())
                    self._keep((name, call), sketch_rows(tensor))
                return

    def _keep(self, place: Place, rows: np.ndarray) -> None:
        total = self._first + self._num_rows
        kept = self.recorded.outputs.get(place, np.empty((0, NUM_NUMBERS)))
        grown = np.full((total, NUM_NUMBERS), np.nan)
        grown[: len(kept)] = kept
        grown[self._first :] = rows
        self.recorded.outputs[place] = grown

    def finish(self) -> SampleOutputs:
        """Return what was recorded, every module with a row for every sample."""
        recorded = self.take()
        for place, rows in recorded.outputs.items():
            missing = len(recorded.samples) - len(rows)
            recorded.outputs[place] = np.pad(rows, ((0, missing), (0, 0)), constant_values=np.nan)
        return recorded


def digest_rows(tensors: Sequence[Tensor]) -> list[int]:
    """Return one digest for each row that the tensors share along dim 0; of DTensors and scalars there is none."""
    usable = [t.detach() for t in tensors if t.dim() and not hasattr(t, "placements") and not t.is_meta]
    if not usable:
        return []
    num_rows = usable[0].size(0)
    arrays = []
    for tensor in usable:
        if tensor.size(0) == num_rows and tensor.numel():
            flat = tensor.resolve_conj().resolve_neg().reshape(num_rows, -1).contiguous().cpu()
            arrays.append(flat.view(torch.uint8).numpy())
    return [_digest_row([array[row] for array in arrays]) for row in range(num_rows)]


def _digest_row(parts: Sequence[np.ndarray]) -> int:
    stream = xxhash.xxh3_64()
    for part in parts:
        stream.update(part.data)
    return stream.intdigest() >> 1  # so that it is an int64 too


def sketch_rows(tensor: Tensor) -> np.ndarray:
    """Return a few numbers for each row of dim 0, which add up as the rows do.

    Args:
        tensor: Floating, of any dtype and device.

    Returns:
        Shape (rows, NUM_NUMBERS), float64.
    """
    rows = tensor.detach().reshape(tensor.size(0), -1).to("cpu", torch.float64)
    padded = -(-rows.size(1) // NUM_NUMBERS) * NUM_NUMBERS
    weighted = torch.zeros(rows.size(0), padded, dtype=torch.float64)
    weighted[:, : rows.size(1)] = rows * _signs(rows.size(1))
    return weighted.view(rows.size(0), -1, NUM_NUMBERS).sum(dim=1).numpy()


@lru_cache(maxsize=64)
def _signs(width: int) -> Tensor:
    """Return a weight for each element of a row: random in sign and size, so that exchanged elements show."""
    random = np.random.default_rng(0)
    return torch.from_numpy(random.choice([-1.0, 1.0], width) * random.uniform(0.75, 1.25, width))
