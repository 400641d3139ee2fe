"""What a graded run is judged by. Pure: from what was observed to met or missed, with a sentence that says why.

No criterion is met by silence: each needs evidence from every rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ddpcall.lab.report.words import plural
from ddpcall.teach.grade.graded_run import GradedRun, is_close, used_the_mean
from ddpcall.teach.grade.observations import RankObservations
from ddpcall.teach.question import MET, MISSED, Answer, NotSeen, Question, Result, answer

AS_ONE = 1e-3  # of a step's gradient: what rounding makes of it in a hundred steps is far less
COVERAGE = 0.95
Judge = Callable[[GradedRun], Answer]


@dataclass(frozen=True, kw_only=True)
class Criterion(Question):
    """One thing that is judged.

    Attributes:
        points: What it is worth.
        requires: Keys of criteria without which it is worth nothing.
    """

    points: int
    requires: tuple[str, ...] = ()


def answer_all(criteria: Sequence[Criterion], run: GradedRun) -> list[Result]:
    """Judge a run by every criterion, in order."""
    results = [answer(criterion, run, MET) for criterion in criteria]
    missed = {result.question.key: result.question.text for result in results if result.measured != MET}
    return [
        dataclasses.replace(
            result, withheld_by=tuple(missed[key] for key in result.question.requires if key in missed)
        )
        for result in results
    ]


def met_if(holds: bool, sentence: str) -> Answer:
    """Return an answer of which the sentence is the same either way."""
    return Answer(MET if holds else MISSED, sentence)


def on_every_rank(find_fault: Callable[[GradedRun, RankObservations], str | None], sentence: str) -> Judge:
    """Make a criterion that is met where no rank has a fault; its sentence names the first fault."""

    def judge(run: GradedRun) -> Answer:
        for seen in run.observations:
            if (fault := find_fault(run, seen)) is not None:
                return Answer(MISSED, fault)
        if not run.observations:
            raise NotSeen("No rank told anything.")
        return Answer(MET, sentence)

    return judge


def _name_some(names: Iterable[str]) -> str:
    unique = list(dict.fromkeys(names))
    shown = ", ".join(f"`{name}`" for name in unique[:2])
    return shown + (f" and {len(unique) - 2} more" if len(unique) > 2 else "")


# ---- common to all exercises ----------------------------------------------------------------------------------


def judge_fair_play(run: GradedRun) -> Answer:
    """Is what measures left alone?"""
    tampered = sorted({name for seen in run.observations for name in (seen.end or {}).get("tampered", [])})
    faults = [
        *run.faults,
        *([f"The script changed what grades it: {', '.join(tampered[:3])}."] if tampered else []),
    ]
    return met_if(not faults, " ".join(faults) or "The script leaves the grader alone.")


def judge_runs(run: GradedRun) -> Answer:
    """Does the script come to its end on every rank?"""
    ended = run.ended
    if ended.timed_out:
        return Answer(MISSED, f"It had not ended after {ended.seconds:.0f} s and was killed.")
    by_rank = {seen.rank: seen for seen in run.observations}
    # A rank that fails has the others killed: it is the cause, also where one of a lower number was cut short.
    for rank, seen in by_rank.items():
        if seen.end is not None and seen.end["code"] != 0:
            how = f"raised {seen.end['error']}" if seen.end["error"] else "left with an error"
            return Answer(MISSED, f"Rank {rank} {how} (exit code {seen.end['code']}).")
    for rank in range(run.num_ranks):
        if rank not in by_rank:
            return Answer(MISSED, f"Rank {rank} never started.")
        if by_rank[rank].end is None:
            why = "It left early (os._exit?) or was killed."
            return Answer(MISSED, f"Rank {rank} never came to the script's end. {why}")
    if ended.code != 0:
        return Answer(MISSED, f"Every rank came to its end, and the launch failed with exit code {ended.code}.")
    return Answer(MET, f"It came to its end on {run.num_ranks} ranks in {ended.seconds:.0f} s.")


def _find_other_task(run: GradedRun, seen: RankObservations) -> str | None:
    if not seen.wraps:
        return f"Rank {seen.rank} wraps no model in DDP."
    if run.find_prefix(seen) is None:
        return f"The model that rank {seen.rank} wraps is not the exercise's Net."
    rows = seen.trained_rows()
    if sum(row in run.reference.places for row in rows) < COVERAGE * len(rows):
        return f"Rank {seen.rank} trains on samples that are not in make_data('train')."
    return None


def _find_untrained(run: GradedRun, seen: RankObservations) -> str | None:
    steps, needed = run.count_steps(seen), run.scale(run.min_steps)
    if steps < needed:
        return f"Rank {seen.rank} makes {steps} optimizer steps, not {needed}."
    before, after = run.read_state(seen, "begin"), run.read_state(seen, "end")
    still = [name for name in run.reference.parameters if np.array_equal(before[name], after[name])]
    return f"On rank {seen.rank}, {_name_some(still)} ended as it began." if still else None


judge_task = on_every_rank(_find_other_task, "Model and data are the exercise's.")
judge_trains = on_every_rank(
    _find_untrained, "Every rank makes as many optimizer steps as planned, and trains it all."
)


def judge_parallel(run: GradedRun) -> Answer:
    """Do all ranks train one model through DDP, each on data of its own?"""
    for seen in run.observations:
        sizes = {one["world_size"] for one in seen.steps} | {one["ranks"] for one in seen.wraps}
        if not seen.wraps or sizes != {run.num_ranks}:
            size = min(sizes) if seen.wraps else 1
            return Answer(MISSED, f"Rank {seen.rank} trains in a group of {size}, not of {run.num_ranks}.")
        used = [record for step in seen.steps for record in step["parameters"]]
        unarmed = [record["name"] for record in used if record["armed"] == 0]
        if unarmed:
            return Answer(
                MISSED,
                f"On rank {seen.rank}, {len(unarmed)} of {len(used)} gradients used never reached a reducer of "
                f"DDP's that expected them ({_name_some(unarmed)}).",
            )
    pairs = [(step.ranks[0]["own"], other["own"]) for step in run.steps for other in step.ranks[1:]]
    equal = sum(is_close(*pair) for pair in pairs)
    if equal > (1 - COVERAGE) * len(pairs):
        return Answer(MISSED, f"In {equal} of {len(pairs)} cases the ranks computed the same gradient: same data.")
    return Answer(MET, "Every gradient goes through DDP, and every rank has data of its own.")


def judge_synchronized(run: GradedRun) -> Answer:
    """Is what the optimizer uses the mean over the ranks, and do the replicas stay one model?"""
    wrong = [step for step in run.steps if not used_the_mean(step.ranks)]
    if wrong:
        numbers = {step.number for step in wrong}
        return Answer(
            MISSED,
            f"In {plural(len(numbers), 'step')}, from step {min(numbers) + 1} on, the optimizer used gradients "
            f"that are not the mean over the ranks ({_name_some(step.name for step in wrong)}).",
        )
    parted = [step.number for step in run.steps if len({record["after"] for record in step.ranks}) > 1]
    if parted:
        return Answer(MISSED, f"The ranks' parameters differ from step {min(parted) + 1} on.")
    first, *others = (run.read_state(seen, "end") for seen in run.observations)
    names = run.reference.parameters
    differing = [name for name in names if any(not np.array_equal(first[name], one[name]) for one in others)]
    if differing:
        return Answer(MISSED, f"At the end the ranks hold different values of {_name_some(differing)}.")
    return Answer(MET, "In every step the ranks' mean gradient was used, and all ranks end with the same model.")


def judge_alike(run: GradedRun) -> Answer:
    """Do the ranks run the same program: as many steps, same learning rates, same modes?"""
    assert run.steps
    numbers = [len(seen.steps) for seen in run.observations]
    if len(set(numbers)) > 1:
        return Answer(MISSED, f"The ranks make different numbers of optimizer steps: {numbers}.")
    for index, ranks in enumerate(zip(*(seen.steps for seen in run.observations), strict=True)):
        rates = [[record["lr"] for record in step["parameters"]] for step in ranks]
        if any(other != rates[0] for other in rates):
            return Answer(MISSED, f"In step {index + 1} the ranks use different learning rates.")
        modes = [step["evaluating"] for step in ranks]
        if any(other != modes[0] for other in modes):
            in_eval = next(rank for rank, names in enumerate(modes) if names)
            return Answer(MISSED, f"In step {index + 1} rank {in_eval} is in eval mode while others train.")
    return Answer(MET, "All ranks make the same steps in the same modes.")


def judge_accuracy(run: GradedRun) -> Answer:
    """Is every rank's final model good on test data, as the grader computes it?"""
    accuracies = [run.reference.accuracy(run.read_state(seen, "end")) for seen in run.observations]
    shown = " and ".join(f"{accuracy:.1%}" for accuracy in accuracies)
    is_good = len(accuracies) == run.num_ranks and min(accuracies) >= run.min_accuracy
    return met_if(is_good, f"Test accuracy by rank: {shown}; {run.min_accuracy:.0%} is asked for.")


