"""`measure_mixing`: three lines around a training step."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ddpcall.mixing.collect import MixingCollector
from ddpcall.mixing.exchange import exchange_records
from ddpcall.mixing.judge import judge_records
from ddpcall.mixing.record import RankSketches
from ddpcall.mixing.result import Mixing


class MixingMeasurement:
    """What `measure_mixing` yields: has the attributes of `Mixing` once the block has ended."""

    def __init__(self) -> None:
        self.result: Mixing | None = None

    def __getattr__(self, name: str) -> Any:
        if self.result is None:
            raise AttributeError(f"{name}: the mixing is known when the `with` block has ended")
        return getattr(self.result, name)

    def __str__(self) -> str:
        return str(self.result) if self.result else "mixing (not measured yet)"


@contextmanager
def measure_mixing(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], *, timeout_s: float = 60.0
) -> Generator[MixingMeasurement]:
    """Measure who learns from whom in the optimizer step that the block takes.

        with ddpcall.measure_mixing(model, optimizer) as mixing:
            train_step()
        print(mixing)

    Every rank writes the block. The ranks exchange what they saw when it ends, through the default store, without
    a collective. Of several steps the last one is judged; a gradient that arrives one step late is seen if the
    step before is in the block too. Everything is taken off again, also after an exception.

    Args:
        model: Wrapped or inner.
        optimizer: One, or all that step the model's parameters.
        timeout_s: Seconds to wait for other ranks at the end.

    Yields:
        An object that has the attributes of `Mixing` when the block has ended.

    Raises:
        RuntimeError: there is no process group, or one rank alone; no step was taken; ranks are missing.
        TypeError: what was given is no module, or no optimizer.
        ValueError: the optimizer holds none of the model's parameters.
    """
    _check_types(model, optimizer)
    if not dist.is_initialized():
        raise RuntimeError(
            "measure_mixing compares ranks, and there is no process group: call "
            "torch.distributed.init_process_group() first, and start the script with torchrun"
        )
    if dist.get_world_size() < 2:
        raise RuntimeError(
            "measure_mixing compares ranks, and there is only one: start the script with "
            "torchrun --nproc-per-node 2 or more"
        )
    collector = MixingCollector.of_model(model, optimizer)
    measurement = MixingMeasurement()
    collector.start()
    try:
        yield measurement
    except BaseException:
        collector.stop()
        exchange_records(RankSketches(dist.get_rank(), failure="the block raised").to_bytes(), 0.0, wait=False)
        raise
    record = collector.take()
    collector.stop()
    records = [RankSketches.from_bytes(data) for data in exchange_records(record.to_bytes(), timeout_s)]
    _check_stepped(records)
    measurement.result = judge_records(records)


def _check_types(model: Any, optimizer: Any) -> None:
    given = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    optimizers = given if isinstance(given, Sequence) else [given]
    if isinstance(model, nn.Module) and all(isinstance(each, Optimizer) for each in optimizers):
        return
    raise TypeError(
        f"measure_mixing was given a {type(model).__name__} and a {type(optimizer).__name__}. It needs the model, "
        "wrapped or inner, and the torch optimizer that steps it, or a list of them. Write: "
        "with measure_mixing(model, optimizer): train_step()"
    )


def _check_stepped(records: Sequence[RankSketches]) -> None:
    """Raise, on all ranks alike, where there is nothing to compare."""
    raised = [record.rank for record in records if record.failure == "the block raised"]
    if raised:
        raise RuntimeError(f"the block of measure_mixing raised on rank {', '.join(map(str, raised))}; see there")
    if any(record.failure for record in records) or sum(record.num_steps > 0 for record in records) >= 2:
        return
    if any(record.num_skipped for record in records):
        raise RuntimeError(
            "no step to measure: GradScaler skipped it, because gradients were not finite. Measure a later step"
        )
    raise RuntimeError(
        "no step to measure: the block must hold the backward and the optimizer.step() of an optimizer that was "
        "given, on two ranks or more. Write both inside: with measure_mixing(model, optimizer): train_step()"
    )
