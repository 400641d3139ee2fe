"""The mixing matrix of sharded models: fully_shard, hybrids, FSDP1, tensor parallelism."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from ddpcall.sketch import sketch
from tests.ranks.mixing_models import BLOCKS, columns, compute_loss, expect, make_batch, make_model, measure

pytestmark = pytest.mark.ranks(4)


def shard(model, **kwargs):
    """Shard every layer and the rest; widths that four ranks do not divide evenly too."""
    kwargs.setdefault("mesh", init_device_mesh("cpu", (dist.get_world_size(),)))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **kwargs)
    return fully_shard(model, **kwargs)


def step_of(model, optimizer, rank, micro_batches=1, before=lambda model, index: None):
    def step(number):
        optimizer.zero_grad()
        for index in range(micro_batches):
            before(model, index)
            compute_loss(model, make_batch(rank.rank + 10 * index + 100 * number)).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("width", [32, 13])
def test_fully_shard_uses_the_mean(rank, width):
    model = shard(make_model(width))
    optimizer = torch.optim.AdamW(model.parameters())
    expect(measure(model, optimizer, step_of(model, optimizer, rank)), "averaged", 0.25, columns(4, 0))


def test_fully_shard_is_measured_in_a_later_step_too(rank):
    model = shard(make_model())
    optimizer = torch.optim.AdamW(model.parameters())
    step = step_of(model, optimizer, rank)
    step(0)
    expect(measure(model, optimizer, step, num_steps=2), "averaged", 0.25, columns(4, 0))
    step(3)


def test_micro_batches_of_fully_shard_without_synchronization_until_the_last(rank):
    model = shard(make_model())
    optimizer = torch.optim.AdamW(model.parameters())
    step = step_of(model, optimizer, rank, 3, lambda m, index: m.set_requires_gradient_sync(index == 2))
    expect(measure(model, optimizer, step), "averaged", 0.25, columns(4, 0))


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_last_micro_batch_without_synchronization_is_late(rank, num_steps):
    model = shard(make_model())
    optimizer = torch.optim.AdamW(model.parameters())
    step = step_of(model, optimizer, rank, 2, lambda m, index: m.set_requires_gradient_sync(index == 0))
    mixing = measure(model, optimizer, step, num_steps)
    row = [0.25] * 4 + [0] * 4
    if num_steps == 1:
        expect(mixing, "late", row, columns(4, 0, 1))
    else:
        # Of the step before, the last micro-batch arrives now; of this step, the first alone.
        expect(mixing, "late", [0] * 4 + [0.25] * 8 + [0] * 4, columns(4, -2, -1, 0, 1))


def test_late_gradients_are_seen_in_one_step_of_a_running_training(rank):
    model = shard(make_model())
    optimizer = torch.optim.AdamW(model.parameters())
    step = step_of(model, optimizer, rank, 2, lambda m, index: m.set_requires_gradient_sync(index == 0))
    step(0)
    step(1)
    expect(measure(model, optimizer, step), "late")


def test_synchronization_off_for_good_throws_gradients_away(rank):
    model = shard(make_model())
    optimizer = torch.optim.AdamW(model.parameters())
    model.set_requires_gradient_sync(False)
    expect(measure(model, optimizer, step_of(model, optimizer, rank)), "thrown_away")


def test_a_divide_factor_of_one_sums(rank):
    model = shard(make_model())
    for layer in model.modules():
        if hasattr(layer, "set_gradient_divide_factor"):
            layer.set_gradient_divide_factor(1.0)
            layer.set_force_sum_reduction_for_comms(True)  # gloo knows no other way
    optimizer = torch.optim.AdamW(model.parameters())
    expect(measure(model, optimizer, step_of(model, optimizer, rank)), "summed", 1.0)


def test_hybrid_sharding_averages_over_both_dims(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard(make_model(), mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    expect(measure(model, optimizer, step_of(model, optimizer, rank, 2)), "averaged", 0.25, columns(4, 0))


def test_sharding_over_the_inner_dim_alone_makes_groups(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard(make_model(), mesh=mesh["shard"])
    optimizer = torch.optim.AdamW(model.parameters())
    expect(measure(model, optimizer, step_of(model, optimizer, rank)), "groups", BLOCKS)


def test_a_hybrid_without_its_last_reduction_throws_gradients_away(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard(make_model(), mesh=mesh)
    model.set_requires_all_reduce(False)
    optimizer = torch.optim.AdamW(model.parameters())
    expect(measure(model, optimizer, step_of(model, optimizer, rank)), "thrown_away")


@pytest.mark.parametrize(
    ("policy", "residual"),
    [
        (MixedPrecisionPolicy(reduce_dtype=torch.bfloat16), 2e-2),
        (MixedPrecisionPolicy(reduce_dtype=torch.float16), 6e-3),
        (MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32), 1e-6),
    ],
    ids=["bf16 reduction", "fp16 reduction", "bf16 parameters"],
)
def test_fully_shard_with_mixed_precision(rank, policy, residual):
    model = shard(make_model(), mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters())
    mixing = measure(model, optimizer, step_of(model, optimizer, rank))
    expect(mixing, "averaged", 0.25, residual=residual, atol=residual)


FSDP1 = {
    "full": {},
    "shard grad op": {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP},
    "no shard": {"sharding_strategy": ShardingStrategy.NO_SHARD},
    "bf16": {"mixed_precision": MixedPrecision(torch.bfloat16, torch.float32)},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("options", list(FSDP1))
def test_fsdp1_uses_the_mean(rank, use_orig_params, options):
    model = FullyShardedDataParallel(
        make_model(13),
        auto_wrap_policy=ModuleWrapPolicy([nn.Linear]),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
        **FSDP1[options],
    )
    optimizer = torch.optim.AdamW(model.parameters())
    # Without shards the second backward's gradient already holds the reduced first one.
    micro_batches = 1 if options == "no shard" else 2
    mixing = measure(model, optimizer, step_of(model, optimizer, rank, micro_batches), 2)
    expect(mixing, "averaged", 0.25, columns(4, 0), atol=1e-3)
    assert sum(map(len, mixing.by_parameter.values())) == 6


@pytest.mark.filterwarnings("ignore")
def test_fsdp1_without_sync_until_the_last(rank):
    model = FullyShardedDataParallel(make_model(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters())

    def step(number):
        with model.no_sync():
            compute_loss(model, make_batch(rank.rank)).backward()
        compute_loss(model, make_batch(rank.rank + 10)).backward()
        optimizer.step()

    expect(measure(model, optimizer, step), "averaged", 0.25, columns(4, 0))


def test_composable_replicate_uses_the_mean(rank):
    from torch.distributed._composable.replicate import replicate

    model = replicate(make_model())
    optimizer = torch.optim.AdamW(model.parameters())
    expect(measure(model, optimizer, step_of(model, optimizer, rank)), "averaged", 0.25, columns(4, 0))


def parallelize(model, mesh):
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def make_two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 4))


@pytest.mark.parametrize("is_averaged", [True, False])
def test_tensor_parallel_replicas_beside_data_parallelism(rank, is_averaged):
    """Two replicas of two ranks each, their gradients averaged by hand over the data-parallel dim, or not."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize(make_two_layers(), mesh["tp"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(number):
        compute_loss(model, make_batch(mesh["dp"].get_local_rank())).backward()
        for parameter in model.parameters() if is_averaged else ():
            gradient: Any = parameter.grad
            gradient = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            dist.all_reduce(gradient, group=mesh["dp"].get_group())
            gradient /= 2
        optimizer.step()

    mixing = measure(model, optimizer, step)
    # The two ranks of a replica compute one gradient together, so each has half of its weight.
    expect(mixing, "averaged" if is_averaged else "local", 0.25 if is_averaged else BLOCKS)


