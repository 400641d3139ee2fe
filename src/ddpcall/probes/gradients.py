"""The gradients probe: how far apart are the ranks' gradients, parameter by parameter and step by step?"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpcall.evidence import GradientEvidence
from ddpcall.paths import Batch
from ddpcall.probes.probe import Observer, Probe, Setting
from ddpcall.replicas import differs_between_ranks, digest_tensors, gather_over_ranks
from ddpcall.shards import local_part

# Gradients of several steps are compared in one collective, as long as they fit in this much memory.
BUFFER_BYTES = 32 * 2**20
NAN, INFINITY = 3.2e38, 3.3e38  # stand for them: a maximum over ranks needs numbers that can be compared


class GradientsObserver(Observer):
    """Keeps each step's gradients and compares them across ranks once the buffer is full."""

    kept = (
        "_with_shards", "_sizes", "_names", "_took_part", "_batches", "_max_difference", "_max_magnitude",
        "_differing", "_without_gradient",
    )  # fmt: skip

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None, sharded: Collection[str]) -> None:
        self._all = dict(model.named_parameters())
        self._group = group
        self._sharded = sharded
        self._with_shards: list[str] = []
        self._sizes: list[int] = []
        self._names: list[str] = []
        self._pending: list[Tensor] = []
        self._took_part: list[bool] = []
        self._batches: list[Tensor] = []
        self._max_difference: list[float] = []
        self._max_magnitude: list[float] = []
        self._differing: dict[str, float] = {}
        self._without_gradient: list[str] = []

    def end_backward(self, batch: Batch | None) -> None:
        """Keep the gradients of this step.

        A parameter without a gradient counts as zeros, and on one rank only, as a difference.

        Args:
            batch: What this rank computed them from; None where it had no batch: it is not compared then.
        """
        parameters = self._all
        self._without_gradient = [name for name, parameter in parameters.items() if parameter.grad is None]
        self._with_shards = [n for n in parameters if n in self._sharded and n not in self._without_gradient]
        compared = {name: p for name, p in parameters.items() if name not in self._sharded}
        gradients = [_flat_gradient(parameter) for parameter in compared.values()]
        self._names = list(compared)
        self._sizes = [gradient.numel() for gradient in gradients]
        self._pending.append(torch.cat(gradients or [torch.zeros(0)]).to("cpu", torch.float32))
        self._took_part.append(batch is not None)
        self._batches.append(self._batches[-1] if batch is None else digest_tensors([batch.inputs, batch.targets]))
        # Every rank holds the same sizes, so every rank flushes in the same step.
        if sum(flat.numel() * flat.element_size() for flat in self._pending) >= BUFFER_BYTES:
            self.flush()

    def with_gradient(self) -> int:
        """Return how many parameters had a gradient in the last closed step."""
        return len(self._all) - len(self._without_gradient)

    def flush(self) -> None:
        """Compare what was kept. A collective: every rank must call it after the same step."""
        if not self._pending:
            return
        steps = torch.stack(self._pending)
        self._pending = []
        if steps.numel() == 0:  # all sharded
            self._max_magnitude += [0.0] * len(steps)
            self._max_difference += [0.0] * len(steps)
            return
        magnitude = steps.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs()
        self._max_magnitude += self._max_over_ranks(magnitude).amax(dim=1).tolist()
        steps = steps.nan_to_num(nan=NAN, posinf=INFINITY, neginf=-INFINITY)  # equal where they are on all ranks
        difference = self._max_over_ranks(steps) + self._max_over_ranks(-steps)
        self._max_difference += difference.amax(dim=1).tolist()
        parts = difference.amax(dim=0).split(self._sizes)
        worst = [part.max().item() if part.numel() else 0.0 for part in parts]
        for name, value in zip(self._names, worst, strict=True):
            if value > 0:
                self._differing[name] = max(value, self._differing.get(name, 0.0))

    def _max_over_ranks(self, values: Tensor) -> Tensor:
        absent = ~torch.tensor(self._took_part[-len(values) :])
        values = values.masked_fill(absent[:, None], -torch.inf)
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
            parameters=dict(self._differing),
            with_gradient=self.with_gradient(),
            without_gradient=tuple(self._without_gradient),
            batches_differ=batches_differ,
            sharded=tuple(self._with_shards),
        )

    def columns(self, evidence: GradientEvidence) -> dict[str, Sequence[float | None]]:
        """Return by step how far the ranks lay apart."""
        return {"gradient_max_difference": evidence.max_difference}


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    """Return the gradient as one row; a parameter without a gradient counts as zeros."""
    if parameter.grad is None:
        part = local_part(parameter)
        return torch.zeros(part.numel(), device=part.device)
    return local_part(parameter.grad).reshape(-1)


@contextmanager
def observe_gradients(
    model: nn.Module, group: dist.ProcessGroup | None, sharded: Collection[str] = ()
) -> Generator[GradientsObserver]:
    """Compare gradients across ranks, as they stand before each optimizer step.

    Args:
        model: The inner module, wrapped already; the same parameters in the same order on every rank. Those it
            has now are watched, as an optimizer built now would step them.
        group: A gloo process group of the probe's own, so that the subject's collectives stay untouched;
            None for a world of one rank.
        sharded: Names of parameters of which each rank holds another part; those are only counted.

    Yields:
        The observer. Nothing is done to the model.

    Blind to: gradients that were changed alike on all ranks; whether sharded gradients were summed.
    """
    yield GradientsObserver(model, group, frozenset(sharded))


def _observe(setting: Setting) -> AbstractContextManager[GradientsObserver]:
    return observe_gradients(setting.subject.inner, setting.group, setting.sharded)


PROBE = Probe(name="gradients", observe=_observe)
