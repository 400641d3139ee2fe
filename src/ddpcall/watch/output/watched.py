"""What a watch saw of a run, and what that amounts to.

"No findings" is an answer only where there was something to see. Every rank keeps a record of its own; the records
of all ranks are merged into one of the same shape. No torch.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from ddpcall.watch.output.certificate import certify, tells_something

WRAPPERS = {"ddp": "DDP", "replicate": "replicate()", "fsdp2": "FSDP2", "tp": "tensor-parallel"}
FSDP1 = "FullyShardedDataParallel (FSDP1)"
DATA_PARALLEL = "torch.nn.DataParallel"
PYTHON_REDUCER = "DDP's python reducer"
DELAYED_ALL_REDUCE = "DDP's delayed all-reduce"
BY_HAND = "updates without a torch optimizer"
WRITE_INSTEAD = {
    FSDP1: "shard the model with `fully_shard(model)` (FSDP2)",
    DATA_PARALLEL: "wrap the model in DistributedDataParallel, with one process for each device",
    PYTHON_REDUCER: "leave `torch._dynamo.config.optimize_ddp` as it is",
    DELAYED_ALL_REDUCE: "leave out `delay_all_reduce_named_params`",
    BY_HAND: "let an optimizer of torch.optim step the parameters, or one copy of each in their shapes",
}
EVERY_STEP_UNTIL = 16  # steps up to this one are all measured
ESSENTIAL_PARTS = ("DistributedDataParallel and replicate", "backwards", "collectives and optimizer steps")
_ALONE = "hooks, compiled code and precision were watched"


@dataclass(frozen=True)
class WatchedModel:
    """One wrapped model.

    Attributes:
        name: Its class.
        wrapper: A key of `WRAPPERS`.
        steps: Optimizer steps on its parameters.
    """

    name: str
    wrapper: str
    steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What was watched, on one rank or, merged, on several.

    Attributes:
        script: As it was named on the command line.
        attached: Whether the watch was put on torch.
        ranks: The ranks that left a record.
        world_size: How many ranks there are, as the launcher or the process group says.
        elsewhere: Ranks that are watched and report by themselves: those of other hosts, and those whose vitals
            were compared with these ranks'.
        models: The wrapped models that were followed.
        optimizer_steps: Steps of the optimizer with the most.
        idle_ranks: Those of `ranks` on which no optimizer stepped.
        comparisons: Steps after which the ranks' vitals were compared.
        comparisons_due: Steps after which a rank took its vitals.
        not_compared: Why no more was compared; empty where nothing went wrong.
        mixing: Who learned from whom, in the steps that were measured: the fields of `rules.mixing.Certificate`.
        not_measured: Why no step was measured any more; empty where nothing went wrong.
        process_group: The size of the default process group; 0 where there was none.
        own_collectives: Collectives that the script itself called.
        may_average: Whether they carried enough to average gradients or parameters.
        started_alone: Whether a launcher prepared for several processes, and started one.
        not_followed: Wrappers and optimizers that were used, and that the watch does not know.
        not_attached: Parts of the watch that could not attach, and why.
        not_written: Files of the watch's own that could not be written, and why.
        faults: Errors of the watch's own.
        error: The error that ended the script; empty where it came to its end.
        ended: Whether every rank's record is its last.
    """

    script: str = "train.py"
    attached: bool = False
    ranks: tuple[int, ...] = ()
    world_size: int = 1
    elsewhere: tuple[int, ...] = ()
    models: tuple[WatchedModel, ...] = ()
    optimizer_steps: int = 0
    idle_ranks: tuple[int, ...] = ()
    comparisons: int = 0
    comparisons_due: int = 0
    not_compared: str = ""
    mixing: dict[str, Any] = field(default_factory=dict)
    not_measured: str = ""
    process_group: int = 0
    own_collectives: int = 0
    may_average: bool = False
    started_alone: bool = False
    not_followed: tuple[str, ...] = ()
    not_attached: dict[str, str] = field(default_factory=dict)
    not_written: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    error: str = ""
    ended: bool = False

    @property
    def missing_ranks(self) -> tuple[int, ...]:
        """The ranks of which nothing is known."""
        return tuple(sorted(set(range(self.world_size)) - {*self.ranks, *self.elsewhere}))


