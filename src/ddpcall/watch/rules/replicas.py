"""DC2xx: what a comparison of the ranks' vitals amounts to. Pure: no torch, no clock, nothing remembered."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ddpcall.findings import CATALOGUE, Finding, Severity
from ddpcall.taps import NOWHERE, CallSite
from ddpcall.watch.compare.vitals import LOSS_SCALE
from ddpcall.watch.rules.rule import make_finding
from ddpcall.watch.sensors.last_sites import BufferUse

REDUCE_STATISTICS = (
    "Let every rank make the same update: in the forward that updates them, reduce what they are made of first, "
    "`dist.all_reduce(count)` and `dist.all_reduce(total)`, and merge means and variances by their counts. "
    "SyncBatchNorm helps batch norm alone; a broadcast keeps rank 0's updates only."
)


Groups = tuple[tuple[int, ...], ...]
"""Ranks that agree with each other."""


@dataclass(frozen=True)
class Divergence:
    """What differs between ranks of their parameters, the optimizer's settings and the modules' modes.

    Attributes:
        step: Optimizer step, from 1, after which it was first seen.
        groups: By part that differs: the ranks that agree.
        parameters: Names of the parameters that differ; empty before the second round.
        settings: Optimizer settings that differ: value by rank, by name.
        modules: Modes that differ and matter: mode by rank, by module.
        is_confirmed: Whether the parameters were seen to differ more than once.
        difference: The largest one of a parameter, relative to its norm; 0 where it was not measured.
        load_site: The line that loaded a checkpoint, on some ranks only.
        mode_site: The line that switched to eval, where that differs between ranks.
        optimizer_site: The line that set the optimizer up, or its schedule.
        scaler_site: The line that loaded a GradScaler's state on some ranks only, else the step.
    """

    step: int
    groups: Mapping[str, Groups]
    parameters: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)
    modules: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    is_confirmed: bool = True
    difference: float = 0.0
    load_site: CallSite = NOWHERE
    mode_site: CallSite = NOWHERE
    optimizer_site: CallSite = NOWHERE
    scaler_site: CallSite = NOWHERE

    def judge(self, explained: bool) -> Iterator[Finding]:
        """Yield what is wrong.

        Args:
            explained: Whether a finding already says why parameters differ; then that is not said again.
        """
        if "parameters" in self.groups:
            if self.load_site != NOWHERE:
                yield self._report(
                    "DC202", "parameters", self.load_site, _loaded(self), parameters=self.parameters
                )
            elif not explained and "optimizer" not in self.groups:
                severity = None if self.is_confirmed else Severity.WARNING
                details = {"parameters": self.parameters, "severity": severity}
                yield self._report("DC201", "parameters", NOWHERE, _diverged(self), **details)
        if "optimizer" in self.groups:
            settings = dict(self.settings)
            scales = settings.pop(LOSS_SCALE, None)
            if scales is not None and not explained:
                yield self._report("DC208", "optimizer", self.scaler_site, _loss_scales(self.step, scales))
            if (settings or scales is None) and not _is_shared_out(settings, self, explained):
                yield self._report("DC203", "optimizer", self.optimizer_site, _settings(self.step, settings))
        if "modes" in self.groups:
            yield self._report("DC204", "modes", self.mode_site, _modes(self), parameters=tuple(self.modules))

    def _report(self, code: str, part: str, site: CallSite, message: str, **details: Any) -> Finding:
        return _compared(code, self.groups[part], site, message, step=self.step, **details)


def _compared(code: str, groups: Groups, site: CallSite, message: str, **details: Any) -> Finding:
    return make_finding(code, CATALOGUE[code].name, site, message, ranks=_odd_ranks(groups), **details)


def judge_steps(step: int, groups: Groups, counts: Mapping[int, int], site: CallSite) -> Finding:
    """Return what is wrong where ranks took different numbers of steps.

    Args:
        step: The first that some did not take.
        groups: Ranks that took as many.
        counts: Steps by rank.
        site: The last optimizer step.
    """
    first_of = {steps: rank for rank, steps in sorted(counts.items(), reverse=True)}
    told = [f"rank {rank} took {steps} steps" for steps, rank in sorted(first_of.items(), reverse=True)]
    shown = ", ".join(told if len(told) <= 4 else [*told[:2], "…", told[-1]])
    message = (
        f"The ranks took different numbers of optimizer steps: {shown}. They ended with different parameters."
    )
    return _compared("DC502", groups, site, message, step=step)


def judge_buffers(
    use: BufferUse, groups: Groups, names: tuple[str, ...], difference: float, change: CallSite, has_own: bool
) -> Finding:
    """Return what is lost of buffers that differed between ranks when the model was evaluated or saved.

    Args:
        use: Where that was.
        groups: Ranks whose buffers are the same.
        names: The buffers.
        difference: The largest one, relative to a buffer's norm; 0 where it was not measured.
        change: The line that changes them, where it was seen.
        has_own: Whether some are no batch norm's.
    """
    return _compared(
        "DC205",
        groups,
        use.site if change == NOWHERE else change,
        _buffers(use, groups, difference, change, has_own),
        step=use.step,
        parameters=names,
        fix=REDUCE_STATISTICS if has_own else "",
        severity=Severity.NOTE if use.use == "saved" else None,
    )


def judge_same(part: str, step: int, num_ranks: int, site: CallSite) -> Finding:
    """Return what is wrong where batches or random states are the same on all ranks.

    Args:
        part: `batch` or `rng`.
        step: Optimizer step after which it was seen again.
        num_ranks: All of them.
        site: The wrapper's forward.
    """
    ranks = (tuple(range(num_ranks)),)
    if part == "batch":
        message = f"All {num_ranks} ranks were fed the same inputs here, until optimizer step {step}"
        return _compared("DC206", ranks, site, message, step=step)
    message = (
        f"All {num_ranks} ranks' random generators were in the same state after optimizer step {step}, and the "
        "model draws dropout masks: they are identical on all ranks."
    )
    return _compared("DC207", ranks, site, message, step=step)


def _odd_ranks(groups: Groups) -> tuple[int, ...]:
    """Return the ranks outside the largest group, or all where no group is larger than the others."""
    ordered = sorted(groups, key=len, reverse=True)
    if len(ordered) > 1 and len(ordered[0]) > len(ordered[1]):
        ordered = ordered[1:]
    return tuple(sorted(rank for group in ordered for rank in group))


def _groups(groups: Groups) -> str:
    shown = [", ".join(map(str, group[:8])) + (", …" if len(group) > 8 else "") for group in groups[:4]]
    return " ≠ ".join(f"rank{'s' * (len(group) > 1)} {text}" for group, text in zip(groups, shown, strict=False))


def _loaded(divergence: Divergence) -> str:
    return (
        f"load_state_dict ran here on some ranks only, and {_count(divergence)} between ranks after optimizer "
        f"step {divergence.step}."
    )


def _diverged(divergence: Divergence) -> str:
    size = f", by up to {divergence.difference:.1e} of a parameter's norm" if divergence.difference else ""
    doubt = (
        "" if divergence.is_confirmed else " It was seen once; the run ended before the ranks were asked again."
    )
    groups = _groups(divergence.groups["parameters"])
    count = _count(divergence) if divergence.parameters else "Parameters differ"
    return f"{count} between ranks after optimizer step {divergence.step} ({groups}){size}.{doubt}"


def _count(divergence: Divergence) -> str:
    number = len(divergence.parameters)
    return "1 parameter differs" if number == 1 else f"{number} parameters differ"


def _buffers(use: BufferUse, groups: Groups, difference: float, change: CallSite, has_own: bool) -> str:
    size = f", by up to {difference:.1e} of a buffer's norm" if difference else ""
    apart = f"buffers differ between ranks ({_groups(groups)}{size})"
    if change != NOWHERE:
        used = f"{os.path.basename(use.site.file)}:{use.site.line}"
        return (
            f"Each rank adds its own batches alone to buffers here. When the model is {use.use} at {used}, after "
            f"optimizer step {use.step}, its {apart}. The next training forward of the wrapper broadcasts rank "
            "0's: what the other ranks' batches added since is thrown away every time."
        )
    if use.use == "saved":
        return (
            f"The checkpoint that is written here after optimizer step {use.step} has this rank's buffers, and "
            f"{apart}: what the other ranks' say of their batches is lost, there and at the next training forward."
        )
    return (
        f"Ranks evaluate the model here past its wrapper after optimizer step {use.step}, while its {apart}: "
        "each rank's result is that of a model of its own, until the next training forward broadcasts rank 0's."
        + " What the other ranks' batches added since is thrown away then."
        * has_own
    )


def _is_shared_out(settings: Mapping[str, Any], divergence: Divergence, explained: bool) -> bool:
    """Say whether each rank's optimizer has its share of the parameters, and the script sends them to the others.

    They differ in how many they have, in nothing else, and the replicas are equal or known to be made so.
    """
    differ_in_number = bool(settings) and all(re.fullmatch(r"group \d+ parameters", name) for name in settings)
    return differ_in_number and (explained or "parameters" not in divergence.groups)


def _settings(step: int, settings: Mapping[str, Mapping[int, Any]]) -> str:
    named = [f"{name}: {_by_rank(values)}" for name, values in list(settings.items())[:3]]
    shown = "; ".join(named) if named else "settings"
    return f"The optimizer's settings differ between ranks in step {step}: {shown}."


def _loss_scales(step: int, scales: Mapping[int, float]) -> str:
    return (
        f"The GradScaler's loss scale differs between ranks in optimizer step {step}: "
        f"{_by_rank({rank: f'{scale:.10g}' for rank, scale in scales.items()})}. DDP averages the scaled "
        "gradients, and each rank divides the average by its own scale."
    )


def _modes(divergence: Divergence) -> str:
    name, modes = next(iter(divergence.modules.items()), ("", {}))
    return (
        f"{len(divergence.modules)} modules that depend on the mode are in train mode on some ranks and in eval "
        f"mode on others in optimizer step {divergence.step}: {name} is {_by_rank(modes)}."
    )


def _by_rank(values: Mapping[int, Any]) -> str:
    return ", ".join(f"{value} on rank {rank}" for rank, value in list(values.items())[:4])
