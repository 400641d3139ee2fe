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

REDUCE_STATISTICS = (
    "Let every rank make the same update: in the forward that updates them, reduce what they are made of first, "
    "`dist.all_reduce(count)` and `dist.all_reduce(total)`, and merge means and variances by their counts. "
    "SyncBatchNorm helps batch norm alone; a broadcast keeps rank 0's updates only."
)


@dataclass(frozen=True)
class Divergence:
    """What a comparison of the ranks' vitals showed.

    Attributes:
        step: Optimizer step, from 1, after which it was first seen.
        groups: By part that differs (or, for batch and rng, that should and does not): the ranks that agree.
        parameters: Names of the parameters (or buffers) that differ; empty before the second round.
        settings: Optimizer settings that differ: value by rank, by name.
        modules: Modes that differ and matter: mode by rank, by module.
        is_confirmed: Whether the parameters were seen to differ more than once.
        difference: The largest one of a parameter (or buffer), relative to its norm; 0 where it was not measured.
        load_site: The line that loaded a checkpoint, on some ranks only.
        mode_site: The line that switched to eval, where that differs between ranks.
        optimizer_site: The line that set the optimizer up, or its schedule.
        scaler_site: The line that loaded a GradScaler's state on some ranks only, else the step.
        forward_site: The wrapper's forward.
        step_site: The last optimizer step.
        buffer_site: The line that evaluated or saved the model.
        buffer_use: `evaluated` or `saved`.
        change_site: The line that changes such buffers, where it was seen.
        has_own_statistics: Whether buffers differ that are no batch norm's.
    """

    step: int
    groups: Mapping[str, tuple[tuple[int, ...], ...]]
    parameters: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)
    modules: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    is_confirmed: bool = True
    difference: float = 0.0
    load_site: CallSite | None = None
    mode_site: CallSite | None = None
    optimizer_site: CallSite = NOWHERE
    scaler_site: CallSite = NOWHERE
    forward_site: CallSite = NOWHERE
    step_site: CallSite = NOWHERE
    buffer_site: CallSite = NOWHERE
    buffer_use: str = ""
    change_site: CallSite = NOWHERE
    has_own_statistics: bool = False


def diagnose_divergence(divergence: Divergence, explained: bool) -> Iterator[Finding]:
    """Turn a comparison into findings.

    Args:
        divergence: What differs.
        explained: Whether a finding already says why parameters differ; then that is not said again.
    """
    for part, groups in divergence.groups.items():
        if part == "parameters":
            if divergence.load_site is not None:
                yield _compared("DC202", divergence, groups, divergence.load_site, _loaded(divergence))
            elif not explained and "optimizer" not in divergence.groups:
                yield _compared("DC201", divergence, groups, NOWHERE, _diverged(divergence, groups))
        elif part == "optimizer":
            settings = dict(divergence.settings)
            scales = settings.pop(LOSS_SCALE, None)
            if scales is not None and not explained:
                site, message = divergence.scaler_site, _loss_scales(divergence.step, scales)
                yield _compared("DC208", divergence, groups, site, message)
            if (settings or scales is None) and not _is_shared_out(settings, divergence, explained):
                message = _settings(divergence.step, settings)
                yield _compared("DC203", divergence, groups, divergence.optimizer_site, message)
        elif part == "steps":
            message = _steps(divergence.settings["steps"])
            yield _compared("DC502", divergence, groups, divergence.step_site, message)
        elif part == "modes":
            yield _compared("DC204", divergence, groups, divergence.mode_site or NOWHERE, _modes(divergence))
        elif part == "buffers":
            message = _buffers(divergence, groups)
            fix = REDUCE_STATISTICS if divergence.has_own_statistics else ""
            site = divergence.buffer_site if divergence.change_site == NOWHERE else divergence.change_site
            yield _compared("DC205", divergence, groups, site, message, fix)
        elif part == "batch":
            message = (
                f"All {len(groups[0])} ranks were fed the same inputs here, until optimizer step {divergence.step}"
            )
            yield _compared("DC206", divergence, groups, divergence.forward_site, message)
        elif part == "rng":
            message = (
                f"All {len(groups[0])} ranks' random generators were in the same state after optimizer step "
                f"{divergence.step}, and the model draws dropout masks: they are identical on all ranks."
            )
            yield _compared("DC207", divergence, groups, divergence.forward_site, message)


