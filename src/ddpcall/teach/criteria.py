"""What a graded run is judged by. Pure: from what was observed to passed or not, with a sentence that says why.

No criterion is met by silence: each needs evidence from every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ddpcall.lab.report.words import plural
from ddpcall.teach.case import (
    COVERAGE,
    Case,
    Criterion,
    Judgement,
    NotSeen,
    Score,
    align,
    align_all,
    count_nonzero,
    find_prefix,
    is_close,
    list_epochs,
    name_some,
    read_state,
    series_by_name,
    steps_that_move,
    trained_forwards,
    used_the_mean,
)

AS_ONE = 1e-3  # of a step's gradient: what rounding makes of it in a hundred steps is far less


def judge_all(criteria: Sequence[Criterion], case: Case) -> list[Score]:
    """Judge a case by every criterion, in order; a criterion comes after those it requires."""
    judged = {criterion.key: (criterion, _judge(criterion, case)) for criterion in criteria}
    return [
        Score(
            criterion,
            judgement,
            tuple(judged[key][0].title for key in criterion.requires if not judged[key][1].passed),
        )
        for criterion, judgement in judged.values()
    ]


def _judge(criterion: Criterion, case: Case) -> Judgement:
    try:
        return criterion.judge(case)
    except NotSeen as absence:
        return Judgement(False, str(absence))
    except (KeyError, TypeError, ValueError, IndexError) as error:  # facts come from a process we do not trust
        return Judgement(False, f"What the ranks told about it cannot be read ({type(error).__name__}: {error}).")


# ---- common to all exercises ----------------------------------------------------------------------------------


def judge_fair_play(case: Case) -> Judgement:
    """Is what measures left alone?"""
    tampered = sorted({name for one in case.testimonies for name in (one.end or {}).get("tampered", [])})
    if case.faults:
        return Judgement(False, " ".join(case.faults))
    if tampered:
        return Judgement(False, f"The script changed what grades it: {', '.join(tampered[:3])}.")
    return Judgement(True, "The script leaves the grader alone.")


def judge_runs(case: Case) -> Judgement:
    """Does the script come to its end on every rank?"""
    ended = case.ended
    if ended.timed_out:
        return Judgement(False, f"It had not ended after {ended.seconds:.0f} s and was killed.")
    by_rank = {testimony.rank: testimony for testimony in case.testimonies}
    # A rank that fails has the others killed: it is the cause, also where one of a lower number was cut short.
    for rank, testimony in sorted(by_rank.items()):
        if testimony.end is not None and testimony.end["code"] != 0:
            how = f"raised {testimony.end['error']}" if testimony.end["error"] else "left with an error"
            return Judgement(False, f"Rank {rank} {how} (exit code {testimony.end['code']}).")
    for rank in range(case.ranks):
        if rank not in by_rank:
            return Judgement(False, f"Rank {rank} never started.")
        if by_rank[rank].end is None:
            why = "It left early (os._exit?) or was killed."
            return Judgement(False, f"Rank {rank} never came to the script's end. {why}")
    if ended.code != 0:
        return Judgement(False, f"Every rank came to its end, and the launch failed with exit code {ended.code}.")
    return Judgement(True, f"It came to its end on {case.ranks} ranks in {ended.seconds:.0f} s.")


def judge_task(case: Case) -> Judgement:
    """Are model and data those of the exercise?"""
    for testimony in case.testimonies:
        if not testimony.wraps:
            return Judgement(False, f"Rank {testimony.rank} wraps no model in DDP.")
        if find_prefix(case, testimony) is None:
            return Judgement(False, f"The model that rank {testimony.rank} wraps is not the exercise's Net.")
        trained = [row for forward in trained_forwards(testimony) for row in forward["rows"]]
        known = sum(row in case.reference.training_rows for row in trained)
        if known < COVERAGE * len(trained):
            return Judgement(False, f"Rank {testimony.rank} trains on samples that are not in make_data('train').")
    return Judgement(bool(case.testimonies), "Model and data are the exercise's.")


def judge_trains(case: Case) -> Judgement:
    """Does every rank train the whole model?"""
    needed = case.scale(case.min_steps)
    for testimony in case.testimonies:
        series = series_by_name(case, testimony)
        steps = max((len(records) for records in series.values()), default=0)
        if steps < needed:
            return Judgement(False, f"Rank {testimony.rank} makes {steps} optimizer steps, not {needed}.")
        before, after = (
            read_state(case, testimony, testimony.begin),
            read_state(case, testimony, testimony.end),
        )
        still = [name for name in case.reference.parameters if np.array_equal(before[name], after[name])]
        if still:
            return Judgement(False, f"On rank {testimony.rank}, {name_some(still)} ended as it began.")
    return Judgement(
        bool(case.testimonies), f"Every rank makes {needed} optimizer steps or more and trains it all."
    )


def judge_parallel(case: Case) -> Judgement:
    """Do all ranks train one model through DDP, each on data of its own?"""
    for testimony in case.testimonies:
        sizes = {step["world_size"] for step in testimony.steps} | {wrap["ranks"] for wrap in testimony.wraps}
        if not testimony.wraps or sizes != {case.ranks}:
            size = min(sizes, default=1) if testimony.wraps else 1
            return Judgement(False, f"Rank {testimony.rank} trains in a group of {size}, not of {case.ranks}.")
        unarmed = [
            record["name"] for step in testimony.steps for record in step["parameters"] if record["armed"] == 0
        ]
        if unarmed:
            total = sum(len(step["parameters"]) for step in testimony.steps)
            return Judgement(
                False,
                f"On rank {testimony.rank}, {len(unarmed)} of {total} gradients used never reached a reducer of "
                f"DDP's that expected them ({name_some(unarmed)}).",
            )
    aligned = align_all(case)
    equal = sum(is_close(one["local"], ranks[0]["local"]) for _, _, ranks in aligned for one in ranks[1:])
    if equal > (1 - COVERAGE) * len(aligned) * (case.ranks - 1):
        return Judgement(
            False, f"In {equal} of {len(aligned)} cases the ranks computed the same gradient: same data."
        )
    return Judgement(True, "Every gradient goes through DDP, and every rank has data of its own.")


def judge_synchronised(case: Case) -> Judgement:
    """Is what the optimizer uses the mean over the ranks, and do the replicas stay one model?"""
    aligned = align_all(case)
    wrong = [(name, step) for name, step, ranks in aligned if not used_the_mean(ranks)]
    parted = [(name, step) for name, step, ranks in aligned if len({one["after"] for one in ranks}) > 1]
    states = [read_state(case, testimony, testimony.end) for testimony in case.testimonies]
    differing = [
        name
        for name in case.reference.parameters
        if any(not np.array_equal(state[name], states[0][name]) for state in states)
    ]
    if wrong:
        steps = {step for _, step in wrong}
        return Judgement(
            False,
            f"In {plural(len(steps), 'step')}, from step {min(steps) + 1} on, the optimizer used gradients "
            f"that are not the mean over the ranks ({name_some([name for name, _ in wrong])}).",
        )
    if parted:
        first = min(step for _, step in parted)
        return Judgement(False, f"The ranks' parameters differ from step {first + 1} on.")
    if differing:
        return Judgement(False, f"At the end the ranks hold different values of {name_some(differing)}.")
    return Judgement(
        True, "In every step the ranks' mean gradient was used, and all ranks end with the same model."
    )


def judge_alike(case: Case) -> Judgement:
    """Do the ranks run the same program: as many steps, same learning rates, same modes?"""
    align_all(case)
    steps = [len(testimony.steps) for testimony in case.testimonies]
    if len(set(steps)) > 1:
        return Judgement(False, f"The ranks make different numbers of optimizer steps: {steps}.")
    for index, records in enumerate(zip(*(testimony.steps for testimony in case.testimonies), strict=True)):
        rates = [[record["lr"] for record in step["parameters"]] for step in records]
        if any(other != rates[0] for other in rates):
            return Judgement(False, f"In step {index + 1} the ranks use different learning rates.")
        modes = [step["evaluating"] for step in records]
        if any(other != modes[0] for other in modes):
            in_eval = [rank for rank, names in enumerate(modes) if names]
            return Judgement(False, f"In step {index + 1} rank {in_eval[0]} is in eval mode while others train.")
    return Judgement(True, "All ranks make the same steps in the same modes.")


def judge_accuracy(case: Case) -> Judgement:
    """Is every rank's final model good on test data, as the grader computes it?"""
    accuracies = [
        case.reference.accuracy(read_state(case, testimony, testimony.end)) for testimony in case.testimonies
    ]
    shown = " and ".join(f"{accuracy:.1%}" for accuracy in accuracies)
    good = len(accuracies) == case.ranks and min(accuracies) >= case.min_accuracy
    return Judgement(good, f"Test accuracy by rank: {shown}; {case.min_accuracy:.0%} is asked for.")


