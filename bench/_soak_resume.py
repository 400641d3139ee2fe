"""Kill random ranks of a small grid at random moments, and compare what it leaves with an uninterrupted run.

`python -m bench._soak_resume --kills 20 --seed 0`: one launch of torchrun whose every attempt but the last loses a
rank to SIGKILL, and one launch without. Prints the kills, and whether digests of the final parameters and every
record without times are equal; exits with 1 where they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SPAN_S = 4.0  # a rank dies up to this long after its training began
OPTIONS = (
    "model=convnet", "steps=600", "grid.path=[call,forward,inner_call]", "probes.modes=true", "device=cpu",
    "tensorboard=false", "report=false", "trial_timeout_s=600",
)  # fmt: skip
TIMES = ("step_ms", "logged_iteration", "start_us", "end_us", "seconds")


def run_rank(kills: int, seed: int, marks: Path) -> None:
    """Run the lab in this process, and die where the plan says so."""
    from ddpcall.lab import train, trial

    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    plan = random.Random(seed * 1000 + attempt)
    victim, delay = plan.randrange(2), plan.uniform(0, SPAN_S)

    def die() -> None:
        (marks / f"{attempt}").write_text(f"rank {rank} after {delay:.2f} s")
        os.kill(os.getpid(), signal.SIGKILL)

    original = trial.Trial.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        trial.Trial.run = original
        if rank == victim and attempt < kills:
            timer = threading.Timer(delay, die)
            timer.daemon = True
            timer.start()
        return original(self, *args, **kwargs)

    trial.Trial.run = run
    train.main()


def launch(directory: Path, restarts: int, script: list[str], *overrides: str) -> float:
    """Run the lab on two ranks, and return the seconds it took."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    began = time.monotonic()
    done = subprocess.run(
        [*torchrun, f"--max-restarts={restarts}", *script, *OPTIONS, *overrides, f"hydra.run.dir={directory}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    return time.monotonic() - began


def read(path: Path) -> list[Any]:
    """Return the records of a file without times."""
    return [_without_times(json.loads(line)) for line in path.read_text().splitlines()]


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    """Run both and compare them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        killed, whole, marks = Path(room, "killed"), Path(room, "whole"), Path(room, "marks")
        marks.mkdir()
        script = ["-m", "bench._soak_resume", "rank", str(options.kills), str(options.seed), str(marks)]
        saving = ("checkpoint.every=10", "checkpoint.resume=auto")
        killed_s = launch(killed, options.kills, script, *saving)
        whole_s = launch(whole, 0, ["launch/train.py"])
        equal = {name: read(killed / name) == read(whole / name) for name in ("evidence.jsonl", "steps.jsonl")}
        digests = [
            [trial["consequence"]["digest"] for trial in json.loads((run / "summary.json").read_text())["trials"]]
            for run in (killed, whole)
        ]
        equal["digests"] = digests[0] == digests[1]
        died = [path.read_text() for path in sorted(marks.iterdir(), key=lambda path: int(path.name))]
    result = {"kills": len(died), "killed_s": round(killed_s), "whole_s": round(whole_s), "equal": equal}
    print(json.dumps({**result, "digests": digests[0], "died": died}, indent=1))
    sys.exit(not all(equal.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        kills, seed, marks = sys.argv[2:5]
        sys.argv[1:5] = []
        run_rank(int(kills), int(seed), Path(marks))
    else:
        main()