def _compared(
    code: str,
    divergence: Divergence,
    groups: tuple[tuple[int, ...], ...],
    site: CallSite,
    message: str,
    fix: str = "",
) -> Finding:
    return make_finding(
        code,
        CATALOGUE[code].name,
        site,
        message,
        step=divergence.step,
        ranks=_odd_ranks(groups),
        parameters=divergence.parameters if code in ("DC201", "DC202", "DC205") else tuple(divergence.modules),
        fix=fix,
        severity=_severity(code, divergence),
    )


def _severity(code: str, divergence: Divergence) -> Severity:
    if code == "DC201" and not divergence.is_confirmed:
        return Severity.WARNING
    if code == "DC205" and divergence.buffer_use == "saved":
        return Severity.NOTE
    return CATALOGUE[code].severity


def _odd_ranks(groups: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Return the ranks outside the largest group, or all where no group is larger than the others."""
    ordered = sorted(groups, key=len, reverse=True)
    if len(ordered) > 1 and len(ordered[0]) > len(ordered[1]):
        ordered = ordered[1:]
    return tuple(sorted(rank for group in ordered for rank in group))


def _groups(groups: tuple[tuple[int, ...], ...]) -> str:
    shown = [", ".join(map(str, group[:8])) + (", …" if len(group) > 8 else "") for group in groups[:4]]
    return " ≠ ".join(f"rank{'s' * (len(group) > 1)} {text}" for group, text in zip(groups, shown, strict=False))


def _loaded(divergence: Divergence) -> str:
    number = len(divergence.parameters)
    count = "1 parameter differs" if number == 1 else f"{number} parameters differ"
    return (
        f"load_state_dict ran here on some ranks only, and {count} between ranks after optimizer step "
        f"{divergence.step}."
    )


def _diverged(divergence: Divergence, groups: tuple[tuple[int, ...], ...]) -> str:
    number = len(divergence.parameters)
    count = (
        ("1 parameter differs" if number == 1 else f"{number} parameters differ")
        if number
        else "Parameters differ"
    )
    size = f", by up to {divergence.difference:.1e} of a parameter's norm" if divergence.difference else ""
    doubt = (
        "" if divergence.is_confirmed else " It was seen once; the run ended before the ranks were asked again."
    )
    return f"{count} between ranks after optimizer step {divergence.step} ({_groups(groups)}){size}.{doubt}"


def _buffers(divergence: Divergence, groups: tuple[tuple[int, ...], ...]) -> str:
    size = f", by up to {divergence.difference:.1e} of a buffer's norm" if divergence.difference else ""
    apart = f"buffers differ between ranks ({_groups(groups)}{size})"
    if divergence.change_site != NOWHERE:
        used = f"{os.path.basename(divergence.buffer_site.file)}:{divergence.buffer_site.line}"
        return (
            f"Each rank adds its own batches alone to buffers here. When the model is {divergence.buffer_use} at "
            f"{used}, after optimizer step {divergence.step}, its {apart}. The next training forward of the "
            "wrapper broadcasts rank 0's: what the other ranks' batches added since is thrown away every time."
        )
    if divergence.buffer_use == "saved":
        return (
            f"The checkpoint that is written here after optimizer step {divergence.step} has this rank's buffers, "
            f"and {apart}: what the other ranks' say of their batches is lost, there and at the next training "
            "forward."
        )
    return (
        f"Ranks evaluate the model here past its wrapper after optimizer step {divergence.step}, while its "
        f"{apart}: "
        "each rank's result is that of a model of its own, until the next training forward broadcasts rank 0's."
        + " What the other ranks' batches added since is thrown away then."
        * divergence.has_own_statistics
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


def _steps(counts: Mapping[int, int]) -> str:
    first_of = {steps: rank for rank, steps in sorted(counts.items(), reverse=True)}
    told = [f"rank {rank} took {steps} steps" for steps, rank in sorted(first_of.items(), reverse=True)]
    shown = ", ".join(told if len(told) <= 4 else [*told[:2], "…", told[-1]])
    return f"The ranks took different numbers of optimizer steps: {shown}. They ended with different parameters."


def _modes(divergence: Divergence) -> str:
    name, modes = next(iter(divergence.modules.items()), ("", {}))
    return (
        f"{len(divergence.modules)} modules that depend on the mode are in train mode on some ranks and in "
        "eval mode on "
        f"others in optimizer step {divergence.step}: {name} is {_by_rank(modes)}."
    )


def _by_rank(values: Mapping[int, Any]) -> str:
    return ", ".join(f"{value} on rank {rank}" for rank, value in list(values.items())[:4])