def judge_findings(run: GradedRun) -> Answer:
    """Does the watch find nothing?"""
    if run.findings is None:
        return Answer(MISSED, "The watch's findings are gone.")
    found = [
        f"{one['code']} {one['name']}" + (f" (line {one['line']})" if one["line"] else "")
        for one in run.findings
        if one["severity"] in ("error", "warning")
    ]
    return met_if(not found, f"ddpcall watch finds {', '.join(found) or 'nothing'}.")


def list_criteria(own: Sequence[Criterion]) -> tuple[Criterion, ...]:
    """Return everything an exercise is judged by, 100 points: the common criteria and its own, worth 15."""
    ran = ("fair_play", "runs")
    trained = (*ran, "task", "trains")
    parallel = (*trained, "parallel")
    keys = tuple(criterion.key for criterion in own)
    common = (
        ("fair_play", "grader left alone", 0, judge_fair_play, ()),
        ("runs", "runs to its end", 5, judge_runs, ran[:1]),
        ("task", "the same task", 5, judge_task, ran),
        ("trains", "trains the model", 10, judge_trains, trained[:3]),
        ("parallel", "data parallel, by DDP", 15, judge_parallel, trained),
        ("synchronized", "one model on all ranks", 25, judge_synchronized, (*parallel, *keys)),
        ("alike", "ranks run alike", 10, judge_alike, parallel),
        ("findings", "the watch is silent", 5, judge_findings, parallel),
        ("accuracy", "accuracy on every rank", 10, judge_accuracy, parallel),
    )
    made = [
        Criterion(key=key, text=text, points=points, judge=judge, requires=requires)
        for key, text, points, judge, requires in common
    ]
    return (*made[:4], *own, *made[4:])


