"""The one shape of a trial, from its measurement to every rendering; and of a run, as its files have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ddpcall.evidence import (
    AXES,
    Cell,
    Consequence,
    Environment,
    Evidence,
    Skipped,
    StepTimeline,
    TimelineEvent,
)
from ddpcall.lab.typed import read_record
from ddpcall.verdicts import explain_crash, judge, judge_skipped, list_untimed


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial: what was measured, what it amounts to, and what was expected.

    Attributes:
        cell: Where in the grid.
        verdicts: Name to word.
        expected: The verdicts the experiment expects, likewise.
        error: The first line of a crash; None where nothing crashed.
        cause: Its true cause, where known.
        flight_recorder_agrees: Whether it saw what the reducer probe did; None where it cannot tell.
        consequence: How good the trained models are.
        evidence: Everything measured; None where it could not be read.
    """

    cell: Cell
    verdicts: dict[str, str]
    expected: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    cause: str | None = None
    flight_recorder_agrees: bool | None = None
    consequence: Consequence | None = None
    evidence: Evidence | None = None

    @staticmethod
    def of(
        evidence: Evidence, expected: Mapping[str, str], verdicts: Mapping[str, str] | None = None
    ) -> TrialRecord:
        """Return the record of a trial.

        Args:
            evidence: What was measured.
            expected: The verdicts the experiment expects.
            verdicts: What an earlier process judged; None: judge.
        """
        return TrialRecord(
            cell=evidence.cell,
            verdicts=dict(verdicts or judge(evidence)),
            expected=dict(expected),
            error=_first_line(evidence),
            cause=explain_crash(evidence),
            flight_recorder_agrees=evidence.collectives.agrees if evidence.collectives else None,
            consequence=evidence.consequence,
            evidence=evidence,
        )

    def word(self, name: str) -> str:
        """Return a verdict; `none` where an earlier version did not judge it."""
        return self.verdicts.get(name, "none")

    @property
    def unmet(self) -> dict[str, dict[str, str]]:
        """The verdicts that are not as expected, and a crash that nobody expected: `{"expected", "measured"}`."""
        expected = self.expected
        if self.word("gradients") == "crashed":
            expected = {"gradients": "no crash", **expected}
        return {
            name: {"expected": word, "measured": self.word(name)}
            for name, word in expected.items()
            if self.word(name) != word
        }

    @property
    def expectation_met(self) -> bool | None:
        """Whether it is as expected; None where nothing was expected and nothing crashed."""
        return not self.unmet if self.expected or self.unmet else None

    def summarize(self) -> dict[str, Any]:
        """Return the trial as it stands in summary.json."""
        shown = {field.name: getattr(self, field.name) for field in fields(self)}
        del shown["cell"], shown["evidence"]
        consequence = asdict(self.consequence) if self.consequence else None
        told = {"unmet": self.unmet, "expectation_met": self.expectation_met, "consequence": consequence}
        return asdict(self.cell) | shown | told

    def to_json(self) -> dict[str, Any]:
        """Return the trial as a line of evidence.jsonl: all of its evidence, and the verdicts.

        Raises:
            ValueError: The evidence could not be read.
        """
        if self.evidence is None:
            raise ValueError(f"{self.cell.label()} has no evidence")
        judged = {"verdicts": self.verdicts, "expected": self.expected, "expectation_met": self.expectation_met}
        return asdict(self.evidence) | judged


def _first_line(evidence: Evidence) -> str | None:
    if not evidence.failures:
        return None
    first = evidence.failures[0]
    message = first.message.strip().splitlines() or [""]
    return f"rank {first.rank}, step {first.step}: {first.kind}: {message[0]}"


def read_trial(item: Any, place: str = "a trial") -> TrialRecord:
    """Read what `summarize` returned, also of an earlier version.

    Raises:
        Misfit: It is no trial.
    """
    cell = read_record(Cell, item, place)
    agrees = item.get("flight_recorder_agrees", item.get("witness_agrees"))  # the key before 0.2.0
    return read_record(TrialRecord, {**item, "cell": asdict(cell), "flight_recorder_agrees": agrees}, place)


def restore_trial(line: dict[str, Any]) -> TrialRecord:
    """Read what `to_json` returned; verdicts that a line lost are judged anew.

    Raises:
        Misfit: It is no trial.
    """
    told = {name: line[name] for name in ("expected", "verdicts") if isinstance(line.get(name), dict)}
    words = {name: {str(key): str(word) for key, word in words.items()} for name, words in told.items()}
    evidence = read_record(Evidence, line, "a record")
    return TrialRecord.of(evidence, words.get("expected", {}), words.get("verdicts"))


