"""The replicas probe: since which step, and in which parameters and buffers, are the ranks' models different?"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpcall.evidence import ReplicaEvidence
from ddpcall.probes.probe import Observer, Probe, Setting
from ddpcall.replicas import differs_between_ranks, digest_state, digest_tensors, gather_over_ranks
from ddpcall.shards import local_part
from ddpcall.taps import is_lazy

# Parameters of several steps are compared with rank 0's together, as long as they fit in this much memory.
BUFFER_BYTES = 32 * 2**20


class ReplicasObserver(Observer):
    """Keeps one digest per parameter, buffer and step; compares them all at the end, in one collective."""

    kept = ("_of_parameters", "_of_buffers", "_distances", "initial_digest")

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None, sharded: Collection[str]) -> None:
        self._model = model
        self._group = group
        self._replicated = {name: p for name, p in model.named_parameters() if name not in sharded}
        self._of_parameters: list[Tensor] = []
        self._of_buffers: list[Tensor] = []
        self._trained = [p for p in self._replicated.values() if p.requires_grad]
        self._tells_distance = bool(self._trained) and not any(
            name in sharded for name, _ in model.named_parameters()
        )
        self._flat: list[Tensor] = []
        self._distances: list[float | None] = []
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.initial_digest = digest_state({name: local_part(tensor) for name, tensor in state.items()})

    def end_step(self, step: int) -> None:
        """Take the digests."""
        self._of_parameters.append(digest_tensors(local_part(tensor) for tensor in self._replicated.values()))
        self._of_buffers.append(digest_tensors(self._model.buffers()))
        if self._tells_distance and not any(is_lazy(parameter) for parameter in self._trained):
            self._flat.append(_flatten(self._trained))
            if sum(flat.numel() * flat.element_size() for flat in self._flat) >= BUFFER_BYTES:
                self.flush()
        else:
            self._distances.append(None)

    def flush(self) -> None:
        """Compare what was kept with rank 0. A collective: every rank must call it after the same step.

        Rank 0's parameters are only sent for the steps after which some digest differed.
        """
        if not self._flat:
            return
        digests = torch.stack(self._of_parameters[-len(self._flat) :])
        differ = differs_between_ranks(gather_over_ranks(digests, self._group)).any(dim=1)
        distances = torch.zeros(len(differ), dtype=torch.float64)
        if differ.any():
            ours = torch.stack(self._flat)[differ]
            of_rank_0 = ours.clone()
            dist.broadcast(of_rank_0, src=0, group=self._group)
            distances[differ] = _row_norms(ours - of_rank_0) / _row_norms(of_rank_0)
        self._distances += [value if math.isfinite(value) else None for value in distances.tolist()]
        self._flat = []

    def distances(self) -> list[float | None]:
        """Return by step how far this rank is from rank 0. A collective: every rank must call it.

        Returns:
            L2 distance of the trainable parameters from rank 0's, divided by the norm of the latter; None where
            a rank does not hold whole parameters, or they had no values yet, or no finite ones.
        """
        self.flush()
        return self._distances

    def evidence(self) -> ReplicaEvidence:
        """Return the comparison. A collective: every rank must call it."""
        parameter_names = list(self._replicated)
        buffer_names = [name for name, _ in self._model.named_buffers()]
        first_parameters, parameters = self._compare(self._of_parameters, parameter_names)
        first_buffers, buffers = self._compare(self._of_buffers, buffer_names)
        return ReplicaEvidence(
            first_step_parameters=first_parameters,
            first_step_buffers=first_buffers,
            parameters=parameters,
            buffers=buffers,
            initial_digest=self.initial_digest,
        )

    def columns(self, evidence: ReplicaEvidence) -> dict[str, Sequence[float | None]]:
        """Return the distances. A collective: every rank must call it."""
        return {"distance_to_rank0": self.distances()}

    def _compare(self, steps: list[Tensor], names: list[str]) -> tuple[int | None, tuple[str, ...]]:
        if not steps or not names:
            return None, ()
        differs = differs_between_ranks(gather_over_ranks(torch.stack(steps), self._group))
        in_step = differs.any(dim=1).nonzero().flatten().tolist()
        at_end = [name for name, differ in zip(names, differs[-1].tolist(), strict=True) if differ]
        return (in_step[0] if in_step else None), tuple(at_end)


def _flatten(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the values as one row, float32, on the CPU."""
    parts = [local_part(parameter).detach().reshape(-1) for parameter in parameters]
    return torch.cat(parts).to("cpu", torch.float32)


def _row_norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


@contextmanager
def observe_replicas(
    model: nn.Module, group: dist.ProcessGroup | None, sharded: Collection[str] = ()
) -> Generator[ReplicasObserver]:
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


def _observe(setting: Setting) -> AbstractContextManager[ReplicasObserver]:
    return observe_replicas(setting.subject.inner, setting.group, setting.sharded)


PROBE = Probe(name="replicas", observe=_observe)
