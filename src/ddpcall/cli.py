"""The `ddpcall` command. Argparse only: it must start without the lab's packages."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from ddpcall import __version__
from ddpcall.torch_version import explain_torch

LAB_MISSING = (
    "ddpcall: `ddpcall {command}` belongs to the lab, and {missing} is not installed. "
    "Write: pip install 'ddpcall[lab]'"
)
EXIT_WRONG_USE = 2
COMMANDS = ("train", "claims", "lab", "watch", "record", "compare", "explain", "report")


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exits with 0 (fine), 1 (findings or failed expectations) or 2 (wrong use)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] in (["-sc"], ["--shell-completion"]):
        complete(arguments)
        return
    parser = argparse.ArgumentParser(
        prog="ddpcall", description="Show, measure and catch what model.forward(x) and model.module(x) lose."
    )
    parser.add_argument("--version", action="version", version=f"ddpcall {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "train",
        add_help=False,
        help="run a lab experiment; takes Hydra overrides, such as experiment=forward_bypass",
    )
    commands.add_parser(
        "claims", add_help=False, help="try what people say about forward: every claim is an experiment"
    )
    commands.add_parser(
        "lab", add_help=False, help="learn: lessons that predict, run and explain, and exercises that are graded"
    )
    commands.add_parser("watch", add_help=False, help="run a training script unchanged and say what it does wrong")
    commands.add_parser(
        "record", add_help=False, help="run a training script unchanged and keep what to compare it by"
    )
    commands.add_parser(
        "compare", add_help=False, help="compare two records: the first thing that differs, and why"
    )
    commands.add_parser("explain", add_help=False, help="print the page of a finding, such as DC101")
    commands.add_parser("report", add_help=False, help="make a page of what a run or a watch left behind")
    parsed, rest = parser.parse_known_args(arguments[:1])
    named = {
        "train": train,
        "claims": claims,
        "lab": lab,
        "watch": watch,
        "explain": explain,
        "report": report,
        "record": record,
        "compare": compare,
    }
    command = named[parsed.command]
    command([*rest, *arguments[1:]])


def complete(arguments: list[str]) -> None:
    """Complete a command line for the shell, as Hydra's script asks: `eval "$(ddpcall -sc install=bash)"`.

    The commands are known here. What stands behind `train` is Hydra's, which would take `train` for an override.
    """
    line = os.environ.get("COMP_LINE", "")
    if arguments[1:2] and arguments[1].startswith("query=") and line.split()[1:2] != ["train"]:
        print(*COMMANDS)
        return
    os.environ["COMP_LINE"] = line.replace(" train", "", 1)
    train(arguments, "ddpcall")


def watch(arguments: list[str]) -> None:
    """Run a script or module under the watch, on ranks that this command starts if it is to."""
    parser = _watch_parser()
    # Everything behind the script's name is the script's.
    options = parser.parse_args(arguments)
    if trouble := explain_torch():
        parser.error(trouble)
    from ddpcall.watch.options import Options, parse_codes
    from ddpcall.watch.program.script import load_module, load_script, run_program

    rest = options.script
    if options.module is not None:  # argparse ends it at a `--` among the module's own arguments
        options.module, rest = [*options.module, *rest], []
    if options.module is None and not rest:
        parser.error("say which script to watch: ddpcall watch [options] script.py [its arguments]")
    try:
        settings = Options(
            json=options.json,
            sarif=options.sarif and options.sarif.absolute(),  # the script may change the directory
            every=options.every,
            hang_after=options.hang_after,
            only=parse_codes(options.only),
            ignore=parse_codes(options.ignore),
            fail_on=options.fail_on,
            brief=True,
            children=not options.no_children,
            github=options.github,
        )
        if options.num_ranks is not None:
            from ddpcall.watch.program.launcher import run_ranks

            command = rest if options.module is None else ["-m", *options.module]
            return run_ranks(options.num_ranks, command, settings)
        program = load_script(rest[0]) if options.module is None else load_module(options.module[0])
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    own_arguments = rest[1:] if options.module is None else options.module[1:]
    try:
        run_program(program, own_arguments, settings)
    except OSError as error:  # the program's own do not come here
        parser.error(f"the findings cannot be written: {error}")
    except ValueError as error:
        parser.error(str(error))


class _ParserOfManyRanks(argparse.ArgumentParser):
    """What was written wrongly is said by one rank, for all."""

    def error(self, message: str) -> NoReturn:
        from ddpcall.watch.launch import let_rank_0_speak

        let_rank_0_speak()
        super().error(message)


def _watch_parser() -> argparse.ArgumentParser:
    parser = _ParserOfManyRanks(
        prog="ddpcall watch",
        usage="%(prog)s [options] (script.py | -m module) [arguments of the script]\n"
        "       %(prog)s -n N [options] [-- torchrun's options] (script.py | -m module) [arguments of the script]",
        description="Run a training script unchanged and say which line bypassed what. Under another launcher: "
        "torchrun --nproc-per-node N -m ddpcall watch script.py …",
    )
    parser.add_argument(
        "-n",
        dest="num_ranks",
        metavar="N",
        help="start N ranks with torch's launcher and answer when all have ended; its options follow after --",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings here, as they happen")
    parser.add_argument("--sarif", type=Path, metavar="FILE", help="write them as SARIF 2.1.0, at the end")
    parser.add_argument(
        "--no-children", action="store_true", help="do not watch ranks that the script starts itself"
    )
    parser.add_argument(
        "--github", action="store_true", help="annotate the lines and write the job's summary in GitHub Actions"
    )
    parser.add_argument(
        "--every", type=int, default=10, metavar="K", help="compare ranks every K steps (10; 0: never)"
    )
    parser.add_argument(
        "--hang-after",
        type=float,
        default=60.0,
        metavar="S",
        help="say where all ranks are once one has waited so many seconds in a collective (60; 0: never)",
    )
    parser.add_argument("--only", default="", metavar="CODES", help="report these alone, such as DC101,DC104")
    parser.add_argument("--ignore", default="", metavar="CODES", help="do not report these")
    parser.add_argument("--fail-on", choices=("error", "warning", "never"), default="error")
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="run a module instead of a script")
    parser.add_argument("script", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def record(arguments: list[str]) -> None:
    """Run a script, a module or a launcher's command under the recorder."""
    parser = _record_parser()
    options = parser.parse_args(arguments)
    program = options.script if options.module is None else ["-m", *options.module]
    if trouble := explain_torch():
        parser.error(trouble)
    from ddpcall.compare.program import parse_steps, prepare, record_command, record_program

    if not [part for part in program if part != "--"]:
        parser.error("say what to record: ddpcall record --out DIRECTORY script.py [its arguments]")
    try:
        wants, num_steps = parse_steps(options.steps)
        prepare(options.out)
        if program[0] == "--":
            own = ["--out", str(options.out.absolute()), "--max-mb", str(options.max_mb)]
            own += ["--steps", options.steps] if options.steps else []
            sys.exit(record_command(program[1:], own, options.out))
        if program[0] != "-m" and not Path(program[0]).is_file():
            raise ValueError(f"there is no script {program[0]}")
    except ValueError as error:
        parser.error(str(error))
    sys.exit(record_program(program, options.out, wants, num_steps, options.max_mb))