@dataclass(frozen=True)
class Answer:
    """What a record amounts to, where nothing was found.

    Attributes:
        text: What was watched; or why nothing could be found out, and the line to write.
        start: What stands before it where nothing was found.
        is_evidence: Whether enough was watched for "no findings" to mean something.
    """

    text: str
    start: str
    is_evidence: bool


def read_watched(record: dict[str, Any]) -> Watched:
    """Rebuild a record from JSON; keys of a later version are left out."""
    known = record.keys() & {each.name for each in dataclasses.fields(Watched)}
    values: dict[str, Any] = {key: tuple(v) if isinstance(v := record[key], list) else v for key in known}
    values["models"] = tuple(WatchedModel(**model) for model in record.get("models", ()))
    return Watched(**values)


def merge_watched(records: Iterable[Watched]) -> Watched:
    """Merge the records of several ranks.

    A process that only starts others is in a smaller world than they are: it is no rank of theirs.
    """
    records = list(records)
    if not records:
        return Watched()
    world_size = max(record.world_size for record in records)
    of_world = [record for record in records if record.world_size == world_size]
    ranks = {rank for record in of_world for rank in record.ranks}
    return Watched(
        script=of_world[0].script,
        attached=any(record.attached for record in of_world),
        ranks=tuple(sorted(ranks)),
        world_size=world_size,
        elsewhere=tuple(sorted({rank for record in of_world for rank in record.elsewhere} - ranks)),
        models=_merge_models(records),
        optimizer_steps=max(record.optimizer_steps for record in records),
        idle_ranks=tuple(sorted({rank for record in of_world for rank in record.idle_ranks})),
        comparisons=max(record.comparisons for record in records),
        comparisons_due=max(record.comparisons_due for record in records),
        not_compared=next((record.not_compared for record in records if record.not_compared), ""),
        mixing=max((record.mixing for record in records), key=lambda mixing: mixing.get("steps", 0)),
        not_measured=next((record.not_measured for record in records if record.not_measured), ""),
        process_group=max(record.process_group for record in records),
        own_collectives=max(record.own_collectives for record in records),
        may_average=any(record.may_average for record in records),
        started_alone=all(record.started_alone for record in of_world),
        not_followed=tuple(dict.fromkeys(each for record in records for each in record.not_followed)),
        not_attached={part: why for record in records for part, why in record.not_attached.items()},
        not_written=tuple(dict.fromkeys(each for record in records for each in record.not_written)),
        faults=tuple(dict.fromkeys(each for record in records for each in record.faults)),
        error=next((record.error for record in records if record.error), ""),
        ended=all(record.ended for record in records),
    )


def _merge_models(records: list[Watched]) -> tuple[WatchedModel, ...]:
    """Take the same model of several ranks as one: the first of a name and wrapper is the first on every rank."""
    merged: dict[tuple[str, str], list[int]] = {}
    for record in records:
        own: dict[tuple[str, str], list[int]] = {}
        for model in record.models:
            own.setdefault((model.name, model.wrapper), []).append(model.steps)
        for key, steps in own.items():
            merged[key] = [max(pair) for pair in zip_longest(merged.get(key, []), steps, fillvalue=0)]
    return tuple(WatchedModel(*key, steps) for key, each in merged.items() for steps in each)


# ---- what it amounts to -----------------------------------------------------------------------------------------


def weigh(watched: Watched) -> Answer:
    """Say whether enough was watched for "no findings" to mean something, and what it was."""
    reason = _find_obstacle(watched)
    text = _describe(watched) if reason is None else reason
    if watched.not_written:
        text += f"; could not be written: {_join(watched.not_written)}"
    if watched.not_attached and watched.attached:
        text += f"; watched without: {_join(f'{part} ({why})' for part, why in watched.not_attached.items())}"
    is_evidence = reason is None and not watched.not_written
    start = (
        "no findings: " if is_evidence else "" if reason else "nothing was found, but not all could be written: "
    )
    return Answer(text, start, is_evidence)


