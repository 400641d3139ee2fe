"""`ddpcall report`: read the paths, build the view, write it in the format asked for."""

from __future__ import annotations

import dataclasses
import sys
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path

from ddpcall.files import replace_text
from ddpcall.lab.console import say, shorten_path
from ddpcall.lab.errors import EXIT_OK, EXIT_WRONG_USE
from ddpcall.lab.records import RunRecord
from ddpcall.lab.report.load import load
from ddpcall.lab.report.load_watch import WatchRecord
from ddpcall.lab.report.markdown import render_markdown
from ddpcall.lab.report.view import ReportView, build_view
from ddpcall.lab.runs import RUNS, list_jobs, list_runs, write_index
from ddpcall.lab.typed import NothingToShow

REPORT = "report.html"
TRACE = "trace.json"
STDOUT = Path("-")


def main(paths: Sequence[Path], *, out: Path | None, open_it: bool, form: str) -> int:
    """Make a report of run directories and findings.

    Args:
        paths: Run directories, directories of sweeps, or files that `ddpcall watch --json` wrote. None: the
            latest run below `runs`.
        out: Where to write; `-` is standard output. By default HTML goes beside the run (of several: into the
            working directory), a trace likewise, Markdown and JSON to standard output.
        open_it: Show the file in the browser.
        form: html, md, json or perfetto.

    Returns:
        0, or 2 when there is nothing to show or no place to write.
    """
    paths = paths or list_runs(Path(RUNS))[:1]
    if not paths:
        _complain(
            f"there is no run below {Path(RUNS).absolute()}. Write the directory that a run named: ddpcall report "
            "RUN_DIR"
        )
        return EXIT_WRONG_USE
    jobs = [list_jobs(path) for path in paths]
    if len(paths) == 1 and jobs[0] and out is None and form == "html":
        out = paths[0] / REPORT
    records, problems = _load_all(
        [run for path, of_sweep in zip(paths, jobs, strict=True) for run in of_sweep or [path]]
    )
    for problem in problems:
        _complain(problem)
    if not records:
        return EXIT_WRONG_USE
    for record in records:
        for problem in record.problems:
            _complain(f"{record.path}: {problem}")
    if form == "perfetto":
        return _write_trace(records, out)
    text = _RENDER[form](build_view(records, problems))
    return _write(text, out or _default_place(records, form), open_it)


def _load_all(paths: Sequence[Path]) -> tuple[list[RunRecord | WatchRecord], list[str]]:
    records, problems = [], []
    for path in paths:
        try:
            records.append(load(path))
        except (NothingToShow, OSError) as error:
            problems.append(str(error))
    return records, problems


def _render_html(view: ReportView) -> str:
    from ddpcall.lab.report.page import render_page

    return render_page(view)


def _render_json(view: ReportView) -> str:
    from ddpcall.lab.report.page import to_json

    return to_json(view)


_RENDER: dict[str, Callable[[ReportView], str]] = {
    "html": _render_html,
    "md": render_markdown,
    "json": _render_json,
}


def _default_place(records: Sequence[RunRecord | WatchRecord], form: str) -> Path:
    if form in ("md", "json"):
        return STDOUT
    if len(records) > 1:
        return Path(REPORT)
    path = records[0].path
    return path / REPORT if path.is_dir() else path.with_suffix(".html")


def _write(text: str, place: Path, open_it: bool) -> int:
    if place == STDOUT:
        sys.stdout.write(text)
        return EXIT_OK
    try:
        _replace(place, text)
    except OSError as error:
        return _refuse_place(place, error)
    print(f"report: {place}")
    if open_it:
        webbrowser.open(place.resolve().as_uri())
    return EXIT_OK


def _replace(place: Path, text: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    replace_text(place, text)


def _refuse_place(place: Path, error: OSError) -> int:
    _complain(f"{place} cannot be written: {error.strerror}. Write another place: --out FILE")
    return EXIT_WRONG_USE


def _write_trace(records: Sequence[RunRecord | WatchRecord], out: Path | None) -> int:
    from ddpcall.lab.perfetto import write_trace

    runs = [record for record in records if isinstance(record, RunRecord) and record.timeline]
    if len(runs) != 1:
        _complain(
            f"{len(runs)} of the paths hold a timeline.jsonl that can be read, and a trace is made of one. Write "
            "one run directory of an experiment that ran with probes.timeline=true"
        )
        return EXIT_WRONG_USE
    place = out or runs[0].path / TRACE
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_trace([dataclasses.asdict(record) for record in runs[0].timeline], place)
    except OSError as error:
        return _refuse_place(place, error)
    print(f"trace: {place} (open it at ui.perfetto.dev or chrome://tracing)")
    return EXIT_OK


def leave_report(directory: Path, wanted: bool) -> None:
    """Write a run's page into its directory, at its end. A page that cannot be made costs one line and no more."""
    if not wanted:
        return
    place = directory / REPORT
    try:
        _replace(place, _render_html(build_view([load(directory)])))
        write_index(directory)
    except Exception as error:  # the run's own result stands, whatever became of its page
        _complain(f"no {REPORT}: {type(error).__name__}: {error}")
    else:
        say(f"report: {shorten_path(place)}")


def _complain(message: str) -> None:
    print(f"ddpcall: {message}", file=sys.stderr, flush=True)