def judge_findings(case: Case) -> Judgement:
    """Does the watch find nothing?"""
    if case.findings is None:
        return Judgement(False, "The watch's findings are gone.")
    bad = [finding for finding in case.findings if finding["severity"] in ("error", "warning")]
    if bad:
        places = [
            f"{one['code']} {one['name']}" + (f" (line {one['line']})" if one["line"] else "") for one in bad
        ]
        return Judgement(False, f"ddpcall watch finds {', '.join(places)}.")
    return Judgement(True, "ddpcall watch finds nothing.")


# ---- the intent of single exercises ---------------------------------------------------------------------------


def judge_hook_fires(case: Case) -> Judgement:
    """Does a hook on the model fire in every training step?"""
    for testimony in case.testimonies:
        fired = [step["fired"].get("wrapped", 0) + step["fired"].get("inner", 0) > 0 for step in testimony.steps]
        if not fired or not all(fired):
            return Judgement(
                False, f"On rank {testimony.rank} the model's hook fired in {sum(fired)} of {len(fired)} steps."
            )
    return Judgement(bool(case.testimonies), "The hook on the model fires in every training step.")


def judge_accumulates(micro_batches: int) -> Callable[[Case], Judgement]:
    """Are several micro-batches accumulated for each step?"""

    def judge(case: Case) -> Judgement:
        counts = {record["armed"] + record["unarmed"] for _, _, ranks in align(case) for record in ranks}
        return Judgement(
            counts == {micro_batches},
            f"Backwards for each step: {', '.join(map(str, sorted(counts))) or 'none'}; {micro_batches} are "
            f"asked for.",
        )

    return judge


