"""Verdicts: pure functions of evidence. No torch, no processes, nothing remembered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ddpcall.evidence import (
    Evidence,
    Failure,
    GradientEvidence,
    HookCount,
    HooksOfStep,
    ModesEvidence,
    Skipped,
    StepTimeline,
)

# Reductions give every rank the same bits; the tolerance only allows for backends that round per rank.
RELATIVE_TOLERANCE = 1e-6
NO_DATA_PARALLELISM = "no data parallelism"
# Shapes of which several ranks' gradients are a part.
_MIXED = {"averaged", "summed", "scaled", "late", "groups", "dropped", "weighted", "partly_local"}


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What the evidence of one trial amounts to.

    Attributes:
        gradients: `synced` (equal on all ranks in every step, from different batches), `local` (they stayed
            on the rank that computed them, in at least one step), `no data parallelism` (they stayed there, and
            the wrapper is not there to change that), `sharded`, `none` (no parameter received a gradient) or
            `crashed`.
        mixing: The shape of the mixing matrix in the measured steps, one of `ddpcall.mixing.SHAPES`: `averaged`
            where every rank used the mean of all ranks' gradients in each of them, else the first other one;
            `no data parallelism`, `none` or `crashed` as above.
        hooks_wrapped: `fired` (every kind of hook registered on the wrapped object fired), `skipped` (the
            model ran and at least one kind did not), `none` (no hook there, or the model never ran).
        hooks_inner: The same for the user's own module.
        hooks_submodules: The same for the modules below it whose forward ran.
        compiled: `compiled` (a compiled graph ran in every step), `eager` (in at least one step none did),
            `none` (nothing was to be compiled, or the trial crashed).
        modes: `train` or `eval` (every module, on every rank), `mixed` (modules differ), `differs` (ranks differ).
        dropout: `identical` (all ranks dropped the same positions in every step), `different`, or `none`.
        statistics: batch norm's running statistics after the last step: `same` on all ranks, `differ`, `none`.
        evaluation_inner: `inner(x)` in eval mode after the training: `same` on all ranks, `differ`, `none`.
        evaluation_wrapped: the same of `wrapped(x)`.
        precision: Dtype in which linear layers and convolutions computed; `mixed`, or `none` if none ran.
    """

    gradients: str
    hooks_wrapped: str
    hooks_inner: str
    hooks_submodules: str
    compiled: str
    mixing: str = "none"
    modes: str = "none"
    dropout: str = "none"
    statistics: str = "none"
    evaluation_inner: str = "none"
    evaluation_wrapped: str = "none"
    precision: str = "none"


def judge(evidence: Evidence) -> Verdicts:
    """Compute all verdicts of one trial."""
    return Verdicts(
        gradients=judge_gradients(evidence),
        hooks_wrapped=judge_hooks(evidence, "wrapped"),
        hooks_inner=judge_hooks(evidence, "inner"),
        hooks_submodules=judge_hooks(evidence, "submodules"),
        compiled=judge_compiled(evidence),
        mixing=judge_mixing(evidence),
        **(judge_modes(evidence.modes) if evidence.modes is not None else {}),
    )


def judge_gradients(evidence: Evidence) -> str:
    """Say who ended up with whose gradients.

    Blind to: synchronisation where every rank had the same batch, or where there is one rank only: equality
    proves nothing there, so the verdict is `local`.
    """
    if evidence.failures:
        return "crashed"
    gradients = evidence.gradients
    if gradients is None or gradients.with_gradient == 0:
        return "none"
    if gradients.sharded:
        return "sharded"
    comparable = evidence.environment.world_size > 1 and gradients.batches_differ
    if comparable and _equal_in_every_step(gradients):
        return "synced"
    return "local" if evidence.data_parallel else NO_DATA_PARALLELISM


def _equal_in_every_step(gradients: GradientEvidence) -> bool:
    pairs = zip(gradients.max_difference, gradients.max_magnitude, strict=True)
    return all(difference <= RELATIVE_TOLERANCE * magnitude for difference, magnitude in pairs)


