"""The gradients probe: how far apart are the ranks' gradients, parameter by parameter and step by step?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpcall.evidence import GradientEvidence
from ddpcall.paths import Batch
from ddpcall.replicas import differs_between_ranks, digest_tensors, gather_over_ranks

# Gradients of several steps are compared in one collective, as long as they fit in this much memory.
BUFFER_BYTES = 32 * 2**20


class GradientsObserver:
    """Keeps each step's gradients and compares them across ranks once the buffer is full."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None) -> None:
        self._model = model
        self._group = group
        self._names: list[str] = []
        self._pending: list[Tensor] = []
        self._batches: list[Tensor] = []
        self._max_difference: list[float] = []
        self._max_magnitude: list[float] = []
        self._parameters: dict[str, float] = {}
        self._without_gradient: list[str] = []

    def end_step(self, batch: Batch) -> None:
        """Keep the gradients of this step; call it after the backward, before the optimizer steps.

        A parameter without a gradient counts as zeros, and on one rank only, as a difference.
        """
        names, gradients = [], []
        self._without_gradient = []
        for name, parameter in self._model.named_parameters():
            names.append(name)
            if parameter.grad is None:
                self._without_gradient.append(name)
                gradients.append(torch.zeros(parameter.numel(), device=parameter.device))
            else:
                gradients.append(parameter.grad.reshape(-1))
        self._names = names
        self._pending.append(torch.cat(gradients).to("cpu", torch.float32))
        self._batches.append(digest_tensors([batch.inputs, batch.targets]))
        # Every rank holds the same sizes, so every rank flushes in the same step.
        if sum(flat.numel() * flat.element_size() for flat in self._pending) >= BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Compare what was kept. A collective: every rank must call it after the same step."""
        if not self._pending:
            return
        steps = torch.stack(self._pending)
        self._pending = []
        difference = self._max_over_ranks(steps) + self._max_over_ranks(-steps)
        self._max_magnitude += self._max_over_ranks(steps.abs()).amax(dim=1).tolist()
        self._max_difference += difference.amax(dim=1).tolist()
        sizes = [parameter.numel() for parameter in self._model.parameters()]
        worst = [part.max().item() if part.numel() else 0.0 for part in difference.amax(dim=0).split(sizes)]
        for name, value in zip(self._names, worst, strict=True):
            if value > 0:
                self._parameters[name] = max(value, self._parameters.get(name, 0.0))

    def _max_over_ranks(self, values: Tensor) -> Tensor:
        values = values.clone()
        if self._group is not None:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group)
        return values

    def evidence(self) -> GradientEvidence:
        """Return the comparison. A collective: every rank must call it."""
        self.flush()
        batches_differ = bool(self._batches)
        if self._batches:
            gathered = gather_over_ranks(torch.stack(self._batches), self._group)
            batches_differ = bool(differs_between_ranks(gathered).any(dim=1).all())
        return GradientEvidence(
            max_difference=tuple(self._max_difference),
            max_magnitude=tuple(self._max_magnitude),
            parameters=dict(self._parameters),
            with_gradient=len(self._names) - len(self._without_gradient),
            without_gradient=tuple(self._without_gradient),
            batches_differ=batches_differ,
        )


@contextmanager
def observe_gradients(model: nn.Module, group: dist.ProcessGroup | None) -> Iterator[GradientsObserver]:
    """Compare gradients across ranks, as they stand before each optimizer step.

    Args:
        model: The inner module; the same parameters in the same order on every rank.
        group: A gloo process group of the probe's own, so that the subject's collectives stay untouched;
            None for a world of one rank.

    Yields:
        The observer. Nothing is done to the model.

    Blind to: gradients that were changed alike on all ranks; sharded parameters, of which each rank holds
    another part.
    """
    yield GradientsObserver(model, group)
