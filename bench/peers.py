"""The watch beside its nearest relatives, TrainCheck and Lightning Fabric, on one small script.

Cost: median step time as a ratio to the bare script, run alternately (A B A B …). Reports: what each says to
the same mistakes. The peers live in environments of their own, whose interpreters are given by name: `python
-m bench.peers --traincheck PYTHON --fabric PYTHON`; one that is not given is left out, and said to be.

TrainCheck reports nothing by itself: invariants are inferred from the trace of a good run and checked on
another trace. `--infer-minutes` bounds that inference; 0 leaves it out.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

WORKLOAD = Path(__file__).with_name("_peer_workload.py")
PATHS = ("call", "inner_call", "inner_method", "submodules", "functional")
TRACKERS = ("subclass", "sampler")
RANKS = 2
STEP_TIME = re.compile(r"MEDIAN_STEP_MS ([\d.]+)")


def run(command: Sequence[str], directory: Path, timeout_s: float = 600.0) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )


def torchrun(python: str, *arguments: str) -> list[str]:
    return [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), *arguments]


def traincheck_command(
    python: str,
    tracker: str,
    output: Path,
    options: Sequence[str],
    script: str = WORKLOAD.name,
    model: str = "model",
) -> list[str]:
    """A `traincheck-collect` of a script in the current directory, following its variable `model`; it rewrites the
    launching shell script."""
    launch = output.with_suffix(".sh")
    launch.write_text(" ".join(torchrun(python, script, *options)) + "\n")
    style = ["--models-to-track", model, "--model-tracker-style", tracker]
    collect = traincheck_tool(python, "collect")
    return [collect, "--pyscript", script, "--shscript", launch.name, *style, "--output-dir", str(output)]


def infer_command(python: str, traces: Sequence[str], invariants: str) -> list[str]:
    return [traincheck_tool(python, "infer"), "-f", *traces, "-o", invariants]


def check_command(python: str, trace: str, invariants: str, output: str) -> list[str]:
    return [traincheck_tool(python, "check"), "-f", trace, "-i", invariants, "-o", output, "--no-html-report"]


def traincheck_tool(python: str, name: str) -> str:
    return str(Path(python).with_name(f"traincheck-{name}"))


def step_ms(completed: subprocess.CompletedProcess[str]) -> float:
    """The step time that the workload printed, in milliseconds.

    Raises:
        RuntimeError: it printed none; with the end of its output.
    """
    match = STEP_TIME.search(completed.stdout)
    if match is None:
        raise RuntimeError(f"exit {completed.returncode}: {completed.stdout[-600:]}")
    return float(match.group(1))


def ratio(bare: Sequence[str], other: Sequence[str], directory: Path, rounds: int) -> tuple[float, float, float]:
    """Median ratio of step times and its range, over `rounds` alternations."""
    ratios = []
    for _ in range(rounds):
        shutil.rmtree(directory / "trace", ignore_errors=True)
        before = step_ms(run(bare, directory))
        ratios.append(step_ms(run(other, directory)) / before)
    return statistics.median(ratios), min(ratios), max(ratios)


def watch_report(path: str, directory: Path) -> str:
    findings = directory / "findings.json"
    script = [WORKLOAD.name, "--path", path, "--steps", "6"]
    run(torchrun(sys.executable, "-m", "ddpcall", "watch", "--json", str(findings), *script), directory)
    found = json.loads(findings.read_text())["findings"]
    return ", ".join(f"{f['code']} line {f['line']}: {f['name']}" for f in found) or "nothing"


def fabric_report(python: str, path: str, directory: Path) -> str:
    done = run(torchrun(python, WORKLOAD.name, "--fabric", "--path", path, "--steps", "6"), directory)
    if done.returncode == 0:
        return "nothing"
    errors = [line for line in done.stdout.splitlines() if "Error: " in line]
    return errors[0].split("]: ")[-1][:140] if errors else f"exit {done.returncode}"


def traincheck_reports(python: str, directory: Path, minutes: float) -> Mapping[str, str]:
    """Invariants inferred from a good run, checked on bypassed runs: how many were violated."""
    for path in PATHS[:2]:
        command = traincheck_command(python, "subclass", directory / path, ["--path", path, "--steps", "6"])
        run(command, directory)
    try:
        run(infer_command(python, ["call"], "invariants.json"), directory, timeout_s=60 * minutes)
    except subprocess.TimeoutExpired:
        return {"inner_call": f"inference from 6 good steps was not done after {minutes:g} min"}
    done = run(check_command(python, "inner_call", "invariants.json", "checked"), directory)
    return {"inner_call": " ".join(done.stdout.split()[-40:])}


def print_costs(options: argparse.Namespace, directory: Path) -> None:
    bare = torchrun(sys.executable, WORKLOAD.name)
    others: dict[str, tuple[Sequence[str], Sequence[str]]] = {
        "watch": (bare, torchrun(sys.executable, "-m", "ddpcall", "watch", WORKLOAD.name))
    }
    if options.fabric:
        others["Fabric"] = (
            torchrun(options.fabric, WORKLOAD.name),
            torchrun(options.fabric, WORKLOAD.name, "--fabric"),
        )
    if options.traincheck:
        few = ["--steps", "12"]
        for tracker in TRACKERS:
            command = traincheck_command(options.traincheck, tracker, directory / "trace", few)
            others[f"TrainCheck {tracker}"] = (torchrun(options.traincheck, WORKLOAD.name, *few), command)
    for name, (before, after) in others.items():
        median, low, high = ratio(before, after, directory, options.rounds)
        print(f"step time, {name}: ×{median:.2f} ({low:.2f} to {high:.2f})", flush=True)


def print_reports(options: argparse.Namespace, directory: Path) -> None:
    for path in PATHS:
        print(f"{path}: watch says {watch_report(path, directory)}", flush=True)
        if options.fabric:
            print(f"{path}: Fabric says {fabric_report(options.fabric, path, directory)}", flush=True)
    if options.traincheck and options.infer_minutes:
        for path, report in traincheck_reports(options.traincheck, directory, options.infer_minutes).items():
            print(f"{path}: TrainCheck says {report}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers")
    parser.add_argument("--traincheck", metavar="PYTHON", help="interpreter with traincheck 0.2.0")
    parser.add_argument("--fabric", metavar="PYTHON", help="interpreter with lightning-fabric")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--infer-minutes", type=float, default=0.0)
    options = parser.parse_args()
    for peer in ("traincheck", "fabric"):
        if not getattr(options, peer):
            print(f"{peer}: left out, no interpreter given (--{peer} PYTHON)", flush=True)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        shutil.copy(WORKLOAD, directory)
        print_costs(options, directory)
        print_reports(options, directory)


if __name__ == "__main__":
    main()
