"""Who learned from whom: the mixing matrix of measured steps, judged across ranks, for models of any wrapper.

A gradient that is a rank's own is no harm by itself: the script may average weights instead, and experts are a
rank's own by design. It is harm where the weights were equal on all ranks before the step and stay different after
it. Where a sensor saw the cause, a finding names the line already; this rule reports the rest.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ddpcall.findings import Finding
from ddpcall.mixing.record import RankSketches
from ddpcall.mixing.result import Mixing, name_some
from ddpcall.mixing.shapes import NEVER_USED
from ddpcall.taps import NOWHERE, CallSite
from ddpcall.watch.rules.rule import make_finding
from ddpcall.watch.run import Run

PATIENCE_STEPS = 64
"""Steps, measured or not, that ranks may train apart before weights are averaged: nothing is reported yet."""
TOGETHER = ("averaged", "summed", "scaled", "transformed", "weighted")
"""Shapes in which every rank uses the same gradient."""
_OF_ONE_RANK = ("local", "unaccounted")
_APART = ("local", "partly_local", "groups", "different")
_CODES = {
    "local": "DC101",
    "unaccounted": "DC101",
    "partly_local": "DC104",
    "groups": "DC106",
    "dropped": "DC107",
    "late": "DC108",
    "thrown_away": "DC109",
    "different": "DC201",
}
_REPEATED = 2
_SHARED_OUT = "each rank steps its share of the parameters with its own gradient, and sends it to the others"
ROUNDING = 1e-2
"""Gradients of one batch differ between ranks by 1e-7 in float32, 1e-3 in bfloat16; of two batches by 1e-1."""


@dataclass
class Certificate:
    """What was measured, in the steps that were.

    Attributes:
        steps: Steps that were measured and judged.
        shapes: How many of them had each shape.
        shape: That of the last step that could be judged: the matrix is its.
        residual: The largest that a shape left unexplained, relative to the gradients that were mixed.
        scale: Times the mean, in the last step.
        ranks: How many ranks were compared.
        matrix: Shape (ranks, columns), of the last step; None where it does not tell.
        columns: (rank, backward) of the matrix's columns.
        by_parameter: Parameters' names by shape, in the last step that was not one shape for all.
        reason: Why the last step that could not be judged could not.
    """

    steps: int = 0
    shapes: dict[str, int] = field(default_factory=dict)
    shape: str = ""
    residual: float = 0.0
    scale: float = 1.0
    ranks: int = 0
    matrix: list[list[float | None]] = field(default_factory=list)
    columns: list[list[int]] = field(default_factory=list)
    by_parameter: dict[str, list[str]] = field(default_factory=dict)
    reason: str = ""

    def add(self, mixing: Mixing) -> None:
        """Count a measured step."""
        self.steps += 1
        self.shapes[mixing.shape] = self.shapes.get(mixing.shape, 0) + 1
        self.ranks = max(self.ranks, mixing.num_ranks)
        if mixing.shape == "unidentifiable":
            self.reason = mixing.reason
            return
        residuals = [value for value in mixing.residual if np.isfinite(value)]
        self.residual = max([self.residual, *residuals])
        plain = mixing.to_json()
        self.scale = plain["scale"] or 0.0
        self.matrix, self.columns = plain["matrix"], plain["columns"]
        self.shape = mixing.shape
        if len(mixing.by_parameter) > 1:
            self.by_parameter = plain["by_parameter"]


@dataclass(frozen=True)
class Where:
    """What the comparing rank knows of a step.

    Attributes:
        step: Its optimizer's number of it, from 1.
        optimizer: Which optimizer, by its id.
        stepped: The line that stepped.
        made: The line that handed parameters to the optimizer last.
        shares_out: Whether each rank steps its share of the parameters alone, and sends it to the others.
    """

    step: int = 0
    optimizer: int = 0
    stepped: CallSite = NOWHERE
    made: CallSite = NOWHERE
    shares_out: bool = False


@dataclass
class _Apart:
    """Parameters that a step left to each rank alone, and where that was first seen."""

    shape: str
    step: int
    names: list[str]
    reason: str
    ranks: tuple[int, ...]
    site: CallSite = NOWHERE


class MixingRule:
    """Judges the measured steps; lives on the rank that compares.

    Blind to: whether the mean over ranks is what was meant; weights that are averaged less often than every
    64 steps, where the script's collectives cannot be seen.
    """

    def __init__(self, run: Run) -> None:
        self.certificate = Certificate()
        self._run = run
        self._confirmed: dict[Hashable, set[str]] = {}
        self._numel: dict[str, int] = {}
        self._makers: dict[CallSite, set[int]] = {}
        self._maker_of: dict[str, CallSite] = {}
        self._ever_equal: set[str] = set()
        self._averaged: set[str] = set()
        self._pending: dict[str, _Apart] = {}
        self._said: set[str] = set()
        self._used: set[str] = set()
        self._repeated: dict[tuple[str, str], list[int]] = {}
        self._where = Where()
        run.will_explain = self._will_explain

    def _will_explain(self) -> bool:
        """Say whether it is only waited for the weights to be averaged, before it is told why they differ."""
        return any(apart.shape != "different" for apart in self._pending.values())

    def judge(self, where: Where, records: Sequence[RankSketches], mixing: Mixing) -> None:
        """Judge one measured step.

        Args:
            where: What the comparing rank knows of it.
            records: All ranks' records, or those that were asked for.
            mixing: Who learned from whom in it.
        """
        step = where.step
        self._where = where
        self._makers.setdefault(where.made, set()).add(where.optimizer)
        self._maker_of.update((name, where.made) for shape in mixing.by_parameter.values() for name in shape)
        self.certificate.add(mixing)
        for record in records:
            self._used |= {n for n, used in zip(record.names, record.used, strict=True) if used.any()}
            self._numel.update(zip(record.names, record.numel, strict=True))
        self._note_weights(mixing)
        for shape, names in mixing.by_parameter.items():
            if shape == "local" and where.shares_out:  # that keeps the weights equal, and averages nothing
                self._note_repeated("dropped", names, step, replace(mixing, reason=_SHARED_OUT))
            elif shape in _APART:
                self._note_apart(shape, self._find_parted(names, mixing), step, mixing)
            elif shape == "late" and mixing.reason == NEVER_USED:
                # Whole gradients come with their own step: what is not in it was dropped on purpose, as a probe's.
                self._note_repeated(shape, [name for name in names if name in self._run.sharded], step, mixing)
            elif shape in ("dropped", "late"):
                self._note_repeated(shape, names, step, mixing)
            elif shape == "thrown_away" and set(mixing.by_parameter) <= {"thrown_away", "unidentifiable"}:
                # Of some parameters alone, the script clears gradients on purpose: to freeze a layer for a while.
                self._note_repeated(shape, [name for name in names if name not in self._used], step, mixing)
            elif shape in TOGETHER:
                self._note_mixed(names, step, mixing)
            elif shape == "unaccounted":
                apart = [name for name in self._find_parted(names, mixing) if _differ(name, records)]
                self._note_apart(shape, apart, step, mixing)
        for key, apart in list(self._pending.items()):
            if step >= apart.step + PATIENCE_STEPS and self._run.num_sent() is None:
                self._say(self._pending.pop(key))

    def close(self) -> None:
        """Say what has waited for the weights to be averaged: they never were, unless after the last step."""
        sent = self._run.num_sent() or 0
        for key in list(self._pending):
            apart = self._pending.pop(key)
            if sent < sum(self._numel[name] for name in apart.names):
                self._say(apart)

    # ---- what becomes of the weights ---------------------------------------------------------------------------

    def _note_weights(self, mixing: Mixing) -> None:
        for kind in ("equal", "averaged", "parted"):
            names = set(mixing.weights.get(kind, ()))
            self._ever_equal |= names
            self._averaged |= {name for each in self._pending.values() for name in each.names if name in names}
        self._averaged |= set(mixing.weights.get("averaged", ()))
        for key in [key for key, names in self._confirmed.items() if names <= self._averaged]:
            del self._confirmed[key]
            self._run.book.withdraw(key)
        for key, apart in list(self._pending.items()):
            apart.names = [name for name in apart.names if name not in self._averaged]
            if not apart.names:
                del self._pending[key]

    def _find_parted(self, names: Iterable[str], mixing: Mixing) -> list[str]:
        """Return the parameters whose weights were equal, and are not any more."""
        parted = set(mixing.weights.get("parted", ()))
        parted |= set(mixing.weights.get("different", ())) & self._ever_equal
        return [name for name in names if name in parted and name not in self._averaged]

    def _note_apart(self, shape: str, names: list[str], step: int, mixing: Mixing) -> None:
        new = [name for name in names if name not in self._said]
        if not new:
            return
        self._confirm(new)
        # Where nothing of it is wrapped, the line that handed it to the optimizer says more.
        is_inside = new[0] in self._run.inside | self._run.sharded
        site = self._where.stepped if is_inside or shape not in _OF_ONE_RANK else self._where.made
        known = self._pending.setdefault(
            f"{shape} {site}", _Apart(shape, step, [], mixing.reason, mixing.ranks, site)
        )
        known.names += [name for name in new if name not in known.names]

    def _note_repeated(self, shape: str, names: Iterable[str], step: int, mixing: Mixing) -> None:
        """Take what may happen once in a training that is right: it counts where it happens again."""
        # Replicas that part used different gradients: whatever fits them, it is not this.
        parted = {name for kind in ("parted", "different") for name in mixing.weights.get(kind, ())}
        often = []
        for name in names:
            if name in parted:
                continue
            steps = self._repeated.setdefault((shape, name), [])
            steps.append(step)
            if len(steps) == _REPEATED and name not in self._said:
                often.append(name)
        if often:
            step = min(self._repeated[shape, name][0] for name in often)
            site = self._where.made if shape == "thrown_away" else self._where.stepped
            self._say(_Apart(shape, step, often, mixing.reason, mixing.ranks, site))

    def _note_mixed(self, names: Iterable[str], step: int, mixing: Mixing) -> None:
        """Weights that were never equal, and whose gradients are averaged: replicas that began apart."""
        different = set(mixing.weights.get("different", ()))
        never_equal = [
            name
            for name in names
            if name in different and name not in self._ever_equal | self._said and not self._run.is_compared(name)
        ]
        if never_equal:
            self._say(_Apart("began_apart", step, never_equal, "", mixing.ranks, self._where.stepped))

    def _confirm(self, names: list[str]) -> None:
        """Report what sensors suspected of these parameters' gradients: now it is known to be harm."""
        # Sensors look at wrapped models; a copy of one, in an inner loop, has the same names.
        names = [name for name in names if name in self._run.inside and not self._is_of_inner_loop(name)]
        for key in self._run.confirm(names):
            self._confirmed[key] = set(names)

    # ---- what is said ------------------------------------------------------------------------------------------

    def _say(self, apart: _Apart) -> None:
        names = [name for name in apart.names if name not in self._said and not self._is_of_inner_loop(name)]
        if apart.shape not in ("began_apart", "late"):  # a gradient that is not used is nobody's own
            self._confirm(names)
        if apart.shape == "different":  # how the weights differ says more
            names = [name for name in names if not self._run.is_compared(name)]
        names = [name for name in names if not self._run.is_explained(name)]
        self._said.update(apart.names)
        if names:
            self._run.report(self._make_finding(replace(apart, names=names)))

    def _is_of_inner_loop(self, name: str) -> bool:
        """Say whether an inner loop trains a parameter: its line makes optimizer after optimizer, beside another.

        Meta-learning does so, with a copy of the model on each rank that is thrown away.
        """
        return len(self._makers) > 1 and len(self._makers[self._maker_of[name]]) > 1

    def _make_finding(self, apart: _Apart) -> Finding:
        num_all = len(self._ever_equal | set(apart.names))
        code = _CODES.get(apart.shape, "DC201")
        name, reduced = apart.names[0], self._run.reduced
        if apart.shape in _OF_ONE_RANK and name in self._run.sharded:
            code = "DC106"
        elif apart.shape in _OF_ONE_RANK and (len(apart.names) < num_all or name in self._run.inside - reduced):
            code = "DC102"
        fix = _FIXES.get(apart.shape, "")
        return make_finding(
            code,
            f"mixing_{apart.shape}",
            apart.site,
            _describe(apart, num_all, self.certificate.ranks),
            step=apart.step,
            ranks=apart.ranks,
            parameters=tuple(apart.names),
            fix=_NOT_REDUCED if code == "DC101" and name in reduced else fix,
        )


