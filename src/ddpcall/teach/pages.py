"""The lessons as pages: docs/labs is written by this from the catalogue and from runs, and a test compares it.

python -m ddpcall.teach.pages docs/labs RUN_DIR …     one run directory for each lesson's experiment, in any order
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpcall.lab.run_directory import RunDirectory
from ddpcall.lab.truth_table import verdict_table
from ddpcall.teach.exercises import EXERCISES
from ddpcall.teach.lesson import Lesson, Question
from ddpcall.teach.lessons import LESSONS, number_of
from ddpcall.teach.run import train_command

PAGE = """# {number}. {title}

{question}

## Predict

{predict}

## Run

```console
$ ddpcall lab run {name}
```

The command asks for your predictions, runs the experiment on this machine's CPU or GPUs, and compares. The
experiment alone is `{command}`, a few lines in `conf/experiment/{experiment}.yaml`.

<details markdown="1">
<summary>What was measured here. Predict first.</summary>

<!-- table {experiment} -->
{table}

{caption}
<!-- end {experiment} -->

</details>

## Look at

{look}

## Why

{why}

Where it stands in the source (`ddpcall lab run {name}` prints the line, for the version installed):

{sources}

## Go further

{further}

## Discuss

{discuss}

{navigation}
"""

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


def page_name(lesson: Lesson) -> str:
    """Return the file name of a lesson's page."""
    return f"{number_of(lesson):02d}_{lesson.name}.md"


def render_page(lesson: Lesson, summary: Mapping[str, Any]) -> str:
    """Return a lesson's page.

    Args:
        lesson: The lesson.
        summary: The summary.json of a run of its experiment.
    """
    environment = summary["environment"]
    caption = (
        f"Measured with torch {environment['torch']}, Python {environment['python']}, "
        f"{environment['backend']} on {environment['device']}, world size {environment['world_size']}."
    )
    further = [f"* `{command}`: {purpose}" for command, purpose in lesson.further]
    sources = [f"* `{source.file}`, `{source.name}`: {source.says}" for source in lesson.sources]
    return PAGE.format(
        number=number_of(lesson),
        title=lesson.title,
        name=lesson.name,
        question=lesson.question,
        predict="\n".join(_render_question(number, one) for number, one in enumerate(lesson.predict, 1)),
        command=" ".join(train_command(lesson)),
        experiment=lesson.experiment,
        table=verdict_table(dict(summary)),
        caption=caption,
        look=_bullets(lesson.look),
        why="\n\n".join(lesson.why),
        sources="\n".join(sources),
        further="\n".join(further),
        discuss=_bullets(lesson.discuss),
        navigation=_navigation(lesson),
    )


def _render_question(number: int, question: Question) -> str:
    choices = [f"    * `{choice.word}`: {choice.meaning}" for choice in question.choices]
    return "\n".join([f"{number}. {question.text}", *choices])


def _bullets(lines: tuple[str, ...]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def _navigation(lesson: Lesson) -> str:
    index = LESSONS.index(lesson)
    links = ["[All lessons](index.md)"]
    if index + 1 < len(LESSONS):
        following = LESSONS[index + 1]
        links.append(f"next: [{following.title}]({page_name(following)})")
    return " · ".join(links)


def render_index() -> str:
    """Return the page that lists lessons and exercises."""
    lessons = ["| | lesson | question |", "| --- | --- | --- |"]
    lessons += [
        f"| {number_of(one)} | [{one.title}]({page_name(one)}) `{one.name}` | {one.question} |" for one in LESSONS
    ]
    exercises = ["| exercise | what is wrong | what to do |", "| --- | --- | --- |"]
    exercises += [f"| `{one.name}` | {one.title} | {one.task} |" for one in EXERCISES]
    return INDEX.format(lessons="\n".join(lessons), exercises="\n".join(exercises))


def strip_captions(page: str) -> str:
    """Return a page without the lines that differ from machine to machine."""
    return "\n".join(line for line in page.splitlines() if not line.startswith("Measured with "))


def main() -> None:
    """Write the index and the page of every lesson."""
    directory, *runs = map(Path, sys.argv[1:])
    summaries = [RunDirectory(run).read_summary() for run in runs]
    by_name = {summary["experiment"]: summary for summary in summaries}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "index.md").write_text(render_index())
    for lesson in LESSONS:
        (directory / page_name(lesson)).write_text(render_page(lesson, by_name[lesson.experiment]))


if __name__ == "__main__":
    main()