def _find_obstacle(watched: Watched) -> str | None:
    """Return why nothing, or too little, could be found out, with the line to write; None where enough could."""
    if not watched.attached:
        return _explain_nothing_attached(watched)
    if watched.error and not watched.optimizer_steps:
        return f"{_NOTHING}{watched.script} ended with {watched.error} before its first optimizer step"
    if watched.faults:
        return f"{_NOTHING}the watch failed with an error of its own ({watched.faults[0]}); please report it"
    if not watched.ended and not watched.error:
        return f"{_NOTHING}{watched.script} is still running, or a rank was ended before its last word"
    if watched.missing_ranks:
        return _explain_missing_ranks(watched)
    if watched.world_size > 1 and any(part in watched.not_attached for part in ESSENTIAL_PARTS):
        return f"{_NOTHING}gradients are not watched where a part of the watch is missing; please report it"
    if watched.not_followed and not watched.models and not tells_something(watched.mixing):
        are = "is" if len(watched.not_followed) == 1 else "are"
        stacks = f"{_join(watched.not_followed)} {are} not followed by the watch"
        return f"{_NOTHING}{stacks}{_advise(watched.not_followed)}"
    if watched.world_size == 1:
        return _explain_one_process(watched)
    if cut_off := _explain_comparisons_cut_off(watched):
        return cut_off
    if tells_something(watched.mixing):  # gradients were measured, with any wrapper or none
        return None
    return _explain_steps(watched) or _explain_unwrapped(watched) or _explain_not_compared(watched)


_NOTHING = "nothing could be found out: "


def _explain_nothing_attached(watched: Watched) -> str:
    if watched.not_attached:
        reasons = _join(f"{part} ({why})" for part, why in watched.not_attached.items())
        return f"nothing was watched: the watch could not attach to {reasons}; please report it"
    if watched.error:
        return f"nothing was watched: {watched.script} ended with {watched.error} before it imported torch"
    return (
        f"nothing was watched: {watched.script} never imported torch. Watch the script that trains, with the "
        "arguments it trains with: `ddpcall watch train.py`"
    )


def _explain_missing_ranks(watched: Watched) -> str:
    missing = _join(map(str, watched.missing_ranks))
    number = len(watched.ranks)
    return (
        f"{number} of {watched.world_size} ranks {'was' if number == 1 else 'were'} watched: "
        f"nothing is known of rank{_s(watched.missing_ranks)} {missing}. Start every rank under the watch: "
        f"`{_start(watched)}`. A script that starts its ranks itself has to hand its environment on to each, "
        "`env={**os.environ, …}`"
    )


def _explain_one_process(watched: Watched) -> str | None:
    if watched.process_group == 0 and not watched.started_alone:
        return None
    cause = "the process group has one rank" if watched.process_group else "the launcher started one of several"
    return (
        f"{_NOTHING}there is one process ({cause}), and what a wrapper does to gradients shows on two. Write "
        f"`{_start(watched)}`"
    )


def _explain_steps(watched: Watched) -> str | None:
    models = f" on {_count_models(watched)}" if watched.models else ""
    if not watched.optimizer_steps and BY_HAND not in watched.not_followed:
        return (
            f"{_NOTHING}no step of a torch optimizer was taken{models}. Let the script train for at least "
            "one step, with an optimizer of torch.optim"
        )
    if watched.idle_ranks and watched.optimizer_steps:
        ranks = _join(map(str, watched.idle_ranks))
        return (
            f"{_NOTHING}rank{_s(watched.idle_ranks)} {ranks} took no optimizer step, another rank "
            f"{watched.optimizer_steps}: replicas are compared after steps that all ranks take. Let every rank "
            "take the same number of steps. Where one rank is to step for all and sends the parameters on, check "
            "with `ddpcall.asserts.assert_replicated(model)`, on every rank, that they arrive"
        )
    if watched.models and not any(model.steps for model in watched.models):
        return _explain_models_not_stepped(watched)
    return None


def _explain_models_not_stepped(watched: Watched) -> str | None:
    """Where optimizers step, and nothing of a wrapped model: what they step may be reduced by the script."""
    models = _count_models(watched)
    if watched.not_followed or not watched.optimizer_steps:
        cause = f"no optimizer step used the gradients of {models}"
        return f"{_NOTHING}{cause}{_advise(watched.not_followed or (BY_HAND,))}"
    if watched.may_average:
        return None
    return (
        f"{_NOTHING}{_plural(watched.optimizer_steps, 'optimizer step')} changed no parameter of {models}. Either "
        "the optimizer holds parameters that are no longer the model's: make it after the model is wrapped and "
        "before its first forward, `torch.optim.AdamW(model.parameters())`. Or what it trains was added after the "
        "model was wrapped, and every rank trains it alone: add it first"
    )


