"""Events and comparisons in, findings out. Pure: no torch, no clock, nothing remembered."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ddpcall.findings import CATALOGUE, Finding, Place, Rule, Severity
from ddpcall.taps import NOWHERE, CallSite
from ddpcall.watch.advice import Advice
from ddpcall.watch.compare.vitals import LOSS_SCALE
from ddpcall.watch.events import Event, EventKind

CODES: dict[EventKind, str] = {
    EventKind.BYPASSED: "DC101",
    EventKind.RAW_WEIGHTS: "DC101",
    EventKind.IN_FORWARD: "DC101",
    EventKind.CONSUMED: "DC101",
    EventKind.AUTOGRAD_GRAD: "DC101",
    EventKind.WRITTEN: "DC101",
    EventKind.UNOWNED: "DC102",
    EventKind.OUTSIDE: "DC102",
    EventKind.DETACHED: "DC103",
    EventKind.SYNC_OFF: "DC104",
    EventKind.NO_SYNC_WITHOUT_EFFECT: "DC104",
    EventKind.STEPPED_EARLY: "DC105",
    EventKind.HOOKS_SKIPPED: "DC301",
    EventKind.COMPILED_BYPASSED: "DC302",
    EventKind.LATE_HOOK: "DC303",
    EventKind.PRECISION_LOST: "DC304",
    EventKind.STALE_WEIGHT: "DC305",
    EventKind.SHARDED_BYPASSED: "DC306",
    EventKind.SHARDED_UNREDUCED: "DC306",
    EventKind.SHARDED_SYNC_OFF: "DC104",
}
SEVERITIES = {EventKind.NO_SYNC_WITHOUT_EFFECT: Severity.WARNING}


def diagnose(event: Event) -> Finding:
    """Turn one event into the finding it amounts to, of the rank it happened on."""
    rule = CATALOGUE[CODES[event.kind]]
    return Finding(
        code=rule.code,
        name=rule.name,
        severity=SEVERITIES.get(event.kind, rule.severity),
        message=_MESSAGES[event.kind](event),
        file=event.site.file,
        line=event.site.line,
        function=event.site.function,
        ranks=(),
        step=event.step,
        parameters=event.parameters,
        cause=event.kind.value,
        fix=_fix(event, rule),
        called_from=_caller(event.site),
    )


def _caller(site: CallSite) -> Place | None:
    caller = site.called_from
    return None if caller is None else Place(caller.file, caller.line, caller.function)


def _fix(event: Event, rule: Rule) -> str:
    """Return what to write instead: in the script's own names, where the line tells."""
    advice = _advice(event)
    fix = _FIXES.get(event.kind, rule.fix)
    if event.kind is EventKind.BYPASSED and event.others:
        wrapper = f"the wrapper, `{advice.wrapper}`," if advice.wrapper else "the wrapper"
        fix = f"Let `forward` do what these lines do, and call {wrapper} once."
    elif event.kind is EventKind.BYPASSED and advice.fix:
        fix = advice.fix
    elif event.kind is EventKind.BYPASSED and advice.wrapper:
        fix = fix.replace("`loss = ddp(batch)`", f"`{advice.wrapper}(...)`")
    package = re.search(r"/(?:site|dist)-packages/([^/]+)", event.site.file)
    if package and event.kind in _IN_THE_LINE:
        library = package[1].removesuffix(".py")
        fix += f" The line is {library}'s: override it in code of your own, or report it there."
    return fix


def _advice(event: Event) -> Advice:
    return event.facts.get("advice", Advice())


_AVERAGE = "`dist.all_reduce(p.grad)`, then `p.grad /= dist.get_world_size()`"
_IN_THE_LINE = (EventKind.BYPASSED, EventKind.RAW_WEIGHTS)
_FIXES = {
    EventKind.RAW_WEIGHTS: "Use these weights inside the model's `forward`, and call the wrapper.",
    EventKind.IN_FORWARD: "Average the gradients of that backward before the step, for each parameter `p`: "
    f"{_AVERAGE}.",
    EventKind.CONSUMED: "Add the losses up and call `backward()` once, or call the wrapper before each backward.",
    EventKind.AUTOGRAD_GRAD: "Use `loss.backward()`, or average what `torch.autograd.grad` returns, for each "
    "gradient `g`: `dist.all_reduce(g)`, then `g /= dist.get_world_size()`.",
    EventKind.WRITTEN: f"Average the gradients after writing them, for each parameter `p`: {_AVERAGE}.",
}


