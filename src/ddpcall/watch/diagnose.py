"""Events and comparisons in, findings out. Pure: no torch, no clock, nothing remembered."""

from __future__ import annotations

from collections.abc import Callable

from ddpcall.findings import CATALOGUE, Finding, Severity
from ddpcall.watch.events import Event, EventKind

CODES: dict[EventKind, str] = {
    EventKind.BYPASSED: "DC101",
    EventKind.RAW_WEIGHTS: "DC101",
    EventKind.CONSUMED: "DC101",
    EventKind.AUTOGRAD_GRAD: "DC101",
    EventKind.UNOWNED: "DC102",
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
}
SEVERITIES = {EventKind.NO_SYNC_WITHOUT_EFFECT: Severity.WARNING}


def diagnose(event: Event, rank: int) -> Finding:
    """Turn one event into the finding it amounts to.

    Args:
        event: What happened on this rank; events that did no harm are not emitted in the first place.
        rank: This rank.
    """
    rule = CATALOGUE[CODES[event.kind]]
    return Finding(
        code=rule.code,
        name=rule.name,
        severity=SEVERITIES.get(event.kind, rule.severity),
        message=_MESSAGES[event.kind](event),
        file=event.site.file,
        line=event.site.line,
        function=event.site.function,
        ranks=(rank,),
        step=event.step,
        parameters=event.parameters,
        cause=event.kind.value,
        fix=rule.fix,
    )


def _gradients(event: Event) -> str:
    count = len(event.parameters)
    return f"{count} parameter{'s' * (count != 1)}"


def _model(event: Event) -> str:
    return str(event.facts.get("model", "the model"))


def _and_lines(event: Event) -> str:
    lines = sorted({site.line for site in event.others if site.file == event.site.file} - {event.site.line})
    return f" (and line{'s' * (len(lines) > 1)} {', '.join(map(str, lines))})" if lines else ""


def _bypassed(event: Event) -> str:
    return (
        f"The forward entered {_model(event)} here{_and_lines(event)}, past its DistributedDataParallel wrapper, so the "
        f"reducer was not armed: in optimizer step {event.step}, gradients of {_gradients(event)} were used as "
        "computed on this rank alone."
    )


def _raw_weights(event: Event) -> str:
    return (
        f"Weights of {_model(event)} are used here without any forward of its wrapper, so the reducer was not armed: "
        f"in optimizer step {event.step}, gradients of {_gradients(event)} were used as computed on this rank alone."
    )


def _consumed(event: Event) -> str:
    return (
        f"This backward came after another had used up the reducer of {_model(event)}: a forward arms it for one "
        f"backward. In optimizer step {event.step}, gradients of {_gradients(event)} were used unreduced."
    )


def _autograd_grad(event: Event) -> str:
    return (
        f"torch.autograd.grad returns gradients without accumulating them, so the reducer of {_model(event)} never "
        f"sees them: in optimizer step {event.step}, gradients of {_gradients(event)} were used unreduced."
    )


def _unowned(event: Event) -> str:
    return (
        f"{_gradients(event).capitalize()} of the wrapped model became trainable after wrapping, here; no reducer owns "
        f"them. In optimizer step {event.step} they were stepped with this rank's own gradients."
    )


def _detached(event: Event) -> str:
    return (
        f"This conversion replaced the storage of {_gradients(event)} of {_model(event)} after wrapping; the reducer's "
        f"hooks hang on nodes that no backward reaches. In optimizer step {event.step} their gradients were used "
        "unreduced."
    )


def _sync_off(event: Event) -> str:
    return (
        f"Synchronisation was switched off here when the last forward of {_model(event)}{_and_lines(event)} before "
        f"optimizer step {event.step} ran: gradients of {_gradients(event)} were used unreduced."
    )


def _no_effect(event: Event) -> str:
    return (
        "no_sync() around a backward alone has no effect: the forward before it had armed the reducer, and the "
        "gradients were reduced."
    )


def _stepped_early(event: Event) -> str:
    return (
        f"The optimizer stepped inside the backward (step {event.step}), before the reducer had averaged the gradients "
        f"of {_gradients(event)}."
    )


def _with_facts(template: str) -> Callable[[Event], str]:
    return lambda event: template.format(**event.facts)


_MESSAGES: dict[EventKind, Callable[[Event], str]] = {
    EventKind.BYPASSED: _bypassed,
    EventKind.RAW_WEIGHTS: _raw_weights,
    EventKind.CONSUMED: _consumed,
    EventKind.AUTOGRAD_GRAD: _autograd_grad,
    EventKind.UNOWNED: _unowned,
    EventKind.DETACHED: _detached,
    EventKind.SYNC_OFF: _sync_off,
    EventKind.NO_SYNC_WITHOUT_EFFECT: _no_effect,
    EventKind.STEPPED_EARLY: _stepped_early,
    EventKind.HOOKS_SKIPPED: _with_facts(
        "{module} has {hooks} and was entered through .forward here: none of them ran."
    ),
    EventKind.STALE_WEIGHT: _with_facts(
        "{module} was entered through .forward here: {hook} did not recompute its {name}, and a stale one was used."
    ),
    EventKind.COMPILED_BYPASSED: _with_facts("{module} was compiled, and runs eager when it is reached from here."),
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