def _explain_unwrapped(watched: Watched) -> str | None:
    """Where nothing is wrapped, the script may average by itself; where it sends too little, nobody does."""
    if watched.models:
        return None
    if watched.may_average and watched.process_group > 1:
        mixing = watched.mixing
        if set(mixing.get("shapes", ())) != {"unidentifiable"}:
            return None
        steps = f"{_plural(mixing['steps'], 'step')} {'was' if mixing['steps'] == 1 else 'were'} measured"
        told = f"who learned from whom could not be told ({mixing['reason']})"
        return f"{_NOTHING}no model was wrapped, and {steps}: {told}"
    group = "`dist.init_process_group()` and then "
    if not watched.process_group:
        cause = "no process group was made"
    elif watched.process_group == 1:
        cause = "every rank made a process group of one"
    else:
        carried = "collectives carried too little for gradients"
        sent = carried if watched.own_collectives else "no collective called"
        cause, group = f"no model was wrapped, {sent}", ""
    return (
        f"{_NOTHING}{cause}, so each of {watched.world_size} ranks trains a model of its own. Write "
        f"{group}`model = DistributedDataParallel(model)`"
    )


def _explain_comparisons_cut_off(watched: Watched) -> str | None:
    """Where the store was lost in mid-run, what was wrong after that could not be found."""
    measured = watched.mixing.get("steps", 0) if tells_something(watched.mixing) else 0
    is_measured = watched.models or measured >= min(watched.optimizer_steps, EVERY_STEP_UNTIL)
    is_known = watched.comparisons >= watched.comparisons_due and is_measured
    if not watched.not_compared or is_known or watched.error or 0 not in watched.ranks or watched.world_size == 1:
        return None
    if not watched.comparisons and not measured:
        return f"{_NOTHING}the ranks could not be compared ({watched.not_compared}). Write `{_start(watched)}`"
    times = _plural(watched.comparisons or measured, "time")
    return (
        f"nothing was found, and not all was watched: the ranks were compared {times} and then no more "
        f"({watched.not_compared})"
    )


def _explain_not_compared(watched: Watched) -> str | None:
    if watched.comparisons or not watched.comparisons_due or 0 not in watched.ranks:
        return None
    if watched.error:
        return f"{_NOTHING}{watched.script} ended with {watched.error} before the ranks were compared"
    return f"{_NOTHING}the ranks could not be compared (rank 0 got no answer). Write `{_start(watched)}`"


def _describe(watched: Watched) -> str:
    steps = _plural(watched.optimizer_steps, "step") if watched.optimizer_steps else "no optimizer step"
    if watched.world_size == 1:
        text = f"one process, {steps}: {_ALONE}; gradients need two ranks"
    else:
        model = _count_models(watched) if watched.models else "no wrapped model"
        text = f"{model}, {steps} on {len(watched.ranks)} of {watched.world_size} ranks"
        if watched.elsewhere:
            text += " (the others report by themselves)"
        if watched.comparisons:
            text += f", compared {_plural(watched.comparisons, 'time')}"
        if certificate := certify(watched.mixing, watched.not_measured):
            text += f"; {certificate}"
        elif not watched.models:
            text += f": {_ALONE}, gradients that the script reduces itself were not"
    idle = [model.name for model in watched.models if not model.steps]
    if idle:
        text += f"; no step on {_join(idle)}"
    if watched.not_compared and watched.comparisons_due:
        text += f"; then not compared any more ({watched.not_compared})"
    if watched.not_followed:
        text += f"; not followed: {_join(watched.not_followed)}"
    return f"{text}, until it ended with {watched.error}" if watched.error else text


def _count_models(watched: Watched) -> str:
    counts = Counter(model.wrapper for model in watched.models)
    return _join(f"{_plural(count, f'{WRAPPERS.get(name, name)} model')}" for name, count in counts.items())


def _advise(stacks: Iterable[str]) -> str:
    lines = [WRITE_INSTEAD[stack] for stack in stacks if stack in WRITE_INSTEAD]
    return f". To have it watched, {lines[0]}" if lines else ""


def _start(watched: Watched) -> str:
    return f"ddpcall watch -n {max(2, watched.world_size)} {watched.script}"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _s(items: tuple[Any, ...]) -> str:
    return "s" * (len(items) != 1)


def _join(items: Iterable[str]) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last
