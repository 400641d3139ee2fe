"""Scores the watch on the corpus: which marked mistakes it names on the right line, which it misses, what it
makes up.

`python -m tests.corpus.score [--jobs N] [SCRIPT…]` runs every script under `ddpcall watch --json FILE` on its
ranks, compares the findings with the script's marks and prints a table and one line of figures. The exit code is
1 when anything is missed, false or late, or a run ends otherwise than it should. The ranks are forked from a
process that has torch, a second a script; with `--torchrun` they are started as users start them.

With `--lookup-first` a copy of each script is run that imports `tests.corpus.lookup_first` before anything else,
on the line of its first import. That module looks torch up as transformers and datasets do.
"""

import argparse
import ast
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.corpus.marks import Expected, Marks, read_marks
from tests.corpus.runner import TIMEOUT_S, Run, run_on_ranks
from tests.watch.launched import ForkedLauncher

CORPUS = Path(__file__).parent
STEPS_ALLOWED = 2  # a mistake must be reported within two optimizer steps


@dataclass(frozen=True)
class Found:
    """One record of the findings file, as far as the score needs it."""

    code: str
    line: int
    step: int | None = None

    def __str__(self) -> str:
        return f"{self.code}:{self.line}" if self.line else self.code


@dataclass(frozen=True)
class Score:
    """How one script's findings compare with its marks."""

    script: str
    exact: tuple[Expected, ...] = ()
    elsewhere: tuple[Expected, ...] = ()
    missed: tuple[Expected, ...] = ()
    false: tuple[Found, ...] = ()
    late: tuple[Found, ...] = ()
    trouble: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def good(self) -> bool:
        return not (self.missed or self.false or self.late or self.trouble)


def read_findings(path: Path, script: Path) -> list[Found]:
    """Reads a findings file; the line of a finding in another file is the one it was called from, or 0.

    Raises:
        ValueError: the file is not a findings file of schema 1.
    """
    content: dict[str, Any] = json.loads(path.read_text())
    if content.get("schema") != 1:
        raise ValueError(f"{path}: schema {content.get('schema')!r} instead of 1")
    return [Found(record["code"], _line_in(script, record), record.get("step")) for record in content["findings"]]


def _line_in(script: Path, record: dict[str, Any]) -> int:
    places = [record, record.get("called_from") or {}]
    lines = [place.get("line") for place in places if Path(place.get("file") or "").name == script.name]
    return int(lines[0] or 0) if lines else 0


def compare(script: str, marks: Marks, findings: Sequence[Found]) -> Score:
    """Matches findings with marks; pure. A finding on an accepted line answers every expectation of its code."""
    exact, elsewhere, missed = [], [], []
    for expected in marks.expected:
        same_code = [f for f in findings if f.code in expected.codes]
        if any(expected.line in (0, f.line) for f in same_code):
            exact.append(expected)
        elif any((f.code, f.line) in marks.accepted for f in same_code):
            elsewhere.append(expected)
        else:
            missed.append(expected)

    def is_expected(found: Found) -> bool:
        places = [e for e in marks.expected if found.code in e.codes and e.line in (0, found.line)]
        return bool(places) or (found.code, found.line) in marks.accepted

    last = marks.begins + STEPS_ALLOWED
    right = [f for f in findings if is_expected(f)]
    return Score(
        script,
        exact=tuple(exact),
        elsewhere=tuple(elsewhere),
        missed=tuple(missed),
        false=tuple(f for f in findings if not is_expected(f)),
        late=tuple(f for f in right if f.step is not None and f.step > last),
    )


def trouble_of(run: Run, marks: Marks, findings: Sequence[Found]) -> str:
    """What is wrong with the way a watched run ended; empty when nothing is."""
    if run.exit_code == -1:
        return "ran into the time limit"
    if run.exit_code < 0:
        return f"died of signal {-run.exit_code}"
    if marks.exit_code == 0 and run.exit_code == 1 and findings:
        return ""
    if run.exit_code != marks.exit_code:
        return f"exit code {run.exit_code} instead of {marks.exit_code}"
    return ""


def put_lookup_first(source: str) -> str:
    """Puts the look-up before a script's first import, on the same line: all line numbers stay."""
    first = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module != "__future__")
    )
    lines = source.splitlines(keepends=True)
    lines[first.lineno - 1] = "import tests.corpus.lookup_first; " + lines[first.lineno - 1]
    return "".join(lines)


def run_forked(launcher: ForkedLauncher, ranks: int, arguments: Sequence[str], directory: Path) -> Run:
    """Runs `python -m ddpcall ARGUMENTS` on forked ranks; the exit code is what torchrun makes of theirs."""
    request = {"arguments": list(arguments), "directory": str(directory), "ranks": ranks}
    answer = launcher.launch(request, TIMEOUT_S)
    output = "".join((directory / name).read_text() for name in ("out", "err") if (directory / name).exists())
    if answer is None:
        return Run(-1, output, TIMEOUT_S)
    failed = [code for code in answer["codes"] if code]
    code = 1 if any(code > 0 for code in failed) else min(failed, default=0)
    return Run(code, output, answer["seconds"])


