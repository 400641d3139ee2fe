"""The documentation that runs write: docs/labs from lessons and runs, the tables of docs/claims.md from claims.

python -m ddpcall.teach.pages labs docs/labs RUN_DIR …     one run for each lesson's experiment, in any order
python -m ddpcall.teach.pages claims docs/claims.md        runs every claim
"""

from __future__ import annotations

import datetime
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpcall.lab.run_directory import RunDirectory
from ddpcall.lab.truth_table import verdict_table
from ddpcall.teach.claims import find_claims
from ddpcall.teach.claims.run import run_claims
from ddpcall.teach.exercises import EXERCISES
from ddpcall.teach.lesson import LESSONS, Lesson
from ddpcall.teach.question import Result
from ddpcall.teach.run import describe_environment, train_command
from ddpcall.teach.show import list_remarks

RUN = """## Run

```console
$ ddpcall lab run {lesson.name}
```

The command asks for your predictions, runs the experiment on this machine's CPU or GPUs, and compares. The
experiment alone is `{command}`, a few lines in `conf/experiment/{lesson.experiment}.yaml`.

<details markdown="1">
<summary>What was measured here. Predict first.</summary>

<!-- table {lesson.experiment} -->
{table}

{caption}
<!-- end {lesson.experiment} -->

</details>
"""
SOURCES = (
    "Where it stands in the source (`ddpcall lab run {lesson.name}` prints the line, for the version installed):\n"
)
INDEX = """# The labs

Predict, run, explain: a lesson asks for your prediction, runs its experiment on two or more ranks of your machine,
CPU or GPU, and shows where measurement and prediction part, and why. How to teach with them:
[teaching.md](../teaching.md).

```console
$ pip install 'ddpcall[lab]'
$ ddpcall lab                       # this list
$ ddpcall lab run 1                 # by number or name
```

## Lessons, in order

{lessons}

## Exercises

A script as people write it, with one thing wrong. Mend it; `ddpcall lab grade` runs it on two ranks and says what
each criterion measured.

```console
$ ddpcall lab start module_bypass               # writes module_bypass.py
$ ddpcall lab grade module_bypass module_bypass.py
```

{exercises}
"""
_BLOCK = re.compile(r"<!-- claims (?P<keys>[^>]+?) -->\n.*?<!-- end claims -->", re.DOTALL)


def page_name(lesson: Lesson) -> str:
    """Return the file name of a lesson's page."""
    return f"{lesson.number:02d}_{lesson.name}.md"


def render_page(lesson: Lesson, summary: Mapping[str, Any]) -> str:
    """Return a lesson's page: its text, with what a run measured after the questions.

    Args:
        lesson: The lesson.
        summary: The summary.json of a run of its experiment.
    """
    environment = summary["environment"]
    caption = (
        f"Measured with torch {environment['torch']}, Python {environment['python']}, "
        f"{environment['backend']} on {environment['device']}, world size {environment['world_size']}."
    )
    command = " ".join(train_command(lesson))
    run = RUN.format(lesson=lesson, command=command, table=verdict_table(dict(summary)), caption=caption)
    sections = {title: f"## {title}\n\n{text}" for title, text in lesson.sections.items()}
    sections["Predict"] = re.sub(r"\s*<!-- .*? -->", "", sections["Predict"]) + f"\n{run}"
    sections["Why"] += f"\n{SOURCES.format(lesson=lesson)}\n{lesson.sections['Sources']}"
    del sections["Sources"]
    links = ["[All lessons](index.md)"]
    links += [f"next: [{one.title}]({page_name(one)})" for one in LESSONS[lesson.number : lesson.number + 1]]
    parts = [f"# {lesson.number}. {lesson.title}\n", f"{lesson.question}\n", *sections.values(), " · ".join(links)]
    return "\n".join(parts) + "\n"


def render_index() -> str:
    """Return the page that lists lessons and exercises."""
    lessons = [[str(one.number), f"[{one.title}]({page_name(one)}) `{one.name}`", one.question] for one in LESSONS]
    exercises = [[f"`{one.name}`", one.title, one.task] for one in EXERCISES]
    return INDEX.format(
        lessons=_table(["", "lesson", "question"], lessons),
        exercises=_table(["exercise", "what is wrong", "what to do"], exercises),
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def strip_captions(page: str) -> str:
    """Return a page without the lines that differ from machine to machine."""
    return "\n".join(line for line in page.splitlines() if not line.startswith("Measured with "))


def replace_blocks(text: str, results: Sequence[Result], measured: str) -> str:
    """Write every block of claims of a Markdown text anew.

    A block stands between `<!-- claims all -->`, or `<!-- claims CF-1 CF-3 -->`, and `<!-- end claims -->`.

    Args:
        text: Markdown with at least one block.
        results: One for every claim.
        measured: Goes under each table: when and with what it was measured.

    Raises:
        ValueError: The text has no block.
        KeyError: A block names a claim without a result.
    """
    if not _BLOCK.search(text):
        raise ValueError("no <!-- claims … --> … <!-- end claims --> in the text")
    by_key = {result.question.key: result for result in results}

    def write(block: re.Match[str]) -> str:
        keys = block["keys"].split()
        chosen = list(by_key.values()) if keys == ["all"] else [by_key[key] for key in keys]
        rows = [
            [one.question.key, one.question.text, f"**{one.measured}**", re.sub(r"([_*|])", r"\\\1", one.sentence)]
            for one in chosen
        ]
        lines = [_table(["id", "claim", "verdict", "evidence"], rows), "", measured]
        if keys == ["all"]:
            lines += ["", *(f"* {line}" for line in list_remarks(results))]
        return "\n".join([f"<!-- claims {block['keys']} -->", *lines, "<!-- end claims -->"])

    return _BLOCK.sub(write, text)


def read_verdicts(text: str) -> dict[str, str]:
    """Return the verdict by claim that the tables of a text state."""
    return dict(re.findall(r"^\| (\w\w-\d+) \| .*? \| \**(\w+)\** \| ", text, re.MULTILINE))


def main() -> None:
    """Write the pages of the lessons, or the tables of the claims."""
    kind, path, *runs = sys.argv[1], *map(Path, sys.argv[2:])
    if kind == "claims":
        now, today = describe_environment(), datetime.date.today().isoformat()
        measured = f"Measured on {today} with torch {now['torch']}, Python {now['python']}, gloo on cpu."
        path.write_text(replace_blocks(path.read_text(), run_claims(find_claims([])), measured))
        return
    by_name = {summary["experiment"]: summary for summary in (RunDirectory(run).read_summary() for run in runs)}
    path.mkdir(parents=True, exist_ok=True)
    (path / "index.md").write_text(render_index())
    for lesson in LESSONS:
        (path / page_name(lesson)).write_text(render_page(lesson, by_name[lesson.experiment]))


if __name__ == "__main__":
    main()