# ---- the intent of single exercises ---------------------------------------------------------------------------


def of_its_own(key: str, text: str, points: int, judge: Judge) -> Criterion:
    """Return a criterion of one exercise: what its script is for and must keep."""
    requires = ("fair_play", "runs", "task", "trains")
    return Criterion(key=key, text=text, points=points, judge=judge, requires=requires)


def _find_silent_hook(run: GradedRun, seen: RankObservations) -> str | None:
    fired = [step["fired"].get("model", 0) > 0 for step in seen.steps]
    if fired and all(fired):
        return None
    return f"On rank {seen.rank} the model's hook fired in {sum(fired)} of {len(fired)} steps."


def _find_eval_step(run: GradedRun, seen: RankObservations) -> str | None:
    steps = [index for index, step in enumerate(seen.steps) if step["evaluating"]]
    return f"Rank {seen.rank} makes step {steps[0] + 1} in eval mode: dropout is off." if steps else None


def _find_other_beginning(run: GradedRun, seen: RankObservations) -> str | None:
    state = run.read_state(seen, "begin")
    pairs = [(state[name], value.numpy()) for name, value in run.reference.call("pretrained_weights").items()]
    if all(np.allclose(begun, expected, atol=1e-6) for begun, expected in pairs):
        return None
    return f"Rank {seen.rank} does not begin with the pretrained weights."


judge_hook_fires = on_every_rank(_find_silent_hook, "The hook on the model fires in every training step.")
judge_train_mode = on_every_rank(_find_eval_step, "Every step is made in train mode, with dropout.")
judge_begins_pretrained = on_every_rank(_find_other_beginning, "Every rank begins with the pretrained weights.")


def judge_accumulates(micro_batches: int) -> Judge:
    """Are several micro-batches accumulated for each step?"""

    def judge(run: GradedRun) -> Answer:
        counts = {record["armed"] + record["unarmed"] for step in run.steps for record in step.ranks}
        shown = ", ".join(map(str, sorted(counts)))
        return met_if(
            counts == {micro_batches}, f"Backwards for each step: {shown}; {micro_batches} are asked for."
        )

    return judge


def judge_reduces_once(run: GradedRun) -> Answer:
    """Do gradients travel once a step?"""
    counts = {record["armed"] for step in run.steps for record in step.ranks}
    return met_if(
        counts == {1}, f"Reductions for each step: {', '.join(map(str, sorted(counts)))}; once is enough."
    )


def judge_unfreezes(part: str, frozen_steps: int, trained_steps: int) -> Judge:
    """Is a part of the model frozen at first and trained later?"""

    def find_fault(run: GradedRun, seen: RankObservations) -> str | None:
        prefix = f"{run.find_prefix(seen) or ''}{part}."
        moves = [
            any(one["name"].startswith(prefix) and one["before"] != one["after"] for one in step["parameters"])
            for step in seen.steps
        ]
        before = moves.index(True) if True in moves else len(moves)
        if before < run.scale(frozen_steps):
            return f"The {part} is trained from step {before + 1} on; stage 1 trains the head alone."
        if sum(moves) < run.scale(trained_steps):
            return f"The {part} is trained in {sum(moves)} steps; stage 2 trains it with the head."
        return None

    return on_every_rank(find_fault, f"The {part} is frozen in stage 1 and trained in stage 2.")