def score_script(
    script: Path,
    log_directory: Path | None = None,
    lookup_first: bool = False,
    launcher: ForkedLauncher | None = None,
) -> Score:
    """Runs one script under the watch, on ranks that torchrun or a launcher of ours starts, and scores it."""
    marks = read_marks(script)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "findings.json"
        if lookup_first:
            copy = Path(directory) / script.name
            copy.write_text(put_lookup_first(script.read_text()))
            script = copy
        watch = ["watch", "--json", str(file), "--hang-after", str(marks.hang_after), str(script)]
        if launcher is None:
            run = run_on_ranks(marks.ranks, ["-m", "ddpcall", *watch])
        else:
            run = run_forked(launcher, marks.ranks, watch, Path(directory))
        if log_directory is not None:
            (log_directory / f"{script.stem}.log").write_text(run.output)
            if file.exists():
                (log_directory / f"{script.stem}.json").write_text(file.read_text())
        if not file.exists():
            tail = " ".join(run.output.split())[-300:]
            return Score(
                script.stem, missed=marks.expected, trouble=f"no findings file, exit {run.exit_code}: {tail}"
            )
        try:
            findings = read_findings(file, script)
        except (ValueError, KeyError) as error:
            return Score(script.stem, missed=marks.expected, trouble=f"unreadable findings: {error!r}")
    compared = compare(script.stem, marks, findings)
    trouble = trouble_of(run, marks, findings)
    return Score(**{**compared.__dict__, "trouble": trouble, "seconds": run.seconds})


def score_scripts(
    scripts: Sequence[Path],
    jobs: int,
    log_directory: Path | None = None,
    lookup_first: bool = False,
    forked: bool = True,
) -> list[Score]:
    """Scores scripts, `jobs` at a time; forked ranks come from one launcher for each job."""
    with ExitStack() as stack, ThreadPoolExecutor(jobs) as pool:
        launchers: SimpleQueue[ForkedLauncher | None] = SimpleQueue()
        for _ in range(jobs):
            launchers.put(stack.enter_context(ForkedLauncher()) if forked else None)

        def score(script: Path) -> Score:
            launcher = launchers.get()
            try:
                return score_script(script, log_directory, lookup_first, launcher)
            finally:
                launchers.put(launcher)

        return list(pool.map(score, scripts))


def corpus_scripts() -> list[Path]:
    return sorted((CORPUS / "wrong").glob("*.py")) + sorted((CORPUS / "right").glob("*.py"))


def summary(scores: Sequence[Score]) -> str:
    """The line of figures we are judged by."""
    exact = sum(len(s.exact) for s in scores)
    elsewhere = sum(len(s.elsewhere) for s in scores)
    missed = sum(len(s.missed) for s in scores)
    false = sum(len(s.false) for s in scores)
    late = sum(len(s.late) for s in scores)
    troubled = sum(bool(s.trouble) for s in scores)
    return (
        f"{len(scores)} scripts: found {exact + elsewhere} of {exact + elsewhere + missed} "
        f"({elsewhere} on another accepted line), missed {missed}, false {false}, late {late}, "
        f"troubled runs {troubled}"
    )


def table_of(scores: Sequence[Score]) -> Table:
    table = Table("script", "found", "other line", "missed", "false", "s", title="watch on the corpus")
    for score in scores:
        false = [*map(str, score.false), *(f"late {f} step {f.step}" for f in score.late)]
        cells = [" ".join(map(str, part)) for part in (score.exact, score.elsewhere, score.missed, false)]
        cells[3] = " ".join(filter(None, [cells[3], score.trouble]))
        table.add_row(score.script, *cells, f"{score.seconds:.1f}", style="" if score.good else "red")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.corpus.score", description="Score the watch on the corpus."
    )
    parser.add_argument("scripts", nargs="*", type=Path, help="default: the whole corpus")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="runs at a time")
    parser.add_argument("--logs", type=Path, help="keep each run's output and findings in this directory")
    parser.add_argument(
        "--lookup-first",
        action="store_true",
        help="import a module before all others that looks torch up as transformers does: find_spec, metadata; "
        "under torchrun, for forked ranks have torch already",
    )
    parser.add_argument(
        "--torchrun", action="store_true", help="start ranks with torchrun: ten times as long, and as users do"
    )
    options = parser.parse_args(arguments)
    if options.logs:
        options.logs.mkdir(parents=True, exist_ok=True)
    scripts = [path.resolve() for path in options.scripts] or corpus_scripts()
    scores = score_scripts(
        scripts,
        options.jobs,
        options.logs,
        options.lookup_first,
        forked=not (options.torchrun or options.lookup_first),
    )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table_of(scores))
    console.print(summary(scores), soft_wrap=True)
    return 0 if all(score.good for score in scores) else 1


if __name__ == "__main__":
    raise SystemExit(main())
