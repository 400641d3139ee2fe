"""The answer to a run's question, in one sentence computed from its verdicts."""

from __future__ import annotations

from collections.abc import Sequence

from ddpcall.lab.records import ComparisonRecord, RunRecord, TrialRecord
from ddpcall.lab.report.words import (
    code,
    format_share,
    join_words,
    list_names,
    plural,
    values_that_tell,
    varying_axes,
)
from ddpcall.verdicts import ONE_PROCESS, VERDICTS

_SPECIAL = tuple(name for name in VERDICTS if name not in ("mixing", "gradients"))
_MOST_NAMES = 3
_MOST_SPECIAL = 2
_LEAST_SHARE = 0.2


def answer(run: RunRecord) -> str:
    """Return one sentence: who keeps what, what the others lose, and what that costs."""
    trials = run.trials
    if not trials:
        return answer_comparisons(run.comparisons) if run.comparisons else "Nothing was measured."
    special = [clause for name in _SPECIAL if _tells_apart(name, trials) for clause in _clause(name, trials)]
    clauses = special[:_MOST_SPECIAL]
    if run.environment is None or run.environment.world_size > 1:
        measured = any(trial.evidence is not None and trial.evidence.mixing is not None for trial in trials)
        clause = _clause("mixing" if measured else "gradients", trials)
        clauses += [_with_price(part, _price(run)) for part in clause]
    if len(special) < _MOST_SPECIAL:
        clauses += _hooks_clause(trials)
    sentence = "; ".join(clauses) or "nothing that was measured tells these ways apart"
    return f"{sentence[:1].upper()}{sentence[1:]}."


def answer_comparisons(comparisons: Sequence[ComparisonRecord]) -> str:
    """Return one sentence: how many steps compute what one process does, and what becomes of the others."""
    by_cause: dict[str, list[str]] = {}
    for one in comparisons:
        by_cause.setdefault(one.found, []).append(code(one.label))
    same = len(by_cause.pop("same", ()))
    steps = plural(len(comparisons), "step")
    sentence = f"{same} of {steps} {'computes' if same == 1 else 'compute'} what one process does"
    says = {cause: word.says for cause, word in ONE_PROCESS.items()}
    others = [f"{says.get(cause, cause)} in {list_names(names)}" for cause, names in by_cause.items()]
    return f"{'; '.join([sentence, *others])}."


def _with_price(clause: str, price: str) -> str:
    return f"{clause}: {price}" if price else clause


def _tells_apart(name: str, trials: Sequence[TrialRecord]) -> bool:
    """Say whether a verdict is what this experiment is about: it varies, and not in a few cells only."""
    words = [trial.word(name) for trial in trials]
    said = [word for word in words if _says(name, word)]
    counts = [words.count(word) for word in set(words)]
    return len(set(said)) > 1 and len(said) >= len(words) / 2 and min(counts) >= _LEAST_SHARE * len(words)


def _clause(name: str, trials: Sequence[TrialRecord]) -> list[str]:
    """Say which ways have which word of one verdict; empty where no word has anything to say."""
    parts = []
    for word, spec in VERDICTS[name].words.items():
        group = [trial for trial in trials if trial.word(name) == word]
        if group and spec.says:
            subject, is_one = _name_group(group, trials, said_before=bool(parts))
            parts.append(f"{subject} {_put_in_singular(spec.says) if is_one else spec.says}")
    if len(parts) == 2:
        return [", while ".join(parts)]
    return [", ".join([*parts[:-1], f"and {parts[-1]}"] if len(parts) > 1 else parts)] if parts else []


def _says(name: str, word: str) -> str:
    spec = VERDICTS[name].words.get(word)
    return spec.says if spec is not None else ""


def _put_in_singular(sentence: str) -> str:
    verb, blank, rest = sentence.partition(" ")
    return {"have": "has", "do": "does", "crash": "crashes"}.get(verb, f"{verb}s") + blank + rest


