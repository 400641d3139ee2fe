"""`ddpcall claims`: run, list or show claims."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.syntax import Syntax

from ddpcall.lab.console import open_console, warn
from ddpcall.lab.errors import EXIT_FAILED, EXIT_OK, EXIT_WRONG_USE, WrongUse
from ddpcall.ranks import RankPool
from ddpcall.teach.claims.catalogue import find_claims
from ddpcall.teach.claims.claim import Claim, Result
from ddpcall.teach.claims.report import print_list, print_results, write_json
from ddpcall.teach.claims.run import run_claims
from ddpcall.teach.claims.show import show_code


def main(ids: Sequence[str], *, show: bool, list_only: bool, json_path: Path | None) -> int:
    """Do what the command line asks for.

    Args:
        ids: Which claims; all for none.
        show: Print their code instead of running them.
        list_only: Print their names instead of running them.
        json_path: Where to write the results too.

    Returns:
        The exit code: 0, 1 if an experiment could not be carried through, 2 for an unknown id or an unusable path.
    """
    try:
        claims = find_claims(ids)
        if json_path is not None:
            _check_writable(json_path)
    except WrongUse as error:
        warn(str(error))
        return EXIT_WRONG_USE
    console = open_console()
    if list_only:
        print_list(console, claims)
    elif show:
        _print_code(console, claims)
    else:
        results = run_all(claims)
        print_results(console, results)
        if json_path is not None:
            write_json(json_path, results)
        return EXIT_FAILED if any(result.failed for result in results) else EXIT_OK
    return EXIT_OK


def _check_writable(path: Path) -> None:
    """Refuse a path before half a minute of work is lost on it."""
    if path.is_dir():
        raise WrongUse(f"--json {path} is a directory; write the name of a file, such as {path / 'claims.json'}")
    if not path.absolute().parent.is_dir():
        raise WrongUse(f"--json {path}: there is no directory {path.absolute().parent}")


def run_all(claims: Sequence[Claim]) -> list[Result]:
    """Run claims on a pool of their own, with a line on a terminal that says which one is at work."""
    terminal = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    results = []
    with (
        RankPool() as pool,
        Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress,
    ):
        task = progress.add_task("starting two ranks")
        for result in run_claims(claims, pool):
            results.append(result)
            done = f"{len(results)} of {len(claims)}"
            progress.update(task, description=f"{done}: {result.claim.id} {result.ruling.verdict}")
    return results


def _print_code(console: Console, claims: Sequence[Claim]) -> None:
    code = "\n\n".join(show_code(claim) for claim in claims)
    if console.is_terminal:
        console.print(Syntax(code, "python", word_wrap=True, background_color="default"))
    else:
        console.out(code, highlight=False, end="")  # as it is, so that it can be piped into a file and run