def _gradients(event: Event) -> str:
    count = len(event.parameters)
    return f"{count} parameter{'s' * (count != 1)}"


def _model(event: Event) -> str:
    return str(event.facts.get("model", "the model"))


def _and_lines(event: Event) -> str:
    lines = sorted({site.line for site in event.others if site.file == event.site.file} - {event.site.line})
    return f" (and line{'s' * (len(lines) > 1)} {', '.join(map(str, lines))})" if lines else ""


def _local(event: Event) -> str:
    """Return what the harm is, of gradients that nobody averaged."""
    return f"optimizer step {event.step} used gradients of {_gradients(event)} as computed on this rank alone."


def _bypassed(event: Event) -> str:
    advice, model, lines = _advice(event), _model(event), _and_lines(event)
    through = f"`{advice.called}`" if advice.called else ""
    wrapper, averaged = _wrapper(event)
    if advice.is_handed_over:
        entered = f"{through} ({model}) is handed over here{lines}, and is called past its {wrapper}"
    elif event.facts.get("was_called", True):
        entered = f"The forward entered {model} here{lines}{through and f' through {through}'}, past its {wrapper}"
    else:
        called = f"{through} ({'a part of ' * advice.is_part}{model})" if through else model
        entered = f"{called} is called here{lines}; its {wrapper} was never called"
    return f"{entered}. {averaged}: {_local(event)}"


def _wrapper(event: Event) -> tuple[str, str]:
    """Return what a call goes past, and when that averages."""
    if event.facts.get("is_replicate"):
        return (
            "`replicate` hook",
            "`replicate` averages gradients only in a backward that follows a call of the model",
        )
    name = f" `{_advice(event).wrapper}`" if _advice(event).wrapper else ""
    averaged = "DDP averages gradients only in a backward that follows a forward of the wrapper"
    return f"DistributedDataParallel wrapper{name}", averaged


def _raw_weights(event: Event) -> str:
    wrapper, averaged = _wrapper(event)
    before = "since the optimizer step before" if event.facts.get("was_called") else "at all"
    return (
        f"Weights of {_model(event)} are used here, and its {wrapper} was not called {before}. {averaged}: "
        f"{_local(event)}"
    )


def _in_forward(event: Event) -> str:
    backward = event.facts.get("backward", NOWHERE)
    here = " here" if backward == event.site else f" ({_line_of(backward, event.site)})"
    return (
        f"{_model(event)} ran a backward{here} inside its wrapper's forward. {_wrapper(event)[1]}: {_local(event)}"
    )


def _line_of(site: CallSite, seen_from: CallSite) -> str:
    return f"line {site.line}" if site.file == seen_from.file else f"{site.file}:{site.line}"


def _consumed(event: Event) -> str:
    return (
        f"A forward of {_model(event)}'s wrapper prepares DDP to average the gradients of one backward, and an "
        f"earlier backward had used that up when this one ran: {_local(event)}"
    )


def _autograd_grad(event: Event) -> str:
    return (
        f"torch.autograd.grad returns gradients without accumulating them, so the reducer of {_model(event)} "
        "never "
        f"sees them: in optimizer step {event.step}, gradients of {_gradients(event)} were used unreduced."
    )


def _written(event: Event) -> str:
    return (
        f"No backward of {_model(event)} ran before optimizer step {event.step}: gradients of {_gradients(event)} "
        "were written to .grad by hand, and they differ between ranks."
    )


def _unowned(event: Event) -> str:
    where = ", here" if event.facts.get("seen", True) else " and before the watch could see it"
    return (
        f"{_gradients(event).capitalize()} of the wrapped model became trainable after wrapping{where}; no "
        f"reducer owns them. In optimizer step {event.step} they were stepped with this rank's own gradients."
    )


def _outside(event: Event) -> str:
    count = event.facts["count"]
    return (
        f"{count} parameter{'s' * (count != 1)} handed to the optimizer here, trained beside a wrapped model, "
        f"belong to none: the same on all ranks before its step {event.step} and different after it."
    )


