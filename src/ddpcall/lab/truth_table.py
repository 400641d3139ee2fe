"""Verdicts as Markdown: the README's tables are written by this from a run, and a test compares them with another.

python -m ddpcall.lab.truth_table README.md RUN_DIR …
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ddpcall.lab.run_directory import RunDirectory
from ddpcall.paths import SPELLING, CallPath

COLUMNS = {
    "gradients": "gradients",
    "hooks_wrapped": "hooks on wrapped",
    "hooks_inner": "hooks on inner",
    "hooks_submodules": "hooks below",
    "compiled": "code",
    "modes": "mode",
    "dropout": "dropout masks",
    "statistics": "running statistics",
    "evaluation_inner": "eval of inner",
    "evaluation_wrapped": "eval of wrapped",
    "precision": "precision",
}
_PLAIN = {"synced", "fired", "compiled", "none", "train", "same", "float32", "different", "sharded"}
_UNINTERESTING = {"precision": "float32", "modes": "train"}


def verdict_table(summary: dict[str, Any]) -> str:
    """Return the verdicts of a run as a Markdown table, without anything that differs from run to run.

    Args:
        summary: The content of a summary.json.
    """
    trials = summary["trials"]
    axes = ["wrapper", "path", *(axis for axis in ("window", "hooks", "mode", "model") if _varies(trials, axis))]
    verdicts = [name for name in COLUMNS if _is_interesting(trials, name)]
    rows = [
        [_axis_value(trial, axis) for axis in axes] + [_word(trial["verdicts"][v]) for v in verdicts]
        for trial in trials
    ]
    header = [*axes, *(COLUMNS[name] for name in verdicts)]
    return "\n".join(_line(cells) for cells in [header, ["---"] * len(header), *rows])


def _is_interesting(trials: list[dict[str, Any]], name: str) -> bool:
    return bool({trial["verdicts"][name] for trial in trials} - {"none", _UNINTERESTING.get(name, "none")})


def _varies(trials: list[dict[str, Any]], axis: str) -> bool:
    return len({trial[axis] for trial in trials}) > 1


def _axis_value(trial: dict[str, Any], axis: str) -> str:
    if axis == "path":
        return f"{trial['path']}: `{SPELLING[CallPath(trial['path'])]}`"
    return trial[axis].rsplit(".", 1)[-1] if axis == "model" else trial[axis]


def _word(word: str) -> str:
    return word if word in _PLAIN else f"**{word}**"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def replace_table(text: str, summary: dict[str, Any]) -> str:
    """Put a run's table between its experiment's markers.

    Raises:
        ValueError: The text has no such markers.
    """
    name = summary["experiment"]
    begin, end = f"<!-- table {name} -->\n", f"<!-- end {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"no markers {begin.strip()} … {end} in the text")
    head, rest = text.split(begin, 1)
    _, tail = rest.split(end, 1)
    environment = summary["environment"]
    caption = (
        f"\n\nMeasured with torch {environment['torch']}, Python {environment['python']}, "
        f"{environment['backend']} on {environment['device']}, world size {environment['world_size']}.\n"
    )
    return head + begin + verdict_table(summary) + caption + end + tail


def replace_output(text: str, name: str, output: str) -> str:
    """Put what a run printed between the markers for it, where the text has any."""
    begin, end = f"<!-- output {name} -->\n", "<!-- end output -->"
    if begin not in text:
        return text
    head, rest = text.split(begin, 1)
    _, tail = rest.split(end, 1)
    lines = "\n".join(line.rstrip() for line in output.strip().splitlines())
    return f"{head}{begin}```text\n{lines}\n```\n{end}{tail}"


def main() -> None:
    """Rewrite the tables of a Markdown file from run directories."""
    document, *runs = sys.argv[1:]
    text = Path(document).read_text()
    for run in runs:
        summary = RunDirectory(Path(run)).read_summary()
        text = replace_table(text, summary)
        text = replace_output(text, summary["experiment"], Path(run, "table.txt").read_text())
    Path(document).write_text(text)


if __name__ == "__main__":
    main()