def judge_reduces_once(case: Case) -> Judgement:
    """Do gradients travel once a step?"""
    counts = {record["armed"] for _, _, ranks in align(case) for record in ranks}
    return Judgement(
        counts == {1},
        f"Reductions for each step: {', '.join(map(str, sorted(counts))) or 'none'}; once is enough.",
    )


def judge_unfreezes(name: str, frozen_steps: int, trained_steps: int) -> Callable[[Case], Judgement]:
    """Is a part of the model frozen at first and trained later?"""

    def judge(case: Case) -> Judgement:
        for testimony in case.testimonies:
            before, moved = steps_that_move(case, testimony, name)
            if before < case.scale(frozen_steps):
                return Judgement(
                    False, f"The {name} is trained from step {before + 1} on; stage 1 trains the head alone."
                )
            if moved < case.scale(trained_steps):
                return Judgement(
                    False, f"The {name} is trained in {moved} steps; stage 2 trains it with the head."
                )
        return Judgement(bool(case.testimonies), f"The {name} is frozen in stage 1 and trained in stage 2.")

    return judge


def judge_evaluates(times: int, samples: int) -> Callable[[Case], Judgement]:
    """Is the model evaluated while it is trained?"""

    def judge(case: Case) -> Judgement:
        seen: dict[int, int] = {}
        for testimony in case.testimonies[:1]:
            for forward in testimony.forwards:
                if not forward["gradients"] and not forward["training"] and forward["step"]:
                    seen[forward["step"]] = seen.get(forward["step"], 0) + len(forward["rows"])
        whole = sum(rows >= samples for rows in seen.values())
        return Judgement(
            whole >= times, f"Rank 0 evaluated the model {whole} times in eval mode; {times} are asked for."
        )

    return judge


def judge_train_mode(case: Case) -> Judgement:
    """Is every module in train mode in every step, on every rank?"""
    for testimony in case.testimonies:
        for index, step in enumerate(testimony.steps):
            if step["evaluating"]:
                return Judgement(
                    False, f"Rank {testimony.rank} makes step {index + 1} in eval mode: dropout is off."
                )
    return Judgement(bool(case.testimonies), "Every step is made in train mode, with dropout.")


