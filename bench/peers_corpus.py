"""What TrainCheck and Lightning Fabric say to the scripts of tests/corpus, which the watch is scored on.

`python -m bench.peers_corpus --fabric PYTHON --traincheck PYTHON [--only GLOB …] [--minutes N] [--sample N]`; a
peer whose interpreter is not given is left out.

Fabric: every script runs as it is, with Fabric's wrapper where it says DistributedDataParallel; and once more with
`.module` of the wrapper being the wrapper, the way Fabric's users write (`_fabric_launcher.py`). Fabric speaks by
an error, "You are calling the method … from outside the model".

TrainCheck speaks by invariants. They are inferred once from the traces of right scripts (`--reference`), each
traced by `traincheck-collect` with the `subclass` tracker, then checked on the traces of a sample: of the scripts
on two ranks that give a wrapped module a name (`NAME = DDP(…)`: collect follows a variable), every n-th by name,
as many wrong as right ones. `--minutes` bounds it all, COLLECT_S each trace; what was not reached is left out.

Of a wrong script: *found* when the peer says anything, *on the line* when what it says leads to a marked line,
else *missed*. Of a right script: *false* when it says anything, else *silent*. *Not applicable*, with the reason:
the script wraps nothing with DistributedDataParallel, or ends otherwise than it does alone, the peer having said
nothing. A miss with `.module` being the wrapper can be a mistake that is gone (`model(x)` for `model.module(x)`):
the replicas part (tests/corpus/harm.py) in the script as it is and no longer then; those are counted at the end.
TrainCheck says nothing that leads to a line unless a report names the script's file.
"""

import argparse
import ast
import fnmatch
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from bench.peers import check_command, infer_command, traincheck_command
from tests.corpus.marks import Marks, read_marks
from tests.corpus.runner import ROOT, Run, run_bounded
from tests.corpus.score import corpus_scripts

LAUNCHER = Path(__file__).with_name("_fabric_launcher.py")
WRAPPED = "WRAPPED BY FABRIC"
COMPLAINT = re.compile(r"You are calling the method `(.+?)` from outside the model")
ERROR = re.compile(r"^[\w.]*(?:Error|Exception)\b.*$", re.MULTILINE)
REFERENCES = ("load_before_wrapping_on_rank_zero", "same_seed_without_dropout")
COLLECT_S = 240.0
VERDICTS = ("found", "missed", "false", "silent", "not applicable")


@dataclass(frozen=True)
class Outcome:
    """What a peer made of one script: one of VERDICTS, what it said, whether that leads to a marked line; and
    whether the ranks' parameters parted in that run, where that was looked at."""

    script: str
    wrong: bool
    marks: Marks
    verdict: str
    says: str = ""
    on_line: bool = False
    parted: bool = False


@dataclass(frozen=True)
class Checked:
    """A script's trace against TrainCheck's invariants; `trouble` says why there was no trace or no check."""

    script: str
    wrong: bool
    marks: Marks
    violated: frozenset[str] = frozenset()
    names_script: bool = False
    trouble: str = ""


def judge_fabric(script: str, wrong: bool, marks: Marks, run: Run, parted: bool = False) -> Outcome:
    """Classifies a run under Fabric; pure. The lines are those of the script's frames in the traceback."""
    complaint = COMPLAINT.search(run.output)
    if complaint:
        lines = {int(line) for line in re.findall(rf'/{re.escape(script)}\.py", line (\d+)', run.output)}
        marked = {expected.line for expected in marks.expected} | {line for _, line in marks.accepted}
        verdict = "found" if wrong else "false"
        return Outcome(script, wrong, marks, verdict, complaint.group(1), bool(lines & marked), parted)
    if reason := why_not_applicable(marks, run):
        return Outcome(script, wrong, marks, "not applicable", reason)
    return Outcome(script, wrong, marks, "missed" if wrong else "silent", parted=parted)


def why_not_applicable(marks: Marks, run: Run) -> str:
    """Why a run in which Fabric said nothing tells nothing about Fabric; empty when it does tell."""
    if run.exit_code == -1:
        return "over the time limit"
    if run.exit_code != marks.exit_code:
        errors = ERROR.findall(run.output)
        return errors[-1][:110] if errors else f"exit code {run.exit_code} instead of {marks.exit_code}"
    return "" if WRAPPED in run.output else "wraps nothing with DistributedDataParallel"


def judge_traincheck(checked: Checked, others: Collection[Checked]) -> Outcome:
    """Classifies a check; pure. `others` tell which of its violations right scripts have too."""
    if checked.trouble:
        return Outcome(checked.script, checked.wrong, checked.marks, "not applicable", checked.trouble)
    known = {name for other in others if not other.wrong and other is not checked for name in other.violated}
    own = checked.violated - known
    verdicts = ("found", "missed") if checked.wrong else ("false", "silent")
    says = f"{len(checked.violated)} violated, {len(own)} by no {'' if checked.wrong else 'other '}right script"
    verdict = verdicts[0] if checked.violated else verdicts[1]
    return Outcome(checked.script, checked.wrong, checked.marks, verdict, says, checked.names_script)


