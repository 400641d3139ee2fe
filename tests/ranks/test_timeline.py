"""Timeline, accuracy and distance by step: what they see, and that nothing changes because they look."""

import gc
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpcall.evidence import Cell
from ddpcall.lab import held_out
from ddpcall.lab.data import load_split
from ddpcall.lab.models import Chain
from ddpcall.lab.rank_report import RankReport
from ddpcall.lab.schema import DataConfig, OptimizerConfig, PathConfig, ProbesConfig, TrainConfig, WrapperConfig
from ddpcall.lab.trial import Trial
from ddpcall.lab.world import Accelerator, open_world
from ddpcall.probes import collectives, replicas
from ddpcall.probes.collectives import time_collectives
from ddpcall.probes.replicas import observe_replicas
from ddpcall.verdicts import judge_skipped

CPU = torch.device("cpu")
STEPS = 4


class Tiny(Chain):
    """The smallest chain."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.head = nn.Linear(64, 10)


class Restless(Chain):
    """Batch norm, dropout, and random numbers in eval mode too: whoever calls it changes what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.body = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.2))
        self.head = nn.Linear(16, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + torch.rand(10) * 1e-3


def run_trial(
    wrapper: str, path: str, model: type[nn.Module], probes: ProbesConfig, observe: bool = True, **coordinates: str
) -> RankReport:
    """Run one trial of the lab in process groups of its own, on the ranks of this test."""
    config = TrainConfig(
        steps=STEPS,
        wrapper=WrapperConfig(name=wrapper),
        path=PathConfig(name=path),
        model={"_target_": f"{model.__module__}.{model.__qualname__}"},
        data=DataConfig(name="digits", batch_size=8),
        optimizer=OptimizerConfig(name="sgd", lr=0.05, momentum=0.9),
        probes=probes,
    )
    cell = Cell(wrapper=wrapper, path=path, model=config.model["_target_"], **coordinates)
    world, accelerator = open_world(), Accelerator(CPU, "gloo")
    trial = Trial(cell, config, load_split(config.data, 0), world, accelerator, observe=observe)
    return trial.run(f"trial {wrapper} {path} {probes}")


@pytest.fixture
def no_group():
    """Trials bring their own default process group."""
    dist.destroy_process_group()


ON, OFF = ProbesConfig(accuracy_every=1), ProbesConfig(timeline=False, accuracy_every=0)


def compare(on: RankReport, off: RankReport) -> None:
    assert on.failure is None, on.failure
    assert off.failure is None, off.failure
    assert on.parameters is not None
    assert off.parameters is not None
    assert torch.equal(on.parameters, off.parameters)
    assert on.losses == off.losses
    for name in ("hooks", "reducer", "gradients", "compiled"):
        assert on.parts.get(name) == off.parts.get(name)


@pytest.mark.ranks(2, timeout=120)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own, about tensors it makes
@pytest.mark.parametrize(
    ("wrapper", "path"),
    [
        ("ddp", "call"),
        ("ddp", "inner_call"),
        ("replicate", "call"),
        ("fsdp2", "call"),
        ("accelerate_bf16", "call"),
        ("compile", "call"),
        ("compile", "inner_call"),
        ("ddp_of_compile", "call"),
    ],
)
def test_looking_changes_no_bit_of_the_training_and_compiles_nothing_anew(no_group, wrapper, path):
    if wrapper.startswith("accelerate"):
        pytest.importorskip("accelerate")
    on = run_trial(wrapper, path, Restless, ON)
    random_on = torch.get_rng_state()
    off = run_trial(wrapper, path, Restless, OFF)
    compare(on, off)
    assert torch.equal(random_on, torch.get_rng_state())
    assert on.parts["timeline"] is not None
    assert "timeline" not in off.parts
    assert off.accuracies == [None] * STEPS
    tested = [accuracy is not None for accuracy in on.accuracies]
    assert tested == [wrapper != "fsdp2"] * STEPS


@pytest.mark.ranks(2)
def test_a_test_that_draws_random_numbers_would_show(no_group, monkeypatch):
    monkeypatch.setattr(held_out, "_kept_random_state", lambda _: torch.no_grad())
    on, off = (run_trial("ddp", "call", Restless, probes) for probes in (ON, OFF))
    assert on.parameters is not None
    assert off.parameters is not None
    assert not torch.equal(on.parameters, off.parameters)


PRE, FORWARD, AFTER = "pre_hook", "forward", "hook"
FLATTEN_AND_HEAD = [
    (PRE, "forward_pre of flatten"),
    (FORWARD, "flatten"),
    (AFTER, "forward of flatten"),
    (PRE, "forward_pre of head"),
    (FORWARD, "head"),
    (AFTER, "forward of head"),
]
INNER = [(PRE, "forward_pre of Tiny"), (FORWARD, "Tiny"), *FLATTEN_AND_HEAD, (AFTER, "forward of Tiny")]
DDP = "DistributedDataParallel"
BACKWARD_OF_INNER = [("backward", "backward"), (AFTER, "full_backward of Tiny"), (AFTER, "full_backward of head")]
OPTIMIZER = ("optimizer", "optimizer")
HOOKS_OF_DDP = [(PRE, f"forward_pre of {DDP}"), (AFTER, f"forward of {DDP}"), (AFTER, f"full_backward of {DDP}")]


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("path", "events", "buckets", "skipped"),
    [
        (
            "call",
            [
                (PRE, f"forward_pre of {DDP}"),
                (FORWARD, DDP),
                *INNER,
                (AFTER, f"forward of {DDP}"),
                ("backward", "backward"),
                (AFTER, f"full_backward of {DDP}"),
                *BACKWARD_OF_INNER[1:],
                OPTIMIZER,
            ],
            ["2600 bytes"],
            [],
        ),
        ("forward", [(FORWARD, DDP), *INNER, *BACKWARD_OF_INNER, OPTIMIZER], ["2600 bytes"], HOOKS_OF_DDP),
        (
            "inner_call",
            [*INNER, *BACKWARD_OF_INNER, OPTIMIZER],
            [],
            [(FORWARD, DDP), *HOOKS_OF_DDP, ("bucket", "reduction of 2 gradients")],
        ),
        (
            "submodules",
            [*FLATTEN_AND_HEAD, ("backward", "backward"), (AFTER, "full_backward of head"), OPTIMIZER],
            [],
            [
                (FORWARD, DDP),
                (FORWARD, "Tiny"),
                (PRE, f"forward_pre of {DDP}"),
                (PRE, "forward_pre of Tiny"),
                (AFTER, f"forward of {DDP}"),
                (AFTER, "forward of Tiny"),
                (AFTER, f"full_backward of {DDP}"),
                (AFTER, "full_backward of Tiny"),
                ("bucket", "reduction of 2 gradients"),
            ],
        ),
    ],
)
def test_the_timeline_holds_what_happened_in_order_and_what_was_gone_past(
    no_group, path, events, buckets, skipped
):
    timeline = run_trial("ddp", path, Tiny, ON).parts["timeline"]
    assert timeline is not None
    assert timeline.step == 2
    assert not timeline.raised
    assert [(event.kind, event.name) for event in timeline.events if event.kind != "bucket"] == events
    assert [event.detail for event in timeline.events if event.kind == "bucket"] == buckets
    assert [(gone.kind, gone.name) for gone in judge_skipped(timeline)] == skipped
    assert_nested(timeline.events)