def judge_two_rates(slow: str, fast: str) -> Callable[[Case], Judgement]:
    """Does one part of the model learn more slowly than another?"""

    def judge(case: Case) -> Judgement:
        rates: dict[str, set[float]] = {slow: set(), fast: set()}
        for name, _, ranks in align(case):
            rates.setdefault(name.split(".")[0], set()).update(record["lr"] for record in ranks)
        kept = bool(rates[slow] and rates[fast]) and max(rates[slow]) < min(rates[fast])
        shown = {
            part: ", ".join(f"{rate:g}" for rate in sorted(values)) or "none" for part, values in rates.items()
        }
        return Judgement(kept, f"Learning rates: {slow} {shown[slow]}; {fast} {shown[fast]}.")

    return judge


def judge_gets_gradient(name: str, why: str) -> Callable[[Case], Judgement]:
    """Does a part of the model get a gradient in every step?"""

    def judge(case: Case) -> Judgement:
        for testimony in case.testimonies:
            series = series_by_name(case, testimony)
            steps = max((len(records) for records in series.values()), default=0)
            taught = max((count_nonzero(series[key]) for key in series if key.startswith(f"{name}.")), default=0)
            if taught < steps or not steps:
                return Judgement(
                    False,
                    f"On rank {testimony.rank} the {name} got a gradient in {taught} of {steps} steps: {why}.",
                )
        return Judgement(bool(case.testimonies), f"The {name} learns in every step.")

    return judge


def judge_begins_pretrained(case: Case) -> Judgement:
    """Does every rank begin with the checkpoint's weights?"""
    expected = case.reference.call("pretrained_weights")
    for testimony in case.testimonies:
        state = read_state(case, testimony, testimony.begin)
        if any(not np.allclose(state[name], value.numpy(), atol=1e-6) for name, value in expected.items()):
            return Judgement(False, f"Rank {testimony.rank} does not begin with the pretrained weights.")
    return Judgement(bool(case.testimonies), "Every rank begins with the pretrained weights.")


def judge_covers(case: Case) -> Judgement:
    """Do the ranks together see every sample about once an epoch?"""
    epochs = list_epochs(case)
    for number, by_rank in enumerate(epochs):
        rows = [row for rows in by_rank for row in rows]
        share = len(set(rows)) / len(case.reference.training_rows)
        if share < COVERAGE:
            return Judgement(
                False,
                f"In the first {len(rows)} samples of epoch {number + 1} the ranks saw {share:.0%} of the data.",
            )
    return Judgement(bool(epochs), "The ranks divide every epoch's samples between them.")


def judge_shuffles(case: Case) -> Judgement:
    """Is the data shuffled anew in every epoch?"""
    epochs = list_epochs(case)
    repeated = [number for number in range(1, len(epochs)) if epochs[number][0] == epochs[number - 1][0]]
    if len(epochs) < 2 or repeated:
        return Judgement(False, "Two epochs in a row had the same order: the sampler was not told the epoch.")
    return Judgement(True, "Every epoch has an order of its own.")


def judge_as_one_process(case: Case) -> Judgement:
    """Is every gradient that was used the one that one process computes for the samples of all ranks?"""
    used: dict[int, dict[str, np.ndarray]] = {}
    rates: dict[int, float] = {}
    for name, step, ranks in align_all(case):
        used.setdefault(step, {})[name] = np.array([record["used"] for record in ranks])
        rates[step] = ranks[0]["lr"]
    rows = {
        step: [
            row
            for testimony in case.testimonies
            for forward in trained_forwards(testimony)
            if forward["step"] == step
            for row in forward["rows"]
        ]
        for step in used
    }
    begin = read_state(case, case.testimonies[0], case.testimonies[0].begin)
    alone = case.reference.train_alone(begin, ((rows[step], rates[step]) for step in sorted(used)))
    for step, expected in zip(sorted(used), alone, strict=True):
        total = np.linalg.norm(np.concatenate([np.array(value) for value in expected.values()]))
        for name, value in expected.items():
            off = np.linalg.norm(used[step].get(name, np.zeros((1, len(value)))) - np.array(value), axis=1).max()
            if off > AS_ONE * total:
                share = f"{off / total:.1%} of the whole gradient"
                return Judgement(
                    False,
                    f"In step {step + 1} the gradient of `{name}` is not that of one process with the samples of "
                    f"all ranks, by {share}: every target has to weigh the same.",
                )
    return Judgement(True, "In every step the ranks used the gradient that one process computes.")