def sums(outcomes: Sequence[Outcome]) -> str:
    counts = ", ".join(f"{verdict} {sum(o.verdict == verdict for o in outcomes)}" for verdict in VERDICTS)
    on_line = sum(o.verdict == "found" and o.on_line for o in outcomes)
    return f"{len(outcomes)} scripts: {counts.replace(',', f' ({on_line} on the line),', 1)}"


def gone(before: Sequence[Outcome], after: Sequence[Outcome]) -> list[str]:
    """Wrong scripts whose replicas part in one way of wrapping and stay together, unreported, in the other."""
    parted = {one.script for one in before if one.wrong and one.parted}
    return [one.script for one in after if one.verdict == "missed" and not one.parted and one.script in parted]


def table_of(outcomes: Sequence[Outcome], title: str) -> Table:
    table = Table("script", "is", "marked", "verdict", "says", title=title)
    for one in outcomes:
        marked = " ".join(map(str, one.marks.expected))
        line = ", on the line" if one.on_line else ""
        says = one.says or ("(replicas part)" if one.parted else "")
        table.add_row(one.script, "wrong" if one.wrong else "right", marked, one.verdict + line, says)
    return table


def is_wrong(script: Path) -> bool:
    return script.parent.name == "wrong"


def peer_environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_fabric(
    python: str, scripts: Sequence[Path], options: Sequence[str], logs: Path | None
) -> Iterator[Outcome]:
    """Runs the scripts in one launcher, which answers a line each.

    Raises:
        RuntimeError: the launcher ended before it had run them all.
    """
    command = [python, str(LAUNCHER), *options, *map(str, scripts)]
    process = subprocess.Popen(command, cwd=ROOT, env=peer_environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        for script, line in zip(scripts, process.stdout, strict=False):
            answer = json.loads(line)
            run = Run(answer["exit_code"], answer["output"], answer["seconds"])
            if logs:
                (logs / f"fabric{''.join(options)}_{script.stem}.log").write_text(run.output)
            yield judge_fabric(script.stem, is_wrong(script), read_marks(script), run, answer["parted"])
    if process.returncode:
        raise RuntimeError(f"{LAUNCHER.name} ended with exit code {process.returncode}")


def tracked_variable(source: str) -> str | None:
    """The first plain variable that is given a `DDP(…)` or `DistributedDataParallel(…)`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Assign(
                targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id="DDP" | "DistributedDataParallel"))
            ):
                return name
    return None


def every_nth(scripts: Sequence[Path], count: int) -> list[Path]:
    """`count` scripts at even distances, all when there are no more."""
    count = min(count, len(scripts))
    return [scripts[index * len(scripts) // count] for index in range(count)]


def sample_of(scripts: Sequence[Path], count: int, references: Collection[str]) -> list[Path]:
    """Wrong, right, wrong, right …: a time limit leaves as many of each."""
    usable = [
        script
        for script in scripts
        if tracked_variable(script.read_text()) and read_marks(script).ranks == 2 and script.stem not in references
    ]
    halves = [every_nth([s for s in usable if is_wrong(s) == wrong], count) for wrong in (True, False)]
    return [script for pair in zip(*halves, strict=False) for script in pair]


def collect(python: str, script: Path, directory: Path) -> str:
    """Traces a script into `directory / script.stem`; returns what went wrong, or nothing."""
    (directory / script.name).write_text(script.read_text())
    model = tracked_variable(script.read_text()) or "model"
    output = directory / script.stem
    command = traincheck_command(python, "subclass", output, (), script.name, model)
    run = run_bounded(command, peer_environment(), COLLECT_S, directory)
    if run.exit_code == -1:
        return f"collect took over {COLLECT_S:.0f} s"
    if not list(output.glob("trace_API_*")):
        return f"no trace: {' '.join(ERROR.findall(run.output)[-1:])[:110]}"
    printed = (output / "program_output.txt").read_text()
    errors = [line for line in ERROR.findall(printed) if "ChildFailedError" not in line]
    failed = "ChildFailedError" in printed and read_marks(script).exit_code == 0
    return f"crashes under collect: {' '.join(errors[-1:])[:110]}" if failed else ""


def check(python: str, script: Path, directory: Path) -> Checked:
    """Traces and checks one script; its trace and the check's output are deleted with `directory`'s caller."""
    named = (script.stem, is_wrong(script), read_marks(script))
    if trouble := collect(python, script, directory):
        return Checked(*named, trouble=trouble)
    command = check_command(python, script.stem, "invariants.json", f"checked_{script.stem}")
    run = run_bounded(command, peer_environment(), COLLECT_S, directory)
    report = directory / f"checked_{script.stem}" / script.stem
    if run.exit_code:
        return Checked(
            *named, trouble=f"check: exit code {run.exit_code} {' '.join(ERROR.findall(run.output)[-1:])}"
        )
    violations = json.loads((report / "violations_summary.json").read_text())["violations"]
    violated = frozenset(f"{one['relation_type']}: {one['display_name']}" for one in violations)
    return Checked(*named, violated, f"{script.stem}.py" in (report / "failed.log").read_text())


def run_traincheck(python: str, scripts: Sequence[Path], options: argparse.Namespace) -> Iterator[Checked]:
    """Infers from the references, then checks the sample.

    Raises:
        RuntimeError: a reference could not be traced, or nothing inferred from them.
    """
    until = time.monotonic() + 60 * options.minutes
    references = [script for script in corpus_scripts() if script.stem in options.reference]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for script in references:
            if trouble := collect(python, script, directory):
                raise RuntimeError(f"{script.stem}: {trouble}")
        command = infer_command(python, [script.stem for script in references], "invariants.json")
        run = run_bounded(command, peer_environment(), until - time.monotonic(), directory)
        if run.exit_code:
            raise RuntimeError(f"inference ended with exit code {run.exit_code} after {run.seconds:.0f} s")
        invariants = len((directory / "invariants.json").read_text().splitlines())
        print(
            f"{invariants} invariants inferred from {', '.join(options.reference)} in {run.seconds:.0f} s",
            flush=True,
        )
        for script in sample_of(scripts, options.sample, options.reference):
            if time.monotonic() > until:
                return
            checked = check(python, script, directory)
            print(f"{script.stem}: {checked.trouble or len(checked.violated)}", file=sys.stderr, flush=True)
            if options.logs:
                (options.logs / f"traincheck_{script.stem}.txt").write_text("\n".join(sorted(checked.violated)))
            yield checked


def print_fabric(console: Console, options: argparse.Namespace, scripts: Sequence[Path]) -> None:
    both = []
    for flags in ([], ["--module-is-wrapper"]):
        title = f"Fabric on the corpus{', .module being its wrapper' if flags else ''}"
        outcomes = list(run_fabric(options.fabric, scripts, flags, options.logs))
        both.append(outcomes)
        console.print(table_of(outcomes, title))
        console.print(f"{title}: {sums(outcomes)}", soft_wrap=True)
        parted = sum(one.verdict == "missed" and one.parted for one in outcomes)
        console.print(f"missed, and the replicas part: {parted}")
    names = gone(*both)
    console.print(f"no longer wrong, .module being the wrapper: {len(names)} {' '.join(names)}", soft_wrap=True)


def print_traincheck(console: Console, options: argparse.Namespace, scripts: Sequence[Path]) -> None:
    all_checked = list(run_traincheck(options.traincheck, scripts, options))
    outcomes = [judge_traincheck(checked, all_checked) for checked in all_checked]
    console.print(table_of(outcomes, "TrainCheck on a sample of the corpus"))
    console.print(f"TrainCheck: {sums(outcomes)}", soft_wrap=True)
    for wrong in (True, False):
        numbers = [len(c.violated) for c in all_checked if c.wrong == wrong and not c.trouble]
        if numbers:
            spread = f"{median(numbers):g} ({min(numbers)} to {max(numbers)})"
            console.print(f"violated invariants, {'wrong' if wrong else 'right'} scripts, median: {spread}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers_corpus")
    parser.add_argument("--fabric", metavar="PYTHON", help="interpreter with lightning-fabric")
    parser.add_argument("--traincheck", metavar="PYTHON", help="interpreter with traincheck 0.2.0")
    parser.add_argument("--only", nargs="+", metavar="GLOB", default=["*"], help="scripts by name, without .py")
    parser.add_argument("--minutes", type=float, default=30.0, help="for TrainCheck")
    parser.add_argument("--sample", type=int, default=8, help="wrong scripts for TrainCheck, and right ones")
    parser.add_argument("--reference", nargs="+", default=list(REFERENCES), help="right scripts for TrainCheck")
    parser.add_argument("--logs", type=Path, help="keep what the peers printed in this directory")
    options = parser.parse_args()
    if options.logs:
        options.logs.mkdir(parents=True, exist_ok=True)
    scripts = [s for s in corpus_scripts() if any(fnmatch.fnmatch(s.stem, glob) for glob in options.only)]
    console = Console(width=None if sys.stdout.isatty() else 200)
    for peer in ("fabric", "traincheck"):
        if not getattr(options, peer):
            console.print(f"{peer}: left out, no interpreter given (--{peer} PYTHON)")
    if options.fabric:
        print_fabric(console, options, scripts)
    if options.traincheck:
        print_traincheck(console, options, scripts)


if __name__ == "__main__":
    main()
