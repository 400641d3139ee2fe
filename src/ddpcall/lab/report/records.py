"""What the loader hands on: the files of a run, typed, nothing interpreted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ddpcall.evidence import Cell, Consequence, Environment, Evidence, Skipped, TimelineEvent
from ddpcall.findings import Finding
from ddpcall.watch.output.watched import Watched


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial as summary.json has it, and its evidence where evidence.jsonl has that too.

    Attributes:
        cell: Where in the grid.
        verdicts: Name to word.
        expected: The verdicts the experiment expects, likewise.
        unmet: Verdicts that are not as expected: name to `{"expected", "measured"}`.
        error: The first line of a crash; None where nothing crashed.
        cause: Its true cause, where known.
        consequence: What the trained models are worth.
        evidence: Everything measured; None where it could not be read.
    """

    cell: Cell
    verdicts: dict[str, str]
    expected: dict[str, str] = field(default_factory=dict)
    unmet: dict[str, dict[str, str]] = field(default_factory=dict)
    error: str | None = None
    cause: str | None = None
    consequence: Consequence | None = None
    evidence: Evidence | None = None


@dataclass(frozen=True, kw_only=True)
class ComparisonRecord:
    """One comparison with one process, as summary.json has it.

    Attributes:
        case: Its name.
        wrapper: What wrapped the model.
        about: What the step does.
        expected: The cause that was expected.
        found: The cause that was found.
        message: What the comparison says.
    """

    case: str
    wrapper: str
    found: str
    expected: str = ""
    about: str = ""
    message: str = ""

    @property
    def label(self) -> str:
        """Name it."""
        return f"{self.case} × {self.wrapper}"

    @property
    def is_met(self) -> bool:
        """Whether it is as expected."""
        return self.expected in ("", self.found)


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

    @property
    def cell(self) -> Cell:
        """Where in the grid it was measured."""
        return Cell(
            wrapper=self.wrapper,
            path=self.path,
            window=self.window,
            hooks=self.hooks,
            mode=self.mode,
            model=self.model,
        )


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


@dataclass(frozen=True)
class SourceLine:
    """One line of a source file.

    Attributes:
        number: From 1.
        text: Without its line break.
        marked: Whether the finding is about it.
    """

    number: int
    text: str
    marked: bool


@dataclass(frozen=True)
class Excerpt:
    """The lines around a finding.

    Attributes:
        lines: The lines; empty where the file cannot be read.
        note: What to know about them: the file is missing, or younger than the findings.
    """

    lines: tuple[SourceLine, ...] = ()
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class WatchRecord:
    """A watched run: the findings that `ddpcall watch --json` wrote, with the source lines as they are now.

    Attributes:
        path: The JSON file.
        findings: Each with its excerpt.
        problems: What could not be read, a sentence each.
        watched: What the watch saw; None in a file of an earlier version.
    """

    path: Path
    findings: tuple[tuple[Finding, Excerpt], ...] = ()
    problems: tuple[str, ...] = ()
    watched: Watched | None = None