def judge_evaluates(times: int, samples: int) -> Judge:
    """Is the model evaluated while it is trained?"""

    def judge(run: GradedRun) -> Answer:
        seen: dict[int, int] = {}
        for forward in run.observations[0].forwards if run.observations else []:
            if not forward["gradients"] and not forward["training"] and forward["step"]:
                seen[forward["step"]] = seen.get(forward["step"], 0) + len(forward["rows"])
        whole = sum(rows >= samples for rows in seen.values())
        return met_if(
            whole >= times, f"Rank 0 evaluated the model {whole} times in eval mode; {times} are asked for."
        )

    return judge


def judge_two_rates(slow: str, fast: str) -> Judge:
    """Does one part of the model learn more slowly than another?"""

    def judge(run: GradedRun) -> Answer:
        rates: dict[str, set[float]] = {slow: set(), fast: set()}
        for step in run.steps:
            rates.setdefault(step.name.split(".")[0], set()).update(record["lr"] for record in step.ranks)
        is_kept = bool(rates[slow] and rates[fast]) and max(rates[slow]) < min(rates[fast])
        shown = [f"{part} {', '.join(f'{rate:g}' for rate in sorted(rates[part]))}" for part in (slow, fast)]
        return met_if(is_kept, f"Learning rates: {'; '.join(shown)}.")

    return judge


def judge_gets_gradient(part: str, why: str) -> Judge:
    """Does a part of the model get a gradient in every step?"""

    def find_fault(run: GradedRun, seen: RankObservations) -> str | None:
        series, steps = run.series(seen), run.count_steps(seen)
        counts = [
            sum(record["own"] is not None and any(record["own"]) for record in records)
            for name, records in series.items()
            if name.startswith(f"{part}.")
        ]
        taught = max(counts, default=0)
        if steps and taught >= steps:
            return None
        return f"On rank {seen.rank} the {part} got a gradient in {taught} of {steps} steps: {why}."

    return on_every_rank(find_fault, f"The {part} learns in every step.")


def judge_covers(run: GradedRun) -> Answer:
    """Do the ranks together see every sample about once an epoch?"""
    number = 0
    for number, by_rank in enumerate(run.epochs(), 1):
        rows = [row for rows in by_rank for row in rows]
        share = len(set(rows)) / len(run.reference.places)
        if share < COVERAGE:
            return Answer(
                MISSED,
                f"In the first {len(rows)} samples of epoch {number} the ranks saw {share:.0%} of the data.",
            )
    if not number:
        raise NotSeen("No whole epoch was seen.")
    return Answer(MET, "The ranks divide every epoch's samples between them.")


def judge_shuffles(run: GradedRun) -> Answer:
    """Is the data shuffled anew in every epoch?"""
    orders = [by_rank[0] for by_rank in run.epochs()]
    if len(orders) < 2 or any(one == other for one, other in pairwise(orders)):
        return Answer(MISSED, "Two epochs in a row had the same order: the sampler was not told the epoch.")
    return Answer(MET, "Every epoch has an order of its own.")


def judge_as_one_process(run: GradedRun) -> Answer:
    """Is every gradient that was used the one that one process computes for the samples of all ranks?"""
    used: dict[int, dict[str, np.ndarray]] = {}
    rates: dict[int, float] = {}
    for step in run.steps:
        used.setdefault(step.number, {})[step.name] = np.array([record["used"] for record in step.ranks])
        rates[step.number] = step.ranks[0]["lr"]
    batches = [
        ([row for seen in run.observations for row in seen.trained_rows(step)], rates[step])
        for step in sorted(used)
    ]
    first = run.observations[0]
    alone = run.reference.train_alone(run.read_state(first, "begin"), batches, run.find_prefix(first) or "")
    for step, expected in zip(sorted(used), alone, strict=True):
        total = np.linalg.norm(np.concatenate(list(expected.values())))
        for name, value in expected.items():
            off = np.linalg.norm(used[step].get(name, np.zeros((1, len(value)))) - value, axis=1).max()
            if off > AS_ONE * total:
                return Answer(
                    MISSED,
                    f"In step {step + 1} the gradient of `{name}` is not that of one process with the samples of "
                    f"all ranks, by {off / total:.1%} of the whole gradient: every target has to weigh the same.",
                )
    return Answer(MET, "In every step the ranks used the gradient that one process computes.")
