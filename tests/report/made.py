"""Run directories as the lab writes them, made without running anything: the formats are the lab's own."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ddpcall.evidence import (
    Cell,
    CollectiveEvidence,
    Consequence,
    Environment,
    Evidence,
    Failure,
    GradientEvidence,
    HookCount,
    MixingEvidence,
    ModesEvidence,
    ReducerEvidence,
    ReplicaEvidence,
)
from ddpcall.lab.records import TrialRecord
from ddpcall.lab.run_directory import RunDirectory

NUM_STEPS = 6
NUM_RANKS = 2
ENVIRONMENT = Environment(
    torch="2.13.0", python="3.11.7", backend="gloo", device="cpu", device_name="x86_64", world_size=NUM_RANKS
)
PATHS = ("call", "forward", "inner_call", "inner_forward", "inner_method", "submodules", "functional")
SYNCED = ("call", "forward")


def make_evidence(cell: Cell, environment: Environment = ENVIRONMENT, crash: str = "") -> Evidence:
    """Return evidence of a DDP trial: paths through the wrapper synchronize, the others do not."""
    synced = cell.path in SYNCED
    difference = 0.0 if synced else 0.5
    failures = (Failure(rank=1, step=2, kind="RuntimeError", message=crash, traceback=crash, seconds=1.0),)
    return Evidence(
        cell=cell,
        environment=environment,
        seed=0,
        steps=NUM_STEPS,
        step_ms=1.5,
        failures=failures if crash else (),
        hooks=tuple(_hooks(cell.path)),
        reducer=ReducerEvidence(
            reducers=1,
            armings=(int(synced),) * NUM_STEPS,
            arrivals_armed=(4 * synced,) * NUM_STEPS,
            arrivals_unarmed=(4 * (not synced),) * NUM_STEPS,
        ),
        collectives=CollectiveEvidence(all_reduces=(int(synced),) * NUM_STEPS, agrees=True),
        gradients=GradientEvidence(
            max_difference=(difference,) * NUM_STEPS,
            max_magnitude=(1.0,) * NUM_STEPS,
            parameters={} if synced else {"head.weight": difference},
            with_gradient=4,
            without_gradient=(),
            batches_differ=True,
        ),
        replicas=ReplicaEvidence(
            first_step_parameters=None if synced else 0,
            first_step_buffers=None,
            parameters=() if synced else ("head.weight",),
            buffers=(),
            initial_digest="0123456789abcdef",
        ),
        consequence=None if crash else make_consequence(synced, environment.world_size),
    )


def make_consequence(synced: bool, num_ranks: int = NUM_RANKS) -> Consequence:
    """Return how good the models are: equal ranks, or ranks that parted."""
    pairs = num_ranks // 2
    return Consequence(
        test_loss=(0.3, 0.3) * pairs if synced else (0.4, 0.7) * pairs,
        test_accuracy=(0.9, 0.9) * pairs if synced else (0.8, 0.7) * pairs,
        distance=(0.0, 0.0) * pairs if synced else (0.2, 0.25) * pairs,
        spread=0.0 if synced else 0.3,
    )


def make_mixing(matrix: Sequence[Sequence[float | None]], shape: str, **changes: Any) -> MixingEvidence:
    """Return evidence of a mixing matrix whose columns are the ranks, once for each backward."""
    ranks = tuple(range(len(matrix)))
    evidence = MixingEvidence(
        steps=(4, 5),
        shapes=(shape, shape),
        step=5,
        matrix=tuple(map(tuple, matrix)),
        ranks=ranks,
        columns=tuple((rank, backward) for backward in range(len(matrix[0]) // len(ranks)) for rank in ranks),
        scale=1.0,
        residual=(1e-8,) * len(ranks),
        by_parameter={shape: ("head.weight", "head.bias")},
        reason="",
        explanation=f"The ranks are {shape}.",
    )
    return dataclasses.replace(evidence, **changes)


def _hooks(path: str) -> Iterable[HookCount]:
    fired = {"wrapped": path == "call", "inner": path not in ("inner_forward", "submodules"), "submodules": True}
    for role, module in (("wrapped", ""), ("inner", ""), ("submodules", "head"), ("submodules", "body")):
        for kind in ("forward_pre", "forward", "full_backward"):
            times = NUM_STEPS if fired[role] else 0
            yield HookCount(role=role, module=module, kind=kind, registered=1, fired=times, forwards=times)


def make_modes(statistics_differ: bool, num_ranks: int = NUM_RANKS) -> ModesEvidence:
    """Return what the modes probe reports of a model with batch norm and dropout."""
    return ModesEvidence(
        training_modules=(5,) * num_ranks,
        num_modules=5,
        flags_differ=(),
        dropout_kept=(0.8,) * NUM_STEPS,
        masks_identical=(True, None, False, False, False, False),
        statistics_difference=(0.1 * statistics_differ,) * NUM_STEPS,
        batches_tracked=tuple(range(1, NUM_STEPS + 1)),
        compute_dtypes=("float32",),
        result_dtype="float32",
        evaluation_inner=0.0,
        evaluation_wrapped=0.0,
    )


def make_run(
    directory: Path,
    cells: Sequence[Cell] = tuple(Cell(wrapper="ddp", path=path, model="my.Mlp") for path in PATHS),
    *,
    expected: dict[str, dict[str, str]] | None = None,
    crashes: dict[str, str] | None = None,
    modes: bool = False,
    mixings: dict[str, MixingEvidence] | None = None,
    environment: Environment = ENVIRONMENT,
    num_steps: int = NUM_STEPS,
    **summary: Any,
) -> Path:
    """Write a run directory.

    Args:
        directory: Where; made.
        cells: The grid.
        expected: What is expected, by path.
        crashes: Messages of the paths that crash.
        modes: Whether the modes probe ran.
        mixings: What the mixing probe measured, by path.
        environment: Where it is said to have been measured, and on how many ranks.
        num_steps: Steps of the curves.
        summary: Replaces fields of summary.json.
    """
    run, ranks = RunDirectory(directory), environment.world_size
    results = [
        _result(cell, environment, expected or {}, crashes or {}, modes, (mixings or {}).get(cell.path))
        for cell in cells
    ]
    content: dict[str, Any] = {
        "experiment": "forward_bypass",
        "question": "What does each way lose?",
        "outcome": "expectations failed" if any(result.unmet for result in results) else "ok",
        "reason": None,
        "first_failing_rank": None,
        "environment": dataclasses.asdict(environment),
        "num_trials": len(cells),
        "left_out": [],
        "trials": [result.summarize() for result in results],
        **summary,
    }
    run.create("name: forward_bypass\nsteps: 6\n", dataclasses.asdict(environment), content)
    run.append("evidence.jsonl", [result.to_json() for result in results])
    run.append("steps.jsonl", [record for cell in cells for record in step_records(cell, ranks, modes, num_steps)])
    run.append("timeline.jsonl", [record for cell in cells for record in timeline_records(cell, ranks)])
    (directory / ".hydra").mkdir(exist_ok=True)
    (directory / ".hydra" / "overrides.yaml").write_text("- experiment=forward_bypass\n- 'note=it''s <b>'\n")
    return directory


def make_comparisons(**found: str) -> dict[str, Any]:
    """Return what summary.json says of comparisons with one process; each expects what is given here.

    Args:
        found: By case: what is found instead.
    """
    cases = {
        "mean": "same",
        "token_means": "weighted",
        "gather_without_gradient": "loss",
        "norm": "some_parameters",
    }
    comparisons = [
        {
            "case": case,
            "wrapper": "ddp",
            "about": f"a step that takes the {case}",
            "expected": expected,
            "found": found.get(case, expected),
            "message": "Ranks were weighted 0.50 and 0.50; the whole batch weights them 0.90 and 0.10. " * 3
            + "\nW",
            "comparison": {"scale": None},
            "expectation_met": found.get(case, expected) == expected,
        }
        for case, expected in cases.items()
    ]
    return {
        "experiment": "same_as_one_process",
        "question": "Do two ranks compute what one process would?",
        "outcome": "expectations failed" if found else "ok",
        "comparisons": comparisons,
        "num_comparisons": len(cases),
        "trials": [],
    }


def _result(
    cell: Cell,
    environment: Environment,
    expected: dict[str, dict[str, str]],
    crashes: dict[str, str],
    modes: bool,
    mixing: MixingEvidence | None,
) -> TrialRecord:
    evidence = dataclasses.replace(make_evidence(cell, environment, crashes.get(cell.path, "")), mixing=mixing)
    if modes:
        evidence = dataclasses.replace(evidence, modes=make_modes(cell.path not in SYNCED, environment.world_size))
    return TrialRecord.of(evidence, expected.get(cell.path, {}))


def step_records(
    cell: Cell, num_ranks: int = NUM_RANKS, modes: bool = False, num_steps: int = NUM_STEPS
) -> Iterable[dict[str, Any]]:
    """Yield what steps.jsonl has of a trial: accuracy every second step, distances that grow after a parting."""
    for rank in range(num_ranks):
        for step in range(num_steps):
            apart = 0.0 if cell.path in SYNCED or rank == 0 else 0.05 * (step + 1) * NUM_STEPS / num_steps
            record = {**dataclasses.asdict(cell), "rank": rank, "step": step, "loss": 2.0 - step / 10}
            record |= {"distance_to_rank0": apart, "accuracy": None if step % 2 else 0.5 + step / 20 - apart}
            if modes:
                record |= {
                    "dropout_kept": 0.8,
                    "masks_identical": (True, None, False, False, False, False)[step % 6],
                    "statistics_difference": apart,
                    "running_mean_norm": 1.0 + apart,
                }
            yield record


def timeline_records(cell: Cell, num_ranks: int = NUM_RANKS) -> Iterable[dict[str, Any]]:
    """Yield the measured step of a trial on each rank."""
    synced = cell.path in SYNCED
    for rank in range(num_ranks):
        events = [
            event("forward", "Mlp", "inner", 100.0, 900.0),
            event("pre_hook", "forward_pre of head", "submodule", 150.0, 160.0),
            event("forward", "head", "submodule", 200.0, 400.0, "Linear"),
            event("backward", "backward", None, 1000.0, 3000.0),
            event("optimizer", "optimizer", None, 3100.0, 3300.0),
        ]
        events += [event("bucket", "all_reduce", None, 2000.0, 2900.0, "1024 bytes")] if synced else []
        skipped = [] if synced else [skip("bucket", "reduction of 4 gradients", None)]
        if cell.path != "call":
            skipped.append(skip("pre_hook", "forward_pre of DistributedDataParallel", "wrapped"))
        yield {
            **dataclasses.asdict(cell),
            "rank": rank,
            "step": 2,
            "raised": False,
            "events": events,
            "collectives": [],
            "skipped": skipped,
        }


def event(
    kind: str, name: str, owner: str | None, start: float, end: float, detail: str | None = None
) -> dict[str, Any]:
    """Return one event of a timeline."""
    return {"kind": kind, "name": name, "owner": owner, "start_us": start, "end_us": end, "detail": detail}


def skip(kind: str, name: str, owner: str | None) -> dict[str, Any]:
    """Return one thing that a step went past."""
    return {"kind": kind, "name": name, "owner": owner, "detail": "1 registered, 0 fired"}


def make_findings(path: Path, *findings: dict[str, Any], **content: Any) -> Path:
    """Write a file as `ddpcall watch --json` does."""
    path.write_text(json.dumps({"schema": 1, "findings": list(findings), **content}))
    return path


def make_watched(steps: int) -> dict[str, Any]:
    """Return the record of what was watched: one model on two ranks."""
    return {
        "attached": True,
        "ranks": [0, 1],
        "world_size": 2,
        "models": [{"name": "Net", "wrapper": "ddp", "steps": steps}],
        "optimizer_steps": steps,
        "process_group": 2,
        "ended": True,
    }


def make_finding(**changes: Any) -> dict[str, Any]:
    """Return the record of a finding."""
    return {
        "code": "DC101",
        "name": "gradients-not-synchronized",
        "severity": "error",
        "message": "The forward entered Net here.",
        "file": "train.py",
        "line": 5,
        "function": "main",
        "ranks": [0, 1],
        "step": 1,
        "parameters": ["head.weight"],
        "cause": "bypassed",
        "fix": "Call the wrapper: `loss = ddp(batch)`.",
        "count": 6,
        **changes,
    }
