"""The evidence behind each verdict of a trial, as labeled facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial

from ddpcall.evidence import Evidence, ModesEvidence
from ddpcall.lab.records import TrialRecord
from ddpcall.lab.report.mixing import list_facts
from ddpcall.lab.report.words import (
    MOST_RANKS_NAMED,
    format_number,
    format_share,
    list_by_rank,
    list_names,
    plural,
)
from ddpcall.verdicts import NO_DATA_PARALLELISM, VERDICTS, judge_mixing

Fact = tuple[str, str]
_PLAIN = (bool, int, float, str)


@dataclass(frozen=True)
class Section:
    """The evidence for one verdict, or for what has no verdict of its own.

    Attributes:
        name: The verdict's name, or consequence, failure.
        word: The verdict; empty where there is none.
        expected: What the experiment expects; empty where nothing, or where it is the word.
        facts: Label and value of each fact.
    """

    name: str
    word: str
    expected: str
    facts: tuple[Fact, ...]


def collect_sections(trial: TrialRecord, names: Sequence[str]) -> tuple[Section, ...]:
    """Return a section for each of the verdicts, and for what the trial cost or how it failed."""
    evidence = trial.evidence
    sections = []
    for name in names:
        unmet = trial.unmet.get(name, {})
        facts = _facts(evidence, name) if evidence is not None else []
        sections.append(Section(name, trial.word(name), unmet.get("expected", ""), tuple(facts)))
    extra = {"failure": _failure(trial), "consequence": _consequence(trial)}
    sections += [Section(name, "", "", tuple(facts)) for name, facts in extra.items() if facts]
    if evidence is None:
        sections.append(Section("evidence", "", "", (("evidence", "could not be read from evidence.jsonl"),)))
    return tuple(sections)


def _facts(evidence: Evidence, name: str) -> list[Fact]:
    if name in _FACTS:
        return _FACTS[name](evidence)
    part = getattr(evidence, VERDICTS[name].part)
    if not is_dataclass(part):
        return []
    shown = {field.name: getattr(part, field.name) for field in fields(part)}
    return [(name.replace("_", " "), str(value)) for name, value in shown.items() if isinstance(value, _PLAIN)]


def _mixing(evidence: Evidence) -> list[Fact]:
    if judge_mixing(evidence) == NO_DATA_PARALLELISM:
        return [("what it means", "Nothing in this wrapper joins what the ranks learn: there is nothing to lose.")]
    mixing = evidence.mixing
    return [("what it means", mixing.explanation), *list_facts(mixing)] if mixing is not None else []


def _gradients(evidence: Evidence) -> list[Fact]:
    facts: list[Fact] = []
    gradients, reducer, collectives = evidence.gradients, evidence.reducer, evidence.collectives
    if gradients is not None and gradients.max_difference:
        widest = max(gradients.max_difference)
        magnitude = format_number(max(gradients.max_magnitude, default=0.0))
        facts.append(
            ("largest difference between ranks", f"{format_number(widest)} (largest gradient {magnitude})")
        )
        parted = sum(value > 0 for value in gradients.max_difference)
        facts.append(("steps in which they differed", f"{parted} of {len(gradients.max_difference)}"))
        if not gradients.batches_differ:
            facts.append(("batches", "the same on every rank, so that equality proves nothing"))
    if gradients is not None:
        facts.append(("parameters with a gradient", str(gradients.with_gradient)))
        facts += _names("without a gradient", gradients.without_gradient)
        facts += _names("sharded", gradients.sharded)
    if reducer is not None and reducer.reducers:
        facts.append(("reducer armed", plural(sum(reducer.armings), "time")))
        armed, unarmed = sum(reducer.arrivals_armed), sum(reducer.arrivals_unarmed)
        facts.append(("gradients that arrived", f"{armed:,} while armed, {unarmed:,} while not"))
        facts.append(("buckets in DDP's last logged reduction", str(reducer.logged_buckets or "none logged")))
    if collectives is not None and collectives.agrees is not None:
        seen = sum(count or 0 for count in collectives.all_reduces)
        agrees = "agrees" if collectives.agrees else "DISAGREES with the reducer probe"
        facts.append(("flight recorder", f"{agrees}: {plural(seen, 'all-reduce')} seen"))
    if evidence.replicas is not None:
        first = evidence.replicas.first_step_parameters
        facts.append(("parameters parted", "never" if first is None else f"after step {first} (from 0)"))
        facts += _names("differ at the end", evidence.replicas.parameters)
    return facts


def _names(label: str, names: Sequence[str]) -> list[Fact]:
    if not names:
        return []
    return [(label, list_names(names))]


def _hooks(evidence: Evidence, role: str) -> list[Fact]:
    """Sum hooks by kind; of several modules, name those whose forward ran and whose hooks did not fire."""
    mine = [count for count in evidence.hooks or () if count.role == role]
    facts = []
    for kind in dict.fromkeys(count.kind for count in mine):
        group = [count for count in mine if count.kind == kind]
        fired, forwards = sum(count.fired for count in group), sum(count.forwards for count in group)
        modules = len({count.module for count in group})
        among = "" if modules == 1 else f" on {plural(modules, 'module')}"
        facts.append((kind, f"fired {plural(fired, 'time')}, beside {plural(forwards, 'forward')}{among}"))
        silent = [count.module or "(root)" for count in group if count.forwards and not count.fired]
        if modules > 1:
            facts += _names(f"{kind}: silent", silent)
    return facts


def _compiled(evidence: Evidence) -> list[Fact]:
    compiled = evidence.compiled
    if compiled is None or not compiled.requested:
        return [("compilation", "was not asked for")] if compiled is not None else []
    return [
        ("frames that dynamo compiled", str(compiled.frames)),
        ("steps that ran a compiled graph", str(compiled.calls_compiled)),
        ("steps that ran none", str(compiled.calls_eager)),
    ]


def _flags(modes: ModesEvidence) -> list[Fact]:
    training = ", ".join(f"{number} on rank {rank}" for rank, number in enumerate(modes.training_modules))
    if len(modes.training_modules) > MOST_RANKS_NAMED:
        training = list_by_rank(modes.training_modules, "{:.0f}".format)
    facts = [(f"of {plural(modes.num_modules, 'module')} in train mode", training)]
    return facts + _names("flags differ", modes.flags_differ)


def _dropout(modes: ModesEvidence) -> list[Fact]:
    kept = [share for share in modes.dropout_kept if share is not None]
    told = [same for same in modes.masks_identical if same is not None]
    facts = [("share kept, on average", format_share(sum(kept) / len(kept)))] if kept else []
    return facts + ([("steps with the same masks on all ranks", f"{sum(told)} of {len(told)}")] if told else [])


def _statistics(modes: ModesEvidence) -> list[Fact]:
    differences = [value for value in modes.statistics_difference if value is not None]
    tracked = [value for value in modes.batches_tracked if value is not None]
    facts = [("apart after the last step", format_number(differences[-1]))] if differences else []
    return facts + ([("batches tracked on rank 0", str(tracked[-1]))] if tracked else [])


def _precision(modes: ModesEvidence) -> list[Fact]:
    facts = _names("linear layers and convolutions computed in", modes.compute_dtypes)
    return facts + ([("what the path returned", modes.result_dtype)] if modes.result_dtype else [])


def _evaluation(difference: float | None) -> list[Fact]:
    return [("largest difference between ranks", format_number(difference))] if difference is not None else []


def _of_modes(list_facts_of: Callable[[ModesEvidence], list[Fact]]) -> Callable[[Evidence], list[Fact]]:
    return lambda evidence: list_facts_of(evidence.modes) if evidence.modes is not None else []


# Of a verdict that is not here, the numbers of its part of the evidence are shown.
_FACTS: dict[str, Callable[[Evidence], list[Fact]]] = {
    "gradients": _gradients,
    "mixing": _mixing,
    "hooks_wrapped": partial(_hooks, role="wrapped"),
    "hooks_inner": partial(_hooks, role="inner"),
    "hooks_submodules": partial(_hooks, role="submodules"),
    "compiled": _compiled,
    "modes": _of_modes(_flags),
    "dropout": _of_modes(_dropout),
    "statistics": _of_modes(_statistics),
    "precision": _of_modes(_precision),
    "evaluation_inner": _of_modes(lambda modes: _evaluation(modes.evaluation_inner)),
    "evaluation_wrapped": _of_modes(lambda modes: _evaluation(modes.evaluation_wrapped)),
}


def _failure(trial: TrialRecord) -> list[Fact]:
    if trial.error is None:
        return []
    facts = [("raised", trial.error)] + ([("true cause", trial.cause)] if trial.cause else [])
    failures = trial.evidence.failures if trial.evidence is not None else ()
    return [*facts, ("traceback", failures[0].traceback.strip()[-4000:])] if failures else facts


def _consequence(trial: TrialRecord) -> list[Fact]:
    consequence = trial.consequence
    if consequence is None:
        return []
    facts = [("test loss by rank", list_by_rank(consequence.test_loss, format_number))]
    if consequence.test_accuracy:
        facts.append(("test accuracy by rank", list_by_rank(consequence.test_accuracy, format_share)))
    if consequence.distance:
        facts.append(
            ("distance from the synchronized run, by rank", list_by_rank(consequence.distance, format_number))
        )
    facts.append(("farthest rank from rank 0", format_number(consequence.spread)))
    if trial.evidence is not None and trial.evidence.step_ms is not None:
        facts.append(("median step on rank 0", f"{trial.evidence.step_ms:.2f} ms, probes included"))
    return facts
