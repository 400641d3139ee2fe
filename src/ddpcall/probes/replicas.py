"""The replicas probe: since which step, and in which parameters and buffers, are the ranks' models different?"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpcall.evidence import ReplicaEvidence
from ddpcall.replicas import differs_between_ranks, digest_state, digest_tensors, gather_over_ranks
from ddpcall.wrappers import local_part


class ReplicasObserver:
    """Keeps one digest per parameter, buffer and step; compares them all at the end, in one collective."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None, sharded: Collection[str]) -> None:
        self._model = model
        self._group = group
        self._replicated = {name: p for name, p in model.named_parameters() if name not in sharded}
        self._parameters: list[Tensor] = []
        self._buffers: list[Tensor] = []
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.initial_digest = digest_state({name: local_part(tensor) for name, tensor in state.items()})

    def end_step(self) -> None:
        """Take the digests; call it after the optimizer stepped."""
        self._parameters.append(digest_tensors(local_part(tensor) for tensor in self._replicated.values()))
        self._buffers.append(digest_tensors(self._model.buffers()))

    def evidence(self) -> ReplicaEvidence:
        """Return the comparison. A collective: every rank must call it."""
        parameter_names = list(self._replicated)
        buffer_names = [name for name, _ in self._model.named_buffers()]
        first_parameters, parameters = self._compare(self._parameters, parameter_names)
        first_buffers, buffers = self._compare(self._buffers, buffer_names)
        return ReplicaEvidence(
            first_step_parameters=first_parameters,
            first_step_buffers=first_buffers,
            parameters=parameters,
            buffers=buffers,
            initial_digest=self.initial_digest,
        )

    def _compare(self, steps: list[Tensor], names: list[str]) -> tuple[int | None, tuple[str, ...]]:
        if not steps or not names:
            return None, ()
        differs = differs_between_ranks(gather_over_ranks(torch.stack(steps), self._group))
        in_step = differs.any(dim=1).nonzero().flatten().tolist()
        at_end = [name for name, differ in zip(names, differs[-1].tolist(), strict=True) if differ]
        return (in_step[0] if in_step else None), tuple(at_end)


@contextmanager
def observe_replicas(
    model: nn.Module, group: dist.ProcessGroup | None, sharded: Collection[str] = ()
) -> Iterator[ReplicasObserver]:
    """Digest parameters and buffers after every step and compare the digests across ranks at the end.

    Args:
        model: The inner module, wrapped already; the same tensors in the same order on every rank.
        group: A gloo process group of the probe's own; None for a world of one rank.
        sharded: Names of parameters of which each rank holds another part; those are left out.

    Yields:
        The observer. Nothing is done to the model.

    Blind to: differences that came and went between two optimizer steps; state outside parameters and buffers.
    """
    yield ReplicasObserver(model, group, frozenset(sharded))
