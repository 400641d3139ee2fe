"""Verdicts: pure functions of evidence. No torch, no processes, nothing remembered.

Each is declared once, in `VERDICTS`: its words with their tones, how it is computed, and what an answer says of
it. Tables, pages, colors, sentences and the keys of an experiment's expectations are made from that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ddpcall.evidence import (
    Evidence,
    Failure,
    GradientEvidence,
    HookCount,
    HooksOfStep,
    Skipped,
    StepTimeline,
)

# Reductions give every rank the same bits; the tolerance only allows for backends that round per rank.
RELATIVE_TOLERANCE = 1e-6
NO_DATA_PARALLELISM = "no data parallelism"
# Shapes of which several ranks' gradients are a part.
_MIXED = {"averaged", "summed", "scaled", "late", "groups", "dropped", "weighted", "partly_local"}


@dataclass(frozen=True)
class Word:
    """One value of a verdict.

    Attributes:
        tone: good, part, lost, crash, other or none: its color.
        says: What ways with this word do, as a sentence without its subject, in the plural; empty where an answer
            has nothing to say of them.
    """

    tone: str = "none"
    says: str = ""


@dataclass(frozen=True, kw_only=True)
class VerdictSpec:
    """A verdict, declared once.

    Attributes:
        title: The column's.
        meaning: What it says, and what words mean that do not explain themselves.
        judge: Computes the word from the evidence of a trial.
        words: All values; an answer speaks of them in this order.
        part: The part of the evidence that it is computed from.
        quiet: Words that are no reason to show the column, beside `none`.
    """

    title: str
    meaning: str
    judge: Callable[[Evidence], str]
    words: Mapping[str, Word]
    part: str
    quiet: frozenset[str] = frozenset()


def judge(evidence: Evidence) -> dict[str, str]:
    """Compute all verdicts of one trial: name to word."""
    return {name: spec.judge(evidence) for name, spec in VERDICTS.items()}


def find_tone(name: str, word: str) -> str:
    """Return the tone of one verdict's word; none for words that are neither good nor bad, or not known."""
    words = ONE_PROCESS if name == "one_process" else VERDICTS[name].words
    return words.get(word, Word()).tone


