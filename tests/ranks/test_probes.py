"""Each probe on the path that must trip it and on the path that must not, on real ranks."""

import gc
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ddpcall.lab.models import Mlp
from ddpcall.lab.world import Accelerator, World, process_group
from ddpcall.paths import Batch, CallPath, invoke
from ddpcall.probes.compiled import observe_compiled
from ddpcall.probes.gradients import observe_gradients
from ddpcall.probes.reducer import observe_reducer
from ddpcall.probes.replicas import observe_replicas
from ddpcall.pytest_plugin import assert_same_on_all_ranks
from ddpcall.wrappers import apply_wrapper

CPU = torch.device("cpu")


def make_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(8, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator))


def new_group() -> Any:
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=60))


def make_subject(wrapper: str):
    torch.manual_seed(0)
    return apply_wrapper(wrapper, Mlp(), device=CPU)


def measure_gradients(path: CallPath, same_batch: bool):
    group = new_group()
    subject = make_subject("ddp")
    batch = make_batch(0 if same_batch else dist.get_rank())
    with observe_gradients(subject.inner, group) as observer:
        for _ in range(3):
            subject.inner.zero_grad()
            invoke(path, subject.wrapped, subject.inner, batch, F.cross_entropy).backward()
            observer.end_backward(batch)
        evidence = observer.evidence()
    own = [parameter.grad.clone() for parameter in subject.inner.parameters() if parameter.grad is not None]
    del subject
    gc.collect()
    return evidence, own


@pytest.mark.ranks(2)
def test_the_gradients_probe_measures_the_true_difference_of_local_gradients():
    evidence, own = measure_gradients(CallPath.INNER_CALL, same_batch=False)
    assert_same_on_all_ranks(evidence)
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, own)
    true = max((a - b).abs().max().item() for a, b in zip(*gathered, strict=True))
    assert evidence.max_difference == pytest.approx([true] * 3)
    assert set(evidence.parameters) == {name for name, _ in Mlp().named_parameters()}
    assert evidence.batches_differ


@pytest.mark.ranks(2)
def test_the_gradients_probe_is_silent_on_synchronized_ones():
    evidence, _ = measure_gradients(CallPath.CALL, same_batch=False)
    assert evidence.max_difference == (0.0, 0.0, 0.0)
    assert min(evidence.max_magnitude) > 0
    assert evidence.parameters == {}


@pytest.mark.ranks(2)
def test_equal_batches_are_reported_since_equality_then_proves_nothing():
    evidence, _ = measure_gradients(CallPath.INNER_CALL, same_batch=True)
    assert evidence.max_difference == (0.0, 0.0, 0.0)
    assert not evidence.batches_differ


@pytest.mark.ranks(2)
def test_a_gradient_that_only_one_rank_has_is_a_difference(rank):
    model = nn.Linear(2, 1)
    if rank.rank == 1:
        model(torch.ones(1, 2)).sum().backward()
    with observe_gradients(model, new_group()) as observer:
        observer.end_backward(Batch(torch.ones(1) * rank.rank, torch.ones(1)))
        evidence = observer.evidence()
    assert evidence.parameters == {"weight": 1.0, "bias": 1.0}
    expected = ((0, ("weight", "bias")), (2, ()))
    assert (evidence.with_gradient, evidence.without_gradient) == expected[rank.rank]