def _record_parser() -> argparse.ArgumentParser:
    parser = _ParserOfManyRanks(
        prog="ddpcall record",
        usage="%(prog)s --out DIR [options] (script.py | -m module) [arguments of the script]\n"
        "       %(prog)s --out DIR [options] -- torchrun … script.py …",
        description="Run a training script unchanged and keep sketches of chosen steps, for ddpcall compare.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a new directory, or an older record"
    )
    parser.add_argument("--steps", default="", metavar="LIST", help="such as 0-4,8,100 (0 to 4 and powers of two)")
    parser.add_argument("--max-mb", type=float, default=100.0, metavar="MB", help="what a rank may write (100)")
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="run a module instead of a script")
    parser.add_argument("script", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def compare(arguments: list[str]) -> None:
    """Compare two records; exits with 0 (the same), 1 (something differs) or 2 (not comparable)."""
    parser = argparse.ArgumentParser(
        prog="ddpcall compare", description="Say what differs first between two runs that ddpcall record kept."
    )
    parser.add_argument("a", type=Path, metavar="A", help="the record that is taken for right")
    parser.add_argument("b", type=Path, metavar="B", help="the record that is asked about")
    parser.add_argument(
        "--noise", type=Path, metavar="C", help="a second record of A: what differs there is noise"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison to a file too")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page too")
    options = parser.parse_args(arguments)
    if trouble := explain_torch():
        parser.error(trouble)
    from ddpcall.compare.command import main as compare_main

    def render_page(*compared: Any) -> str:
        from ddpcall.lab.report.compared import render_page

        return render_page(*compared)

    page = (options.html, render_page) if options.html else None
    try:
        sys.exit(compare_main(options.a, options.b, options.noise, options.json, page))
    except ModuleNotFoundError as error:
        _exit_without_lab("compare --html", error)


def explain(arguments: list[str]) -> None:
    """Print a finding's page, or write them all."""
    from ddpcall.findings import find_rule, render_page, render_pages

    parser = argparse.ArgumentParser(prog="ddpcall explain", description="Print the page of a finding.")
    parser.add_argument("code", nargs="?", help="DC101, or gradients-not-synchronized; without it, the list")
    parser.add_argument("--write", type=Path, metavar="DIRECTORY", help="write all pages there")
    options = parser.parse_args(arguments)
    if options.write is not None:
        options.write.mkdir(parents=True, exist_ok=True)
        for name, page in render_pages().items():
            (options.write / name).write_text(page)
        return
    if options.code is None:
        _list_findings()
        return
    try:
        page = render_page(find_rule(options.code))
    except ValueError as error:
        parser.error(str(error))
    if not sys.stdout.isatty():
        print(page)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(page))