def _detached(event: Event) -> str:
    return (
        f"This conversion replaced the storage of {_gradients(event)} of {_model(event)} after wrapping; the "
        "reducer's "
        f"hooks hang on nodes that no backward reaches. In optimizer step {event.step} their gradients were used "
        "unreduced."
    )


def _sync_off(event: Event) -> str:
    return (
        f"Synchronisation was switched off here when the last forward of {_model(event)}{_and_lines(event)} "
        "before "
        f"optimizer step {event.step} ran: gradients of {_gradients(event)} were used unreduced."
    )


def _no_effect(event: Event) -> str:
    return (
        "no_sync() around a backward alone has no effect: the forward before it had already prepared DDP to "
        "average, and the gradients were averaged."
    )


def _sharded_unreduced(event: Event) -> str:
    return (
        f"{_model(event)} is sharded and was entered here{_and_lines(event)} past its hooks, while its parameters "
        f"happened to be gathered: nothing reduced their gradients, and optimizer step {event.step} went without "
        f"those of {_gradients(event)}."
    )


def _sharded_sync_off(event: Event) -> str:
    return (
        f"Gradient synchronisation of {_model(event)} was switched off here, and still off when optimizer step "
        f"{event.step} ran: gradients of {_gradients(event)} were kept unreduced, and the step went without them."
    )


def _stepped_early(event: Event) -> str:
    return (
        f"The optimizer stepped inside the backward (step {event.step}), before the reducer had averaged the "
        "gradients "
        f"of {_gradients(event)}."
    )


def _with_facts(template: str) -> Callable[[Event], str]:
    return lambda event: template.format(**event.facts)


_MESSAGES: dict[EventKind, Callable[[Event], str]] = {
    EventKind.BYPASSED: _bypassed,
    EventKind.RAW_WEIGHTS: _raw_weights,
    EventKind.IN_FORWARD: _in_forward,
    EventKind.CONSUMED: _consumed,
    EventKind.AUTOGRAD_GRAD: _autograd_grad,
    EventKind.WRITTEN: _written,
    EventKind.UNOWNED: _unowned,
    EventKind.OUTSIDE: _outside,
    EventKind.DETACHED: _detached,
    EventKind.SYNC_OFF: _sync_off,
    EventKind.NO_SYNC_WITHOUT_EFFECT: _no_effect,
    EventKind.STEPPED_EARLY: _stepped_early,
    EventKind.SHARDED_UNREDUCED: _sharded_unreduced,
    EventKind.SHARDED_SYNC_OFF: _sharded_sync_off,
    EventKind.HOOKS_SKIPPED: _with_facts(
        "{module} has {hooks} and was entered through .forward here: none of them ran."
    ),
    EventKind.STALE_WEIGHT: _with_facts(
        "{module} was entered through .forward here: {hook} did not recompute its {name}, and a stale one was "
        "used."
    ),
    EventKind.COMPILED_BYPASSED: _with_facts(
        "{module} was compiled, and runs eager when it is reached from here."
    ),
    EventKind.LATE_HOOK: _with_facts(
        "The hook registered here on {module}, after its first compiled call, has not fired since."
    ),
    EventKind.PRECISION_LOST: _with_facts(
        "{module} was prepared for {precision}, but ran outside its autocast when reached from here."
    ),
    EventKind.SHARDED_BYPASSED: _with_facts(
        "{module} is sharded and was entered here past the hooks that gather its parameters: {error}"
    ),
}


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
            yield _compared("DC205", divergence, groups, divergence.buffer_site, message)
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
    code: str, divergence: Divergence, groups: tuple[tuple[int, ...], ...], site: CallSite, message: str
) -> Finding:
    rule = CATALOGUE[code]
    return Finding(
        code=code,
        name=rule.name,
        severity=_severity(code, divergence),
        message=message,
        file=site.file,
        line=site.line,
        function=site.function,
        ranks=_odd_ranks(groups),
        step=divergence.step,
        parameters=divergence.parameters if code in ("DC201", "DC202", "DC205") else tuple(divergence.modules),
        cause=rule.name,
        fix=rule.fix,
        called_from=_caller(site),
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