def assert_nested(events) -> None:
    """Each event lies inside every event that began before it and had not ended; buckets inside the backward."""
    open_until: list[float] = []
    for event in [event for event in events if event.kind != "bucket"]:
        assert 0 <= event.start_us <= event.end_us
        while open_until and open_until[-1] <= event.start_us:
            open_until.pop()
        assert not open_until or event.end_us <= open_until[-1]
        open_until.append(event.end_us)
    (backward,) = [event for event in events if event.kind == "backward"]
    for bucket in [event for event in events if event.kind == "bucket"]:
        assert backward.start_us <= bucket.start_us <= bucket.end_us <= backward.end_us


@pytest.mark.ranks(2)
def test_a_step_that_raises_shows_how_far_it_came(no_group):
    report = run_trial("fsdp2", "forward", Tiny, ON)
    assert report.failure is not None
    timeline = report.parts["timeline"]
    assert timeline is not None
    assert (timeline.step, timeline.raised) == (0, True)
    assert [(event.kind, event.name, event.detail) for event in timeline.events] == [
        (FORWARD, "FSDPTiny", "raised RuntimeError"),
        (PRE, "forward_pre of flatten", "count"),
        (FORWARD, "flatten", "Flatten"),
        (AFTER, "forward of flatten", "count"),
        (PRE, "forward_pre of head", "count"),
        (FORWARD, "head", "Linear, raised RuntimeError"),
    ]
    (gone,) = judge_skipped(timeline)
    assert (gone.kind, gone.owner, gone.name) == (PRE, "wrapped", "forward_pre of FSDPTiny")
    assert "FSDPState._pre_forward" in gone.detail


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("wrapper", "path", "event", "gone"),
    [
        ("compile", "call", (None, "compiled graph 0"), None),
        ("compile", "inner_call", ("inner", "Tiny"), ("forward", "compiled code")),
    ],
)
def test_compiled_code_is_one_span_a_graph_and_is_missed_where_it_did_not_run(
    no_group, wrapper, path, event, gone
):
    timeline = run_trial(wrapper, path, Tiny, ON).parts["timeline"]
    assert timeline is not None
    forwards = [(seen.owner, seen.name) for seen in timeline.events if seen.kind == FORWARD]
    assert event in forwards
    ran_eagerly = ("submodule", "head") in forwards
    assert ran_eagerly == (path == "inner_call")
    skipped = [(skipped.kind, skipped.name) for skipped in judge_skipped(timeline)]
    assert (("forward", "compiled code") in skipped) == (gone is not None)


