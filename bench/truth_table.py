"""The whole truth table in one torchrun: cells a second, against a torchrun a cell, and where the time goes.

    python -m bench.truth_table

A handful of cells is run apart, spread over the table; their median stands for all. The share of time outside
torch is sampled on rank 0: a sample counts as torch's when any frame of the main thread's stack is torch's.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SAMPLE_S = 0.005
APART = (("ddp", "call"), ("fsdp2", "forward"), ("accelerate_bf16", "submodules"), ("compile", "call"))
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(directory: str, *command: str) -> float:
    """Return the seconds one torchrun takes, interpreter start included."""
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([*LAUNCH, *command], cwd=directory, env=environment, check=True, capture_output=True)
    return time.perf_counter() - began


def sample_stacks(main_thread: int, counts: dict[str, int], stop: threading.Event) -> None:
    """Count where the main thread is: in torch, or not."""
    while not stop.wait(SAMPLE_S):
        frame = sys._current_frames().get(main_thread)
        files = []
        while frame is not None:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        if any("/ddpcall/lab/" in file for file in files):  # the interpreter's start is not the table's
            # The launcher's error recorder is torch's too, and stands under everything.
            in_torch = any("/torch/" in file and "/elastic/" not in file for file in files)
            counts["torch" if in_torch else "outside"] += 1


def run_sampled() -> None:
    """Run the lab on this rank while a thread looks where it is; rank 0 leaves shares.json."""
    counts, stop = {"torch": 0, "outside": 0}, threading.Event()
    sampler = threading.Thread(
        target=sample_stacks, args=(threading.get_ident(), counts, stop), daemon=True, name="sampler"
    )
    from ddpcall.lab.train import main as train

    sampler.start()
    try:
        train()
    finally:
        stop.set()
        if os.environ["RANK"] == "0":
            Path("shares.json").write_text(json.dumps(counts))


def main() -> None:
    """Measure and print."""
    if "RANK" in os.environ:
        run_sampled()
        return
    with tempfile.TemporaryDirectory() as directory:
        together_s = run(directory, "-m", "bench.truth_table", "experiment=truth_table", "hydra.run.dir=table")
        summary = json.loads(Path(directory, "table", "summary.json").read_text())
        counts = json.loads(Path(directory, "shares.json").read_text())
        apart_s = [
            run(
                directory,
                "-m",
                "ddpcall",
                "train",
                "experiment=truth_table",
                f"grid.wrapper=[{wrapper}]",
                f"grid.path=[{path}]",
            )
            for wrapper, path in APART
        ]
    num_cells = len(summary["trials"])
    each_s = statistics.median(apart_s)
    print(f"{num_cells} cells in {together_s:.0f} s: {num_cells / together_s:.1f} cells/s (target: under 180 s)")
    print(
        f"one torchrun a cell: {each_s:.1f} s (median of {len(APART)}), {num_cells * each_s:.0f} s in all: "
        f"×{num_cells * each_s / together_s:.0f} (target: at least 40)"
    )
    print(f"outside torch: {counts['outside'] / sum(counts.values()):.0%} of rank 0's time")


if __name__ == "__main__":
    main()
