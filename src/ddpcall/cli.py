"""The `ddpcall` command. Argparse only: it must start without the lab's packages."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from ddpcall import __version__

LAB_MISSING = (
    "ddpcall: `ddpcall {command}` belongs to the lab, and {missing} is not installed. "
    "Write: pip install 'ddpcall[lab]'"
)
EXIT_WRONG_USE = 2


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exits with 0 (fine), 1 (findings or failed expectations) or 2 (wrong use)."""
    arguments = sys.argv[1:] if arguments is None else arguments
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
        "claims", add_help=False, help="put on trial what people say about forward: every claim an experiment"
    )
    parsed, rest = parser.parse_known_args(arguments[:1])
    command = {"train": train, "claims": claims}[parsed.command]
    command([*rest, *arguments[1:]])


def claims(arguments: list[str]) -> None:
    """Run, show or list claims; exits with 1 if an experiment could not be carried through."""
    options = _claims_parser().parse_args(arguments)
    try:
        from ddpcall.lab.claims.command import main as claims_main
    except ModuleNotFoundError as error:
        _exit_without_lab("claims", error)
    sys.exit(claims_main(options.ids, show=options.show, list_only=options.list, json_path=options.json))


def _claims_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ddpcall claims", description="Run the experiments behind claims about `forward`: what do they show?"
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help="claims to run, such as CF-3; all if none is given")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--show", action="store_true", help="print their code instead: scripts that run")
    instead.add_argument("--list", action="store_true", help="list them instead")
    instead.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts to a file too")
    return parser


def _exit_without_lab(command: str, error: ModuleNotFoundError) -> NoReturn:
    """Say which package is missing and how to get it; a missing part of ddpcall itself is raised again."""
    if (error.name or "").split(".")[0] == "ddpcall":
        raise error
    print(LAB_MISSING.format(command=command, missing=error.name), file=sys.stderr)
    sys.exit(EXIT_WRONG_USE)


def train(overrides: list[str]) -> None:
    """Hand the rest of the command line to the lab's Hydra entry point."""
    try:
        from ddpcall.lab.train import main as train_main
    except ModuleNotFoundError as error:
        _exit_without_lab("train", error)
    sys.argv = ["ddpcall train", *overrides]
    train_main()