@pytest.mark.ranks(2)
def test_a_timed_collective_has_its_operation_and_bytes_and_silence_has_none():
    with time_collectives() as seen:
        dist.all_reduce(torch.ones(5))
        dist.broadcast(torch.ones(3, dtype=torch.float64), src=0)
    assert [(one.operation, one.describe()) for one in seen] == [
        ("all_reduce", "20 bytes"),
        ("broadcast", "24 bytes"),
    ]
    assert all(one.begin_ns <= one.end_ns for one in seen)
    with time_collectives() as nothing:
        torch.ones(5).add_(1)
    assert nothing == []


def begin_what_the_other_rank_is_late_for(waited, late_seconds):
    """Time an all-reduce that rank 1 joins only once rank 0 waits for its end, or has given up."""
    store: Any = dist.distributed_c10d._get_default_store()
    work: Any = None
    seen = []

    def wait(seconds):
        waited.append(seconds)
        store.set("waiting", "yes")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "LATE_SECONDS", late_seconds)
        if dist.get_rank() == 0:
            patch.setattr(collectives.time, "sleep", wait)
            with time_collectives() as seen:
                work = dist.all_reduce(torch.ones(5), async_op=True)
            still_on = torch.autograd.profiler._is_profiler_enabled
            store.set("waiting", "yes")
        else:
            store.wait(["waiting"])
            work, still_on = dist.all_reduce(torch.ones(5), async_op=True), False
        work.wait()
    return seen, still_on


@pytest.mark.ranks(2)
def test_a_profile_is_not_stopped_before_gloos_thread_wrote_the_end_into_it():
    """It was: the write went into freed memory, and one run of the truth table in twenty died of it under load."""
    waited = []
    seen, still_on = begin_what_the_other_rank_is_late_for(waited, late_seconds=60.0)
    assert not still_on
    if dist.get_rank() == 0:
        assert waited
        assert [one.operation for one in seen] == ["all_reduce"]


@pytest.mark.ranks(2)
def test_a_profile_goes_on_where_a_collective_does_not_end():
    seen, still_on = begin_what_the_other_rank_is_late_for([], late_seconds=0.0)
    assert still_on == (dist.get_rank() == 0)
    assert seen == []
    if still_on:
        while not collectives._wait_for_gloo(0):
            pass
        torch.autograd._disable_profiler()
        torch.autograd.profiler._is_profiler_enabled = False


@pytest.mark.ranks(2)
def test_two_profiles_at_once_do_not_meet():
    with torch.autograd.profiler.profile(), time_collectives() as seen:
        dist.all_reduce(torch.ones(5))
    assert seen == []


def measure_distances(rank, drift: float, sharded: tuple[str, ...] = ()) -> tuple[list[Any], list[float]]:
    """Let rank 1 drift by a known amount a step; returns what the probe says and what is true."""
    torch.manual_seed(0)
    model, group = nn.Linear(3, 2), cast("Any", dist.new_group())
    frozen = nn.Parameter(torch.ones(4), requires_grad=False)
    model.register_parameter("frozen", frozen)
    true = []
    with torch.no_grad(), observe_replicas(model, group, sharded) as observer:
        for step in range(4):
            if rank.rank == 1:
                model.weight += drift
                frozen += 1
            observer.end_step(step)
            flat = torch.cat([model.weight.flatten(), model.bias]).double()
            gathered: list[Any] = [None, None]
            dist.all_gather_object(gathered, flat)
            true.append(((flat - gathered[0]).norm() / gathered[0].norm()).item())
        measured = observer.distances()
    del model, observer
    gc.collect()
    return measured, true


@pytest.mark.ranks(2)
@pytest.mark.parametrize("buffer_bytes", [replicas.BUFFER_BYTES, 1])
def test_the_distance_to_rank_0_is_the_true_one_however_it_is_sent(rank, monkeypatch, buffer_bytes):
    monkeypatch.setattr(replicas, "BUFFER_BYTES", buffer_bytes)
    measured, true = measure_distances(rank, 0.5)
    assert measured == pytest.approx(true, rel=1e-5)
    assert (min(true) > 0.1) == (rank.rank == 1)


@pytest.mark.ranks(2)
def test_equal_trainable_parameters_are_at_distance_0_though_frozen_ones_differ(rank):
    measured, _ = measure_distances(rank, 0.0)
    assert measured == [0.0] * 4


@pytest.mark.ranks(2)
def test_no_distance_is_told_where_a_rank_holds_shards(rank):
    measured, _ = measure_distances(rank, 0.5, sharded=("weight",))
    assert measured == [None] * 4
