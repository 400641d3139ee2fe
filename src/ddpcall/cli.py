"""The `ddpcall` command. Argparse only: it must start without the lab's packages."""

from __future__ import annotations

import argparse
import sys

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
    parsed, rest = parser.parse_known_args(arguments[:1])
    if parsed.command == "train":
        train([*rest, *arguments[1:]])


def train(overrides: list[str]) -> None:
    """Hand the rest of the command line to the lab's Hydra entry point."""
    try:
        from ddpcall.lab.train import main as train_main
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "ddpcall":
            raise
        print(LAB_MISSING.format(command="train", missing=error.name), file=sys.stderr)
        sys.exit(EXIT_WRONG_USE)
    sys.argv = ["ddpcall train", *overrides]
    train_main()
