"""Asserts about the whole world: all ranks fail together; the message says who differs, where and by how much."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ddpcall.pytest_plugin import (
    assert_gradients_averaged,
    assert_gradients_synchronized,
    assert_hooks_fire,
    assert_replicated,
    assert_same_on_all_ranks,
)

pytestmark = pytest.mark.ranks(2)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 4)
        self.second = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.second(self.first(x))

    def compute_loss(self, x):
        return self(x).sum()

    def past_the_hooks(self, x):
        return self.second.forward(self.first(x))


@pytest.fixture
def model(rank):
    return DistributedDataParallel(Net())


@pytest.fixture
def batch(rank):
    return torch.full((2, 3), float(rank.rank + 1))


def all_fail(assertion, *args, match):
    """Check that the assertion fails here, and that the other rank is at the same place."""
    with pytest.raises(AssertionError, match=match):
        assertion(*args)
    dist.barrier()


def test_call_synchronizes_gradients(model, batch):
    model(batch).sum().backward()
    assert_gradients_synchronized(model)


@pytest.mark.parametrize("path", ["inner_call", "inner_forward", "inner_method"])
def test_bypasses_leave_gradients_local(model, batch, path):
    inner = model.module
    run = {"inner_call": inner, "inner_forward": inner.forward, "inner_method": inner.compute_loss}[path]
    run(batch).sum().backward()
    all_fail(
        assert_gradients_synchronized, model, match=r"rank 1: module\.first\.weight differs from rank 0 by up to"
    )


def test_gradients_must_exist(model):
    all_fail(assert_gradients_synchronized, model, match=r"no parameter has a gradient on ranks 0, 1")


def test_a_gradient_on_one_rank_only_is_found(rank, model):
    if rank.rank == 1:
        model.module.first.weight.grad = torch.zeros(4, 3)
        model.module.first.bias.grad = torch.zeros(4)
    else:
        model.module.first.bias.grad = torch.zeros(4)
    all_fail(
        assert_gradients_synchronized, model, match=r"(?s)rank 1: module\.first\.weight is tensor.*rank 0 has None"
    )


def make_step(model, batch, reduce=lambda parameter: None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(call):
        # Squared, so that a rank's gradients are not a multiple of another's.
        (call(batch).square().sum() + call(batch**2).sum()).backward()
        for parameter in model.parameters():
            reduce(parameter)
        optimizer.step()

    return optimizer, step


def test_a_step_that_uses_the_mean_passes(model, rank):
    optimizer, step = make_step(model, torch.randn(2, 3) + rank.rank * torch.randn(2, 3))
    with assert_gradients_averaged(model, optimizer) as mixing:
        step(model.forward)
    assert mixing.shape == "averaged"


MATRIX = r"(?s)not every rank used the mean of all ranks' gradients.*{}.*rank 0 +rank 1\n *rank 0 +{}"


@pytest.mark.parametrize(
    ("shape", "entries", "reduce"),
    [
        ("local", r"1\.0000 +0\.0000", lambda parameter: None),
        ("summed", r"1\.0000 +1\.0000", lambda parameter: dist.all_reduce(parameter.grad)),
    ],
)
def test_a_step_that_uses_something_else_fails_on_all_ranks_and_shows_the_matrix(rank, shape, entries, reduce):
    model = Net()
    optimizer, step = make_step(model, torch.randn(2, 3) + rank.rank * torch.randn(2, 3), reduce)
    with pytest.raises(AssertionError, match=MATRIX.format(shape, entries)):  # noqa: SIM117
        with assert_gradients_averaged(model, optimizer):
            step(model)
    dist.barrier()


def test_a_step_on_equal_batches_proves_nothing(model):
    optimizer, step = make_step(model, torch.ones(2, 3))
    with pytest.raises(AssertionError, match="give each rank its own batch"):  # noqa: SIM117
        with assert_gradients_averaged(model, optimizer):
            step(model)


@pytest.mark.ranks(4)
def test_a_step_in_groups_that_never_meet_fails(rank):
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = DistributedDataParallel(Net(), process_group=groups[rank.rank // 2])
    optimizer, step = make_step(model, torch.randn(2, 3) + rank.rank * torch.randn(2, 3))
    with pytest.raises(AssertionError, match=r"groups that never meet.*\{0, 1\}, \{2, 3\}"):  # noqa: SIM117
        with assert_gradients_averaged(model, optimizer):
            step(model)


def test_fresh_ddp_is_replicated(model):
    assert_replicated(model)
    assert_replicated(model, buffers=True)


def test_one_changed_bit_is_found_and_measured(rank, model):
    if rank.rank == 1:
        with torch.no_grad():
            model.module.second.bias += 0.5
    all_fail(
        assert_replicated,
        model,
        match=r"(?s)\(1 of 4\).*rank 1: module\.second\.bias differs from rank 0 by up to 0\.5 in 1 of 1 values",
    )


def test_missing_parameters_are_named(rank, model):
    if rank.rank == 1:
        del model.module.second.bias
    all_fail(assert_replicated, model, match="second.bias")


def test_buffers_are_compared_on_request(rank):
    norm = torch.nn.BatchNorm1d(3)
    norm(torch.randn(4, 3) + rank.rank)
    assert_replicated(norm)
    with pytest.raises(AssertionError, match="running_mean"):
        assert_replicated(norm, buffers=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64])
def test_any_dtype_can_be_compared(dtype):
    assert_same_on_all_ranks(torch.ones(3, dtype=dtype))


def test_equal_values_pass():
    assert_same_on_all_ranks({"loss": 1.5, "names": ["a", "b"], "nan": float("nan"), "t": torch.eye(2)})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda rank: float(rank), r"rank 1: value is 1\.0, rank 0 has 0\.0 \(off by 1\)"),
        (lambda rank: {"a": [1, 2 + rank]}, r"rank 1: value\['a'\]\[1\] is 3, rank 0 has 2 \(off by 1\)"),
        (
            lambda rank: torch.zeros(2 + rank),
            r"rank 1: value has shape \(3,\) torch.float32, rank 0 has shape \(2,\)",
        ),
        (lambda rank: torch.full((4,), 2.0 * rank), r"rank 1: value differs from rank 0 by up to 2 in 4 of 4"),
        (lambda rank: "x" if rank else None, r"rank 1: value is 'x', rank 0 has None"),
        (lambda rank: {"a": 1} if rank else {"b": 1}, r"rank 1: value is \{'a': 1\}, rank 0 has \{'b': 1\}"),
    ],
)
def test_differing_values_are_explained(rank, make, match):
    all_fail(assert_same_on_all_ranks, make(rank.rank), match=match)


def test_an_unpicklable_value_on_one_rank_fails_on_all(rank):
    value = (lambda: None) if rank.rank == 1 else 1
    with pytest.raises(TypeError, match="rank 1:"):
        assert_same_on_all_ranks(value)
    rank.barrier()


def test_hooks_fire_on_call(model, batch):
    assert assert_hooks_fire(model, model, batch).shape == (2, 1)


@pytest.mark.parametrize("path", ["forward", "inner_call", "inner_forward", "inner_method"])
def test_hooks_stay_silent_on_bypasses(model, batch, path):
    inner = model.module
    run = {
        "forward": model.forward,
        "inner_call": inner,
        "inner_forward": inner.forward,
        "inner_method": inner.compute_loss,
    }[path]
    all_fail(assert_hooks_fire, model, run, batch, match=r"rank 0: DistributedDataParallel \(the model itself\)")


def test_a_silent_submodule_is_named(model, batch):
    all_fail(assert_hooks_fire, model.module, model.module.past_the_hooks, batch, match="rank 1: second")


def test_running_nothing_is_no_success(model):
    all_fail(assert_hooks_fire, model, dict, match="no forward ran")


def test_observing_hooks_is_undone(model, batch):
    before = [(dict(vars(module)), len(module._forward_pre_hooks)) for module in model.modules()]
    with pytest.raises(ZeroDivisionError):
        assert_hooks_fire(model, lambda: 1 / 0)
    after = [(dict(vars(module)), len(module._forward_pre_hooks)) for module in model.modules()]
    assert [count for _, count in before] == [count for _, count in after]
    assert [list(attributes) for attributes, _ in before] == [list(attributes) for attributes, _ in after]
