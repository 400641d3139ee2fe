"""A trial that was cut goes on to the same bits, and its evidence has neither gap nor duplicate."""

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ddpcall.evidence import Cell, Evidence
from ddpcall.lab.checkpoint import Checkpoints
from ddpcall.lab.data import load_split
from ddpcall.lab.experiment import merge_reports
from ddpcall.lab.guarded_run import describe_environment
from ddpcall.lab.rank_report import RankReport
from ddpcall.lab.schema import CheckpointConfig, DataConfig, OptimizerConfig, ProbesConfig, TrainConfig
from ddpcall.lab.trial import Trial
from ddpcall.lab.world import Accelerator, open_world
from ddpcall.wrappers import WRAPPERS as ALL_WRAPPERS
from tests.ranks.lab_process import ROOT, SCRIPT, clean_environment, torchrun

CPU = Accelerator(torch.device("cpu"), "gloo")
STEPS, EVERY, CUT = 10, 4, 7
# Spelled out, so that a wrapper that joins them meets a test.
WRAPPERS = (
    "none", "ddp", "ddp_find_unused", "ddp_bucket_view", "ddp_comm_hook", "ddp_local_buffers", "ddp_summed",
    "replicate", "accelerate",
)  # fmt: skip


class CutTrial(Trial):
    """Ends on every rank a few steps after the checkpoint."""

    def _train_step(self, *args: Any) -> float:
        if self._step == CUT:
            raise RuntimeError("cut")
        return super()._train_step(*args)


class Runner:
    """Runs trials of one cell on the ranks of this test."""

    def __init__(self, directory: Path, cell: Cell, **probes: Any) -> None:
        self.world = open_world()
        self.cell = cell
        self.config = TrainConfig(
            steps=STEPS,
            model={"_target_": cell.model},
            data=DataConfig(name="digits", batch_size=8),
            optimizer=OptimizerConfig(name="adamw", lr=0.01),
            probes=ProbesConfig(accuracy_every=3, hook_steps=6, **probes),
            checkpoint=CheckpointConfig(every=EVERY, resume="auto"),
        )
        shared = self.world.collect("directory", str(directory), 30)[0]
        self.checkpoints = Checkpoints(Path(shared) / cell.label().replace(" ", ""), keep=2)
        self.number = 0

    def run(self, kind: type[Trial] = Trial, checkpoints: Checkpoints | None = None) -> RankReport:
        """Run the trial once more."""
        self.number += 1
        split = load_split(self.config.data, 0)
        trial = kind(self.cell, self.config, split, self.world, CPU, observe=True, checkpoints=checkpoints)
        return trial.run(f"{self.cell.label()} {self.number}")

    def merge(self, report: RankReport) -> tuple[Evidence, Tensor]:
        """Return the evidence of all ranks, without times, and this rank's parameters."""
        assert report.failure is None, report.failure.traceback
        assert report.parameters is not None
        reports = self.world.collect(f"report {self.number}", dataclasses.replace(report, parameters=None), 30)
        environment = describe_environment(CPU, self.world.world_size)
        evidence = merge_reports(self.cell, self.config, environment, reports)
        return dataclasses.replace(evidence, step_ms=None), report.parameters


@pytest.fixture
def no_group():
    """Trials bring their own default process group."""
    dist.destroy_process_group()


def compare_cut_with_whole(runner: Runner) -> None:
    whole = runner.run(checkpoints=None)
    whole_evidence, parameters = runner.merge(whole)
    cut = runner.run(CutTrial, runner.checkpoints)
    assert cut.failure is not None
    assert cut.failure.message == "cut"
    resumed = runner.run(checkpoints=runner.checkpoints)
    evidence, resumed_parameters = runner.merge(resumed)
    assert resumed.resumed_at == EVERY
    assert torch.equal(parameters, resumed_parameters)
    assert (whole.digest, whole.losses, whole.accuracies, whole.columns) == (
        resumed.digest,
        resumed.losses,
        resumed.accuracies,
        resumed.columns,
    )
    assert resumed.parts["timeline"] == cut.parts["timeline"]
    assert leave_out_counter(evidence) == leave_out_counter(whole_evidence)