def judge_mixing(evidence: Evidence) -> str:
    """Say who learned from whom.

    Blind to: the steps that were not measured.
    """
    mixing = evidence.mixing
    if evidence.failures:
        return "crashed"
    if not evidence.data_parallel and (mixing is None or not set(mixing.shapes) & _MIXED):
        return NO_DATA_PARALLELISM
    shapes = mixing.shapes if mixing is not None else ()
    if evidence.gradients is not None and evidence.gradients.with_gradient == 0:
        shapes = tuple(shape for shape in shapes if shape != "unidentifiable")
    return next((shape for shape in shapes if shape != "averaged"), shapes[-1] if shapes else "none")


def judge_hooks(evidence: Evidence, role: str) -> str:
    """Say whether the hooks of one role fired.

    "Did not fire" counts as skipped only beside a forward that ran, somewhere in the model: a trial that
    crashed before any forward says nothing about hooks.
    """
    counts = [count for count in evidence.hooks or () if count.role == role]
    ran = any(count.forwards for count in evidence.hooks or ())
    if not counts or not ran:
        return "none"
    counts = [count for count in counts if not _without_backward(count, counts)]
    if role == "submodules":
        used = [count for count in counts if count.forwards]
        return "fired" if used and all(map(_fired, used)) else "skipped"
    return "fired" if all(map(_fired, counts)) else "skipped"


def _without_backward(count: HookCount, counts: list[HookCount]) -> bool:
    """Say whether a backward hook had nothing to fire for: its module ran, but never with gradients."""
    if not count.kind.endswith("full_backward") or count.forwards:
        return False
    return any(other.module == count.module and other.forwards for other in counts)


def _fired(count: HookCount) -> bool:
    return count.fired > 0


def skipped_kinds(evidence: Evidence, role: str) -> list[str]:
    """Name the kinds of hook that did not fire in a role, in order of first appearance."""
    counts = [count for count in evidence.hooks or () if count.role == role and not _fired(count)]
    if role == "submodules":
        counts = [count for count in counts if count.forwards] or counts
    return list(dict.fromkeys(count.kind for count in counts))


def judge_compiled(evidence: Evidence) -> str:
    """Say whether compiled code ran."""
    compiled = evidence.compiled
    if compiled is None or not compiled.requested or evidence.failures:
        return "none"
    return "compiled" if compiled.calls_compiled and not compiled.calls_eager else "eager"


def judge_modes(modes: ModesEvidence) -> dict[str, str]:
    """Say what modes, buffers and random numbers did."""
    dropped = [identical for identical in modes.masks_identical if identical is not None]
    statistics = [difference for difference in modes.statistics_difference if difference is not None]
    return {
        "modes": _judge_flags(modes),
        "dropout": ("identical" if all(dropped) else "different") if dropped else "none",
        "statistics": _same(statistics[-1] if statistics else None),
        "evaluation_inner": _same(modes.evaluation_inner),
        "evaluation_wrapped": _same(modes.evaluation_wrapped),
        "precision": _judge_precision(modes.compute_dtypes),
    }


def _judge_flags(modes: ModesEvidence) -> str:
    if modes.flags_differ:
        return "differs"
    training = modes.training_modules[0]
    return {0: "eval", modes.num_modules: "train"}.get(training, "mixed")


def _same(difference: float | None) -> str:
    return "none" if difference is None else "differ" if difference > 0 else "same"


def _judge_precision(dtypes: tuple[str, ...]) -> str:
    return "none" if not dtypes else dtypes[0] if len(dtypes) == 1 else "mixed"


def judge_skipped(timeline: StepTimeline) -> tuple[Skipped, ...]:
    """Say what a step went past, from its own counts: never from the name of the call path.

    Forwards of the roots that did not run beside modules that did; hooks that were registered and did not fire
    although their module, or for a root any module, ran; compiled code that did not run; gradients that
    arrived where no reducer expected them; an optimizer none of whose parameters received a gradient. Of a step
    that raised only what comes before the exception counts: forwards and forward-pre hooks.

    Blind to: what hooks went past inside compiled code; hooks on submodules that never ran.
    """
    return (
        *_skipped_forwards(timeline),
        *_skipped_hooks(timeline),
        *_skipped_reductions(timeline),
    )