def _hooks_clause(trials: Sequence[TrialRecord]) -> list[str]:
    """Say through which ways every hook that was registered fired."""
    roles = ("hooks_wrapped", "hooks_inner", "hooks_submodules")
    judged = [trial for trial in trials if {trial.word(role) for role in roles} != {"none"}]
    skips = [any(trial.word(role) == "skipped" for role in roles) for trial in judged]
    skipping = [trial for trial, skipped in zip(judged, skips, strict=True) if skipped]
    firing = [trial for trial, skipped in zip(judged, skips, strict=True) if not skipped]
    if not judged:
        return []
    if not skipping:
        return ["no hook is skipped"]
    if not firing:
        return ["every way skips hooks"]
    if len(firing) <= len(skipping):
        name, is_one = _name_group(firing, judged)
        return [f"only {name} {'runs' if is_one else 'run'} every hook"]
    name, is_one = _name_group(skipping, judged)
    return [f"{name} {'skips' if is_one else 'skip'} hooks"]


def _name_group(
    group: Sequence[TrialRecord], trials: Sequence[TrialRecord], said_before: bool = False
) -> tuple[str, bool]:
    """Name some of the ways, by coordinates where they tell them from the others, else by their number.

    Returns:
        The name, and whether it is singular.
    """
    if len(group) == len(trials):
        return {1: ("this way", True), 2: ("both ways", False)}.get(len(group), (f"all {len(group)} ways", False))
    cells = [trial.cell for trial in trials]
    told = values_that_tell([trial.cell for trial in group], cells, _MOST_NAMES)
    if told:
        return join_words([code(value) for value in told]), len(told) == 1
    if said_before:
        return f"the other {len(group)}" if len(varying_axes(cells)) == 1 else str(len(group)), False
    return f"{len(group)} of {len(trials)} ways", False


def _price(run: RunRecord) -> str:
    """Say what became of the models that were trained on local gradients.

    Their accuracy is only said beside one synchronized accuracy, and where all lie below it: else it compares
    what differs in more than the synchronization.
    """
    known = [trial for trial in run.trials if trial.consequence is not None]
    apart = max((t.consequence.spread for t in known if t.consequence and _is(t, "local")), default=0.0)
    if apart <= 0:
        return ""
    steps = f"after {plural(run.num_steps, 'step')} " if run.num_steps else ""
    local, synced = _accuracies(known, "local"), set(_accuracies(known, "synced"))
    price = f"{steps}those models lie up to {format_share(apart)} apart"
    if len(synced) == 1 and local and max(local) < min(synced):
        price += f" and classify {_range(local)} of the test set right, not {format_share(min(synced))}"
    return price


def _is(trial: TrialRecord, word: str) -> bool:
    return trial.word("gradients") == word


def _accuracies(trials: Sequence[TrialRecord], word: str) -> list[float]:
    return [
        accuracy
        for trial in trials
        if _is(trial, word) and trial.consequence
        for accuracy in trial.consequence.test_accuracy or ()
    ]


def _range(values: Sequence[float]) -> str:
    low, high = format_share(min(values)), format_share(max(values))
    return low if low == high else f"{low} to {high}"


def status(run: RunRecord) -> tuple[str, str]:
    """Return how the run ended: a tone (good, lost or part) and a sentence."""
    noun = "comparison" if run.num_comparisons is not None or run.comparisons else "cell"
    rows = run.comparisons if noun == "comparison" else run.trials
    number = run.num_comparisons if noun == "comparison" else run.num_trials
    measured = len(rows)
    asked = number if number is not None else measured
    failed = sum(not one.is_met if isinstance(one, ComparisonRecord) else bool(one.unmet) for one in rows)
    stated = sum(bool(one.expected) for one in rows)
    cells = plural(measured, noun)
    if failed:
        tone, sentence = "lost", f"{failed} of {cells} {'is' if failed == 1 else 'are'} not as expected."
    elif stated:
        tone, sentence = "good", f"As expected: {stated} of {cells} have expectations, and all hold."
    else:
        tone, sentence = "part", f"The experiment expects nothing of its {cells}."
    if run.outcome in ("ok", "expectations failed"):
        return tone, sentence
    ended = {
        "running": "The run goes on, or was killed before it could say more",
        "unknown": "How the run ended is not known",
    }.get(run.outcome, f"The run did not end well ({run.outcome})")
    ended += f": {measured} of {plural(asked, noun)} measured."
    return "lost", ended + (f" {sentence}" if measured else "")