def test_tensor_parallelism_alone_has_nothing_to_mix(rank):
    model = parallelize(make_two_layers(), init_device_mesh("cpu", (4,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mixing = measure(model, optimizer, step_of(model, optimizer, rank=type(rank)(0, 4, rank.device)))
    expect(mixing, "unidentifiable")


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_fully_shard_over_tensor_parallelism(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = shard(parallelize(make_two_layers(), mesh["tp"]), mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters())

    def step(number):
        compute_loss(model, make_batch(mesh["dp"].get_local_rank())).backward()
        optimizer.step()

    expect(measure(model, optimizer, step), "averaged", 0.25)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        return self.head(self.norm(x))


def test_partial_gradients_of_sequence_parallel_norms_are_summed(rank):
    """Each rank computes a part of one loss, and the optimizer adds the parts up: 1 everywhere is right."""
    mesh = init_device_mesh("cpu", (4,))
    model: Any = parallelize_module(Normed(), mesh, {"norm": SequenceParallel()})
    optimizer = torch.optim.SGD(model.norm.parameters(), lr=0.1)

    def step(number):
        x = DTensor.from_local(make_batch(rank.rank).reshape(1, 8, 16), mesh, [Shard(1)])
        model.norm(x).to_local().square().mul(1 + torch.arange(16)).sum().backward()
        optimizer.step()

    mixing = measure(model, optimizer, step)
    expect(mixing, "summed", 1.0)
    assert "one loss is spread over the ranks" in mixing.explain()


def test_a_strided_shard_is_put_where_it_lies(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = shard(parallelize(make_two_layers(), mesh["tp"]), mesh=mesh["dp"])
    weight = model[0].weight
    assert [type(placement).__name__ for placement in weight.placements] == ["_StridedShard", "Shard"]
    parts = [torch.zeros(64, dtype=torch.float64) for _ in range(4)]
    dist.all_gather(parts, sketch(weight, "weight"))
    torch.testing.assert_close(sum(parts), sketch(weight.full_tensor(), "weight"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(10, 7), (5, 9, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("placements", [(0, 0), (0, 1), (1, 0), (1, 1), (-1, 0), (None, 1)], ids=str)
def test_sketches_of_dtensors_add_up_over_their_shards(rank, shape, placements):
    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    placed = [Replicate() if dim is None else Shard(dim) for dim in placements]
    part = sketch(distribute_tensor(whole, mesh, placed), "weight")
    if placements[0] is None and mesh.get_local_rank(0):
        part.zero_()
    parts = [torch.zeros(64, dtype=torch.float64) for _ in range(4)]
    dist.all_gather(parts, part)
    torch.testing.assert_close(sum(parts), sketch(whole, "weight"), rtol=1e-6, atol=1e-6)