def _list_findings() -> None:
    """Print the findings, one a row, between words where the terminal is narrow."""
    from rich.console import Console
    from rich.table import Table

    from ddpcall.findings import FAMILIES

    console = Console()
    for heading, rules in FAMILIES.items():
        console.print(f"[bold]{heading}[/]")
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for rule in rules:
            table.add_row(
                rule.code, f"[dim]{rule.severity}[/]", f"[bold]{rule.name}[/]\n{rule.title.replace('`', '')}"
            )
        console.print(table, width=min(console.width, 100))
        console.print()
    console.print("ddpcall explain DC101 prints a page; so does its name.", style="dim", highlight=False)


def claims(arguments: list[str]) -> None:
    """Run, show or list claims; exits with 1 if an experiment could not be carried through."""
    _teach("claims", arguments)


def lab(arguments: list[str]) -> None:
    """List or run lessons, write or grade exercises."""
    _teach("lab", arguments)


def _teach(command: str, arguments: list[str]) -> None:
    _exit_without_torch()
    try:
        from ddpcall.teach import command as teach

        sys.exit(teach.claims(arguments) if command == "claims" else teach.main(arguments))
    except ModuleNotFoundError as error:
        _exit_without_lab(command, error)


def report(arguments: list[str]) -> None:
    """Make a page, Markdown, JSON or a trace of runs and findings; exits with 2 if nothing can be shown."""
    options = _report_parser().parse_args(arguments)
    try:
        from ddpcall.lab.report.command import main as report_main

        sys.exit(report_main(options.paths, out=options.out, open_it=options.open, form=options.format))
    except ModuleNotFoundError as error:
        _exit_without_lab("report", error)


def _report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ddpcall report",
        description="Make a page of what a run left behind; several runs side by side, what differs first.",
    )
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="PATH",
        help="run directory, a sweep's, or a file that `ddpcall watch --json` wrote (the latest run below runs/)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write (RUN_DIR/report.html; - for standard output)"
    )
    parser.add_argument("--open", action="store_true", help="show the page in the browser")
    parser.add_argument(
        "--format",
        choices=("html", "md", "json", "perfetto"),
        default="html",
        help="a page; Markdown or JSON, to standard output; or a trace of the measured step (RUN_DIR/trace.json)",
    )
    return parser


def _exit_without_torch() -> None:
    """Say, on one rank for all, that torch is missing or too old."""
    if trouble := explain_torch():
        from ddpcall.watch.launch import let_rank_0_speak

        let_rank_0_speak()
        print(f"ddpcall: {trouble}", file=sys.stderr)
        sys.exit(EXIT_WRONG_USE)


def _exit_without_lab(command: str, error: ModuleNotFoundError) -> NoReturn:
    """Say which package is missing and how to get it; a missing part of ddpcall itself is raised again."""
    if (error.name or "").split(".")[0] == "ddpcall":
        raise error
    print(LAB_MISSING.format(command=command, missing=error.name), file=sys.stderr)
    sys.exit(EXIT_WRONG_USE)


def train(overrides: list[str], program: str = "ddpcall train") -> None:
    """Hand the rest of the command line to the lab's Hydra entry point."""
    _exit_without_torch()
    try:
        from ddpcall.lab.train import main as train_main
    except ModuleNotFoundError as error:
        _exit_without_lab("train", error)
    sys.argv = [program, *overrides]
    train_main()