def list_untimed(timeline: StepTimeline) -> tuple[HooksOfStep, ...]:
    """Return the hooks that fired in a step without an event of their own: those of compiled models."""
    timed = {(event.owner, event.name) for event in timeline.events}
    return tuple(hooks for hooks in timeline.hooks if hooks.fired and (hooks.owner, hooks.name) not in timed)


def _skipped_forwards(timeline: StepTimeline) -> Iterator[Skipped]:
    entered = _entered(timeline)
    for hooks in timeline.hooks:
        if hooks.kind != "forward" or hooks.owner == "submodule" or hooks.module in entered or hooks.forwards:
            continue
        below = {"wrapped": ("inner", "submodule"), "inner": ("submodule",)}[hooks.owner]
        num_below = sum(_ran(other, entered) for other in timeline.hooks if other.owner in below)
        if num_below:
            detail = f"its forward ran 0 times, {num_below} modules below it ran"
            yield Skipped(kind="forward", name=hooks.module, owner=hooks.owner, detail=detail)
    if timeline.compiled_runs == 0 and not timeline.raised:
        yield Skipped(kind="forward", name="compiled code", owner="wrapped", detail="0 compiled graphs ran")


def _entered(timeline: StepTimeline) -> set[str]:
    return {event.name for event in timeline.events if event.kind == "forward"}


def _ran(hooks: HooksOfStep, entered: set[str]) -> bool:
    return hooks.kind == "forward" and bool(hooks.forwards or hooks.module in entered)


def _skipped_hooks(timeline: StepTimeline) -> Iterator[Skipped]:
    entered = _entered(timeline)
    for hooks in timeline.hooks:
        if not hooks.fired and _had_to_fire(hooks, timeline, entered):
            names = ", ".join(hooks.functions)
            detail = f"{len(hooks.functions)} registered ({names}), 0 fired"
            yield Skipped(kind=hooks.event_kind, name=hooks.name, owner=hooks.owner, detail=detail)


def _had_to_fire(hooks: HooksOfStep, timeline: StepTimeline, entered: set[str]) -> bool:
    own_forwards = [other for other in timeline.hooks if other.module == hooks.module and _ran(other, entered)]
    if timeline.raised and hooks.kind != "forward_pre":
        return False
    if hooks.kind == "full_backward" and own_forwards:
        return hooks.forwards > 0
    if own_forwards:
        return True
    # A root that was passed by, while what is below it ran (with gradients, for a backward hook).
    alike = [other for other in timeline.hooks if other.kind == hooks.kind]
    return hooks.owner != "submodule" and any(other.forwards for other in alike)


def _skipped_reductions(timeline: StepTimeline) -> Iterator[Skipped]:
    if timeline.arrivals is not None and timeline.arrivals[1]:
        armed, unarmed = timeline.arrivals
        name = f"reduction of {unarmed} gradients"
        detail = f"{unarmed} gradients arrived while no reducer expected them, {armed} while one did"
        yield Skipped(kind="bucket", name=name, owner=None, detail=detail)
    if timeline.with_gradient == 0:
        detail = "0 of its parameters had a gradient after the backward"
        yield Skipped(kind="optimizer", name="update of the parameters", owner=None, detail=detail)


def explain_crash(evidence: Evidence) -> str | None:
    """Name the true cause of a crash that hooks passed by explain; None where nothing crashed or none is known.

    The message alone decides nothing: torch raises the same ones for other reasons. The cause is only named
    beside the evidence that the hooks in question were skipped.
    """
    if not evidence.failures:
        return None
    skipped = "skipped" in (judge_hooks(evidence, "wrapped"), judge_hooks(evidence, "inner"))
    return _cause_of(evidence.failures[0]) if skipped or judge_hooks(evidence, "wrapped") == "none" else None


def _cause_of(failure: Failure) -> str | None:
    for text, cause in _CAUSES.items():
        if text in failure.message:
            return cause
    return None


_CAUSES = {
    "mixed torch.Tensor and DTensor": "the forward-pre hook that gathers the sharded parameters was passed by",
    "mat2 must be a matrix": "FSDP's forward, which gathers the flat parameter, was passed by",
    "Trying to backward through the graph a second time": "the forward-pre hook that recomputes the weight was "
    "passed by, so the second step met the first step's graph",
    "UninitializedParameter": "the forward-pre hook that infers the parameters' shapes was passed by",
}