@dataclass(frozen=True, kw_only=True)
class ComparisonRecord:
    """One comparison with one process.

    Attributes:
        case: Its name.
        wrapper: What wrapped the model.
        about: What the step does.
        expected: The cause that was expected; empty where none was.
        found: The cause that was found; `crashed` where the step raised.
        message: What the comparison says, or what was raised.
        comparison: Its numbers; None where the step raised.
    """

    case: str
    wrapper: str
    found: str
    expected: str = ""
    about: str = ""
    message: str = ""
    comparison: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        """Name it."""
        return f"{self.case} × {self.wrapper}"

    @property
    def is_met(self) -> bool:
        """Whether it is as expected."""
        return self.expected in ("", self.found)

    def summarize(self) -> dict[str, Any]:
        """Return it as it stands in summary.json."""
        return asdict(self) | {"expectation_met": self.is_met}


@dataclass(frozen=True)
class RankSteps:
    """What steps.jsonl says of one rank in one trial.

    Attributes:
        steps: Numbers of the steps (from 0), rising.
        columns: Name of what was measured to one value a step, None where there is none.
    """

    steps: tuple[int, ...]
    columns: Mapping[str, tuple[float | None, ...]]


@dataclass(frozen=True, kw_only=True)
class TimelineRecord:
    """One measured step of one trial on one rank: a line of timeline.jsonl.

    Attributes:
        rank: Whose.
        step: The step's number (from 0).
        events: In time order; a nested one lies inside its parent.
        skipped: What it went past.
        collectives: Collectives other than bucket reductions.
        raised: Whether the step ended in an exception.
        untimed: Hooks that fired without an event of their own: those of compiled models.
    """

    wrapper: str
    path: str
    rank: int
    step: int
    events: tuple[TimelineEvent, ...]
    window: str = "plain"
    hooks: str = "early"
    mode: str = "train"
    model: str = ""
    skipped: tuple[Skipped, ...] = ()
    collectives: tuple[TimelineEvent, ...] = ()
    raised: bool = False
    untimed: tuple[dict[str, Any], ...] = ()

    @staticmethod
    def of(cell: Cell, rank: int, timeline: StepTimeline) -> TimelineRecord:
        """Return the record of a measured step."""
        untimed = [
            {"kind": hooks.event_kind, "name": hooks.name, "owner": hooks.owner, "fired": hooks.fired}
            for hooks in list_untimed(timeline)
        ]
        return TimelineRecord(
            **asdict(cell),
            rank=rank,
            step=timeline.step,
            events=tuple(event for event in timeline.events if event.kind != "collective"),
            collectives=tuple(event for event in timeline.events if event.kind == "collective"),
            skipped=judge_skipped(timeline),
            raised=timeline.raised,
            untimed=tuple(untimed),
        )

    @property
    def cell(self) -> Cell:
        """Where in the grid it was measured."""
        return Cell(**{axis: getattr(self, axis) for axis in AXES})


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A lab run: what could be read of its directory.

    Attributes:
        path: The directory.
        experiment: Its name; empty where unknown.
        question: What it asks.
        outcome: How it ended, as in summary.json; `unknown` without one.
        reason: Why, where it did not end well.
        first_failing_rank: Who failed first.
        stacks: Where each rank was when the run was cut, by rank.
        environment: Where it was measured.
        num_trials: How many trials were asked for.
        left_out: Pairs that make no sense, with the reason.
        num_comparisons: How many comparisons with one process were asked for.
        trials: In the order they ran.
        comparisons: With one process, likewise.
        steps: By cell and rank.
        timeline: All lines of timeline.jsonl.
        overrides: The command line's Hydra overrides; None where unknown.
        search: What the command line said of where configuration lies: `--config-dir DIR`, `hydra.searchpath=…`.
        num_steps: Optimizer steps a trial.
        seed: The seed.
        problems: What could not be read, a sentence each.
    """

    path: Path
    experiment: str = ""
    question: str = ""
    outcome: str = "unknown"
    reason: str | None = None
    first_failing_rank: int | None = None
    stacks: dict[str, str] = field(default_factory=dict)
    environment: Environment | None = None
    num_trials: int | None = None
    left_out: tuple[str, ...] = ()
    num_comparisons: int | None = None
    trials: tuple[TrialRecord, ...] = ()
    comparisons: tuple[ComparisonRecord, ...] = ()
    steps: Mapping[Cell, Mapping[int, RankSteps]] = field(default_factory=dict)
    timeline: tuple[TimelineRecord, ...] = ()
    overrides: tuple[str, ...] | None = None
    search: tuple[str, ...] = ()
    num_steps: int | None = None
    seed: int | None = None
    problems: tuple[str, ...] = ()