def _differ(name: str, records: Sequence[RankSketches]) -> bool:
    """Say whether the ranks used gradients that differ by more than rounding, in any precision."""
    used = np.stack([record.used[record.names.index(name)] for record in records if record.num_steps])
    return bool(np.linalg.norm(used - used[0], axis=1).max() > ROUNDING * np.linalg.norm(used, axis=1).max())


_AVERAGE = "`dist.all_reduce(p.grad)`, then `p.grad /= dist.get_world_size()`"
_NOT_REDUCED = (
    "Call the wrapper, and let its reduction reach all ranks: a hook given to `register_comm_hook` ends in an "
    "all-reduce, as `default_hooks.allreduce_hook` does, and `process_group` holds every rank."
)
_FIXES: Mapping[str, str] = {
    "local": "Wrap the model that holds these parameters before the first forward, and call the wrapper; or "
    f"average each gradient before the step: {_AVERAGE}.",
    "began_apart": "Give every rank the same weights before training: `dist.broadcast(p.data, 0)` for each "
    "parameter `p`, or `torch.manual_seed(…)` with the same seed before the model is made.",
}


def _describe(apart: _Apart, num_all: int, num_ranks: int) -> str:
    count, all_ = len(apart.names), "both ranks" if num_ranks == 2 else f"all {num_ranks} ranks"
    if len(apart.ranks) < num_ranks:
        all_ = f"{len(apart.ranks)} of {num_ranks} ranks"
    part = f"{count} of {num_all} parameters" if count < num_all else f"all {count} parameters"
    names = name_some(apart.names)
    match apart.shape:
        case "local":
            what = f"every rank used its own gradient alone, as measured on {all_}: nothing was averaged"
        case "partly_local":
            what = f"a part of what each rank used is its own alone ({apart.reason})"
        case "groups":
            what = f"the ranks averaged in groups that never meet ({apart.reason})"
        case "dropped":
            what = f"what some ranks computed is in nobody's gradient ({apart.reason})"
        case "unaccounted":
            what = "each rank used a gradient of its own, which no backward was seen to compute"
        case "late":
            what = f"the last backward's gradient was not used in the step it was computed for ({apart.reason})"
        case "thrown_away":
            what = "gradients were computed, and the optimizer used none of them: it changes nothing of these"
        case "began_apart":
            what = (
                "the ranks' weights differed before the step, and the same gradient was used on all of them: they "
            )
            what += "are replicas that never were equal"
        case _:
            what = f"the ranks used different gradients ({apart.reason or 'no common mixture explains them'})"
    return f"In optimizer step {apart.step}, of {part} ({names}): {what}."