def leave_out_counter(evidence: Evidence) -> Evidence:
    """Leave out DDP's own counter of iterations, which is of one DDP object, and sampled."""
    if evidence.reducer is None:
        return evidence
    return dataclasses.replace(evidence, reducer=dataclasses.replace(evidence.reducer, logged_iteration=None))


@pytest.mark.ranks(2, timeout=120)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_trial_that_was_cut_goes_on_to_the_same_bits(no_group, tmp_path, wrapper):
    if wrapper == "accelerate":
        pytest.importorskip("accelerate")
    compare_cut_with_whole(
        Runner(tmp_path, Cell(wrapper=wrapper, path="call", model="ddpcall.lab.models.ConvNet"))
    )


@pytest.mark.ranks(3, timeout=120)
def test_sums_over_more_than_two_ranks_are_rounded_as_they_were(no_group, tmp_path):
    compare_cut_with_whole(Runner(tmp_path, Cell(wrapper="ddp", path="call", model="ddpcall.lab.models.Mlp")))


@pytest.mark.ranks(2, timeout=120)
@pytest.mark.parametrize(
    "coordinates",
    [
        {"path": "inner_call"},
        {"path": "forward", "hooks": "late"},
        {"path": "call", "window": "no_sync_both"},
        {"path": "call", "mode": "seeded_by_rank"},
        {"path": "functional"},
    ],
    ids=lambda coordinates: "-".join(coordinates.values()),
)
def test_ranks_that_part_are_resumed_each_where_it_was(no_group, tmp_path, coordinates):
    cell = Cell(wrapper="ddp", model="ddpcall.lab.models.ConvNet", **coordinates)
    compare_cut_with_whole(Runner(tmp_path, cell, modes=True))


def test_every_wrapper_that_resumes_is_compared():
    assert set(WRAPPERS) == {name for name, spec in ALL_WRAPPERS.items() if spec.resumable}


TIMES = ("step_ms", "logged_iteration", "start_us", "end_us", "seconds")


def launch(directory: Path, script: Path, *overrides: str, restarts: int = 0) -> str:
    """Run a small grid in a directory under torchrun, and return what it printed."""
    options = ("steps=14", "grid.path=[call,inner_call]", "model=convnet", "tensorboard=false", "report=false")
    done = subprocess.run(
        [*torchrun(2), f"--max-restarts={restarts}", str(script), *options, *overrides],
        cwd=directory,
        env=clean_environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def read_without_times(directory: Path, name: str) -> list[Any]:
    """Return the records of a file without what differs between any two runs."""
    (path,) = directory.glob(f"runs/train/*/{name}")
    return [_without_times(json.loads(line)) for line in path.read_text().splitlines()]


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def test_ranks_killed_under_torchrun_leave_neither_gap_nor_duplicate(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    saving = ("checkpoint.every=4", "checkpoint.resume=auto")
    said = launch(killed, ROOT / "tests" / "ranks" / "killed_lab.py", *saving, restarts=3)
    launch(whole, SCRIPT)
    assert said.count("rank 1 disappeared") == 1
    assert said.count("rank 0 disappeared") == 2
    assert said.count("resumed: 0 of 2 trials are finished and stand") == 1
    assert said.count("resumed: 1 of 2 trials are finished and stand") == 2
    for name in ("evidence.jsonl", "steps.jsonl"):
        assert read_without_times(killed, name) == read_without_times(whole, name)
    first, second = (read_without_times(each, "timeline.jsonl") for each in (killed, whole))
    assert [(line["path"], line["rank"], line["step"]) for line in first] == [
        (line["path"], line["rank"], line["step"]) for line in second
    ]
    (summary,) = killed.glob("runs/train/*/summary.json")
    assert json.loads(summary.read_text())["outcome"] == "ok"
    assert not (summary.parent / "checkpoints").exists()
