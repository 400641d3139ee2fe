"""Hand-written evidence for tests of pure logic."""

import dataclasses
from typing import Any

from ddpcall.evidence import (
    Cell,
    CollectiveEvidence,
    CompiledEvidence,
    Consequence,
    Environment,
    Evidence,
    Failure,
    GradientEvidence,
    HookCount,
    MixingEvidence,
    ReducerEvidence,
    ReplicaEvidence,
)

ENVIRONMENT = Environment(
    torch="2.13.0", python="3.11", backend="gloo", device="cpu", device_name="x86_64", world_size=2
)
FAILURE = Failure(rank=1, step=3, kind="ValueError", message="boom", traceback="…", seconds=1.0)


def make_gradients(**changes: Any) -> GradientEvidence:
    """Return gradients that were equal on both ranks in two steps, from different batches."""
    synced = GradientEvidence(
        max_difference=(0.0, 0.0),
        max_magnitude=(1.0, 0.5),
        parameters={},
        with_gradient=2,
        without_gradient=(),
        batches_differ=True,
    )
    return dataclasses.replace(synced, **changes)


def make_mixing(*shapes: str) -> MixingEvidence:
    """Return a mixing matrix of two ranks, with the shapes of the measured steps."""
    return MixingEvidence(
        steps=tuple(range(len(shapes))),
        shapes=shapes,
        step=0,
        matrix=((0.5, None), (0.5, 0.5)),
        ranks=(0, 1),
        columns=((0, 0), (1, 0)),
        scale=None,
        residual=(1e-8, 1e-8),
        by_parameter=dict.fromkeys(shapes, ("weight", "bias")),
        reason="",
        explanation="Nothing is known.",
    )


def make_hook(
    role: str, kind: str = "forward", *, fired: int = 2, forwards: int = 2, module: str = ""
) -> HookCount:
    """Return the count of one hook."""
    return HookCount(role=role, module=module, kind=kind, registered=1, fired=fired, forwards=forwards)


def make_evidence(**changes: Any) -> Evidence:
    """Return complete evidence of a synchronized trial, with some parts replaced."""
    complete = Evidence(
        cell=Cell(wrapper="ddp", path="call", model="ddpcall.lab.models.Mlp"),
        environment=ENVIRONMENT,
        seed=0,
        steps=2,
        step_ms=1.5,
        hooks=tuple(make_hook(role) for role in ("wrapped", "inner", "submodules")),
        reducer=ReducerEvidence(
            reducers=1,
            armings=(1, 1),
            arrivals_armed=(2, 2),
            arrivals_unarmed=(0, 0),
            logged_iteration=1,
            logged_buckets=1,
        ),
        collectives=CollectiveEvidence(all_reduces=(1, None), agrees=True),
        gradients=make_gradients(),
        mixing=make_mixing("averaged", "averaged"),
        replicas=ReplicaEvidence(
            first_step_parameters=None, first_step_buffers=0, parameters=(), buffers=("mean",), initial_digest="00"
        ),
        compiled=CompiledEvidence(requested=False, frames=0, calls_compiled=0, calls_eager=2),
        consequence=Consequence(test_loss=(0.5, 0.5), test_accuracy=(0.9, 0.9), distance=None, spread=0.0),
    )
    return dataclasses.replace(complete, **changes)