def measure_reducer(wrapper: str, path: CallPath, no_sync: bool):
    subject = make_subject(wrapper)
    batch = make_batch(dist.get_rank())
    before = {name: dict(module.__dict__) for name, module in subject.wrapped.named_modules()}
    with observe_reducer(subject) as observer:
        for _ in range(2):
            if no_sync:
                wrapped: Any = subject.wrapped
                with wrapped.no_sync():
                    loss = invoke(path, subject.wrapped, subject.inner, batch, F.cross_entropy)
            else:
                loss = invoke(path, subject.wrapped, subject.inner, batch, F.cross_entropy)
            loss.backward()
            observer.end_backward(None)
        evidence = observer.evidence()
    left = [
        name for name, module in subject.wrapped.named_modules() if module.__dict__.keys() != before[name].keys()
    ]
    left += [name for name, p in subject.inner.named_parameters() if p._post_accumulate_grad_hooks]
    del subject, observer
    gc.collect()
    return evidence, left


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("wrapper", "path", "no_sync", "armings", "armed", "unarmed"),
    [
        ("ddp", CallPath.CALL, False, (1, 1), (6, 6), (0, 0)),
        ("ddp", CallPath.FORWARD, False, (1, 1), (6, 6), (0, 0)),
        ("ddp", CallPath.CALL, True, (0, 0), (0, 0), (6, 6)),
        ("ddp", CallPath.INNER_CALL, False, (0, 0), (0, 0), (6, 6)),
        ("ddp", CallPath.FUNCTIONAL, False, (0, 0), (0, 0), (6, 6)),
        ("replicate", CallPath.CALL, False, (1, 1), (6, 6), (0, 0)),
        ("replicate", CallPath.FORWARD, False, (0, 0), (0, 0), (6, 6)),
    ],
)
def test_the_reducer_probe_tells_armed_from_unarmed_arrivals(wrapper, path, no_sync, armings, armed, unarmed):
    evidence, left = measure_reducer(wrapper, path, no_sync)
    assert (evidence.armings, evidence.arrivals_armed, evidence.arrivals_unarmed) == (armings, armed, unarmed)
    assert left == []


def measure_replicas(touch: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with observe_replicas(model, new_group()) as observer:
        for step in range(3):
            if step == 1 and dist.get_rank() == 1:
                with torch.no_grad():
                    dict(model.named_parameters(), **dict(model.named_buffers()))[touch].flatten()[0] += 1
            observer.end_step(step)
        return observer.evidence()


@pytest.mark.ranks(2)
def test_the_replicas_probe_names_the_step_and_the_parameter_that_parted():
    evidence = measure_replicas("0.weight")
    assert_same_on_all_ranks(evidence)
    assert (evidence.first_step_parameters, evidence.parameters) == (1, ("0.weight",))
    assert (evidence.first_step_buffers, evidence.buffers) == (None, ())


@pytest.mark.ranks(2)
def test_the_replicas_probe_tells_buffers_from_parameters():
    evidence = measure_replicas("1.running_mean")
    assert (evidence.first_step_parameters, evidence.parameters) == (None, ())
    assert (evidence.first_step_buffers, evidence.buffers) == (1, ("1.running_mean",))


def measure_compiled(path: CallPath):
    model = Mlp()
    with observe_compiled(True, "eager") as observer:
        subject = apply_wrapper("compile", model, device=CPU, compile_backend=observer.backend)
        for _ in range(2):
            invoke(path, subject.wrapped, subject.inner, make_batch(0), F.cross_entropy)
            observer.end_backward(None)
    return observer.evidence()


@pytest.mark.parametrize(
    ("path", "frames", "calls"), [(CallPath.CALL, 1, (2, 0)), (CallPath.INNER_CALL, 0, (0, 2))]
)
def test_the_compiled_probe_counts_compiled_and_eager_calls(path, frames, calls):
    evidence = measure_compiled(path)
    assert (evidence.frames > 0, evidence.calls_compiled, evidence.calls_eager) == (bool(frames), *calls)


@pytest.mark.ranks(1)
def test_a_trials_process_group_is_gone_afterwards():
    dist.destroy_process_group()
    for trial in range(2):
        with process_group(World(0, 1), Accelerator(CPU, "gloo"), f"trial{trial}", 30):
            subject = make_subject("ddp")
            subject.wrapped(torch.zeros(2, 8, 8)).sum().backward()
            del subject
        assert not dist.is_initialized()