def list_columns(verdicts: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the names of the verdicts that have anything to say of some trials; `gradients` at least."""
    spoken = {name: {words.get(name, "none") for words in verdicts} for name in VERDICTS}
    return [name for name, words in spoken.items() if words - {"none"} - VERDICTS[name].quiet] or ["gradients"]


def judge_gradients(evidence: Evidence) -> str:
    """Say who ended up with whose gradients.

    Blind to: synchronization where every rank had the same batch, or where there is one rank only: equality
    proves nothing there, so the verdict is `local`.
    """
    if evidence.failures:
        return "crashed"
    gradients = evidence.gradients
    if gradients is None or gradients.with_gradient == 0:
        return "none"
    if gradients.sharded:
        return "sharded"
    if not any(gradients.max_magnitude):  # NaN from the first step on, or zero: equality proves nothing
        return "none"
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


def judge_modes(evidence: Evidence) -> str:
    """Say in which mode the modules were, in some step."""
    modes = evidence.modes
    if modes is None:
        return "none"
    if modes.flags_differ:
        return "differs"
    return {0: "eval", modes.num_modules: "train"}.get(modes.training_modules[0], "mixed")


def judge_dropout(evidence: Evidence) -> str:
    """Say whether all ranks dropped the same."""
    masks = evidence.modes.masks_identical if evidence.modes is not None else ()
    told = [identical for identical in masks if identical is not None]
    return ("identical" if all(told) else "different") if told else "none"


def judge_statistics(evidence: Evidence) -> str:
    """Say whether the ranks' running statistics were the same at the end."""
    differences = evidence.modes.statistics_difference if evidence.modes is not None else ()
    return _same(next((one for one in reversed(differences) if one is not None), None))


def judge_evaluation(evidence: Evidence, of: str) -> str:
    """Say whether the ranks' models evaluate alike, called as `inner(x)` or as `wrapped(x)`."""
    return _same(getattr(evidence.modes, f"evaluation_{of}", None))


def _same(difference: float | None) -> str:
    return "none" if difference is None else "differ" if difference > 0 else "same"


def judge_precision(evidence: Evidence) -> str:
    """Say in which dtype layers computed."""
    dtypes = evidence.modes.compute_dtypes if evidence.modes is not None else ()
    return "none" if not dtypes else dtypes[0] if len(dtypes) == 1 else "mixed"


_CRASHED = Word("crash", "crash")
_NOTHING = Word("none", "give no parameter a gradient")
_NO_DATA_PARALLELISM = Word("none", "have no data parallelism")
# Stands last: the price that an answer says after it is that of these ways.
_LOCAL = Word("lost", "leave gradients local to each rank")
_HOOKS = {"fired": Word("good"), "skipped": Word("part"), "none": Word()}

VERDICTS: dict[str, VerdictSpec] = {
    "gradients": VerdictSpec(
        title="gradients",
        meaning="`synced`: equal on all ranks in every step, from different batches; `local`: they stayed on the "
        "rank that computed them, in at least one step; `no data parallelism` where the wrapper is not there to "
        "change that",
        judge=judge_gradients,
        part="gradients",
        words={
            "synced": Word("good", "keep the gradients synchronized"),
            "sharded": Word("other", "train sharded gradients"),
            "none": _NOTHING,
            "crashed": _CRASHED,
            NO_DATA_PARALLELISM: _NO_DATA_PARALLELISM,
            "local": _LOCAL,
        },
    ),
    "mixing": VerdictSpec(
        title="mixing",
        meaning="the shape of the mixing matrix in the measured steps: `averaged` where every rank used the mean "
        "of all ranks' gradients in each of them, else the first other shape",
        judge=judge_mixing,
        part="mixing",
        quiet=frozenset({NO_DATA_PARALLELISM, "crashed"}),  # gradients says so already
        words={
            "averaged": Word("good", "keep the gradients synchronized"),
            "summed": Word("part", "sum gradients without dividing"),
            "scaled": Word("other", "use a multiple of the mean"),
            "weighted": Word("part", "do not weigh the ranks alike"),
            "transformed": Word("other", "change the mean alike on all ranks"),
            "groups": Word("lost", "average in groups that never meet"),
            "dropped": Word("lost", "drop what a rank computed"),
            "late": Word("lost", "let gradients arrive late"),
            "partly_local": Word("lost", "leave a part of the gradients local"),
            "different": Word("lost", "give the ranks different mixtures"),
            "thrown_away": Word("lost", "throw gradients away"),
            "unaccounted": Word("part", "use gradients from elsewhere"),
            "unidentifiable": Word("part", "do not tell who learns from whom"),
            "none": _NOTHING,
            "crashed": _CRASHED,
            NO_DATA_PARALLELISM: _NO_DATA_PARALLELISM,
            "local": _LOCAL,
        },
    ),
    "hooks_wrapped": VerdictSpec(
        title="hooks on wrapped",
        meaning="`fired`: every kind of hook registered there fired; `skipped`: the model ran and at least one "
        "kind did not; `none`: no hook there, or the model never ran",
        judge=partial(judge_hooks, role="wrapped"),
        part="hooks",
        words=_HOOKS,
    ),
    "hooks_inner": VerdictSpec(
        title="hooks on inner",
        meaning="the same of the user's own module",
        judge=partial(judge_hooks, role="inner"),
        part="hooks",
        words=_HOOKS,
    ),
    "hooks_submodules": VerdictSpec(
        title="hooks below",
        meaning="the same of the modules below it whose forward ran",
        judge=partial(judge_hooks, role="submodules"),
        part="hooks",
        words=_HOOKS,
    ),
    "compiled": VerdictSpec(
        title="code",
        meaning="`compiled` where a compiled graph ran in every step; `none` where nothing was to be compiled",
        judge=judge_compiled,
        part="compiled",
        words={"compiled": Word("good", "run compiled code"), "eager": Word("part", "run eager"), "none": Word()},
    ),
    "modes": VerdictSpec(
        title="mode",
        meaning="of every module on every rank; `mixed`: modules differ, `differs`: ranks do",
        judge=judge_modes,
        part="modes",
        quiet=frozenset({"train"}),
        words={
            "train": Word("good"),
            "eval": Word("other"),
            "mixed": Word("part"),
            "differs": Word("lost"),
            "none": Word(),
        },
    ),
    "dropout": VerdictSpec(
        title="dropout masks",
        meaning="whether all ranks dropped the same positions in every step",
        judge=judge_dropout,
        part="modes",
        words={
            "identical": Word("part", "drop the same positions on every rank"),
            "different": Word("other", "give every rank dropout masks of its own"),
            "none": Word(),
        },
    ),
    "statistics": VerdictSpec(
        title="running statistics",
        meaning="whether batch norm's running statistics were the same on all ranks after the last step",
        judge=judge_statistics,
        part="modes",
        words={
            "same": Word("good", "keep running statistics the same on all ranks"),
            "differ": Word("lost", "leave every rank its own running statistics"),
            "none": Word(),
        },
    ),
    "evaluation_inner": VerdictSpec(
        title="eval of inner",
        meaning="whether `inner(x)` in eval mode, after the training, is the same on all ranks",
        judge=partial(judge_evaluation, of="inner"),
        part="modes",
        words={
            "same": Word("good", "evaluate alike on all ranks"),
            "differ": Word("lost", "make evaluation depend on the rank"),
            "none": Word(),
        },
    ),
    "evaluation_wrapped": VerdictSpec(
        title="eval of wrapped",
        meaning="the same of `wrapped(x)`",
        judge=partial(judge_evaluation, of="wrapped"),
        part="modes",
        words={"same": Word("good"), "differ": Word("lost"), "none": Word()},
    ),
    "precision": VerdictSpec(
        title="precision",
        meaning="the dtype in which linear layers and convolutions computed",
        judge=judge_precision,
        part="modes",
        quiet=frozenset({"float32"}),
        words={
            **{
                dtype: Word("other", f"compute in {dtype}")
                for dtype in ("float32", "bfloat16", "float16", "float64")
            },
            "mixed": Word("part", "compute in mixed precision"),
            "none": Word(),
        },
    ),
}
# What a comparison with one process found: one of `ddpcall.compare.CAUSES`, or that the step crashed.
ONE_PROCESS = {
    "same": Word("good"),
    "scaled": Word("lost", "every gradient is a multiple of it"),
    "weighted": Word("lost", "ranks or micro-batches have other weights"),
    "module": Word("lost", "a module computes something else"),
    "loss": Word("lost", "the loss is another one"),
    "some_parameters": Word("lost", "some parameters differ"),
    "update": Word("lost", "what follows the backward differs"),
    "unexplained": Word("part", "it cannot be told why it differs"),
    "crashed": Word("crash", "the step crashes"),
}


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
