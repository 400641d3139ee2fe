"""The mixing matrix on real ranks: what each of many ways to reduce gradients measures as."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddpcall
from ddpcall.mixing import MixingCollector, RankSketches, exchange_records, judge_records
from tests.ranks.mixing_models import BLOCKS, columns, compute_loss, expect, make_batch, make_model, reduce_by_hand

pytestmark = pytest.mark.ranks(4)


def test_ddp_uses_the_mean_of_all_ranks(rank):
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.AdamW(model.parameters())
    with ddpcall.measure_mixing(model, optimizer) as mixing:
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.step()
    expect(mixing, "averaged", 0.25)
    assert mixing.scale == pytest.approx(1, abs=1e-6)
    assert mixing.columns == ((0, 0), (1, 0), (2, 0), (3, 0))
    assert list(mixing.by_parameter) == ["averaged"]
    assert len(mixing.by_parameter["averaged"]) == 6


def test_a_bypass_is_local(rank):
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.AdamW(model.parameters())
    with ddpcall.measure_mixing(model, optimizer) as mixing:
        compute_loss(model.module, make_batch(rank.rank)).backward()
        optimizer.step()
    expect(mixing, "local", np.eye(4))
    assert "write model(x)" in mixing.explain()
    assert "differ after it" in mixing.explain()


def test_a_sum_is_told_from_a_mean(rank):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ddpcall.measure_mixing(model, optimizer) as mixing:
        compute_loss(model, make_batch(rank.rank)).backward()
        reduce_by_hand(model, divide=False)
        optimizer.step()
    expect(mixing, "summed", 1.0)
    assert mixing.scale == pytest.approx(4, abs=1e-5)


def test_pairs_that_never_meet_are_groups(rank):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with ddpcall.measure_mixing(model, optimizer) as mixing:
        compute_loss(model, make_batch(rank.rank)).backward()
        reduce_by_hand(model, groups[rank.rank // 2])
        optimizer.step()
    expect(mixing, "groups", BLOCKS)
    assert "{0, 1}, {2, 3}" in mixing.reason


def test_a_rank_whose_gradient_is_lost_is_dropped(rank):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ddpcall.measure_mixing(model, optimizer) as mixing:
        compute_loss(model, make_batch(rank.rank)).backward()
        if rank.rank == 2:
            model.zero_grad(set_to_none=False)
        reduce_by_hand(model)
        optimizer.step()
    expect(mixing, "dropped", [0.25, 0.25, 0, 0.25])
    assert "rank 2" in mixing.reason


def test_clipping_by_each_ranks_own_norm_weights_the_ranks(rank):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ddpcall.measure_mixing(model, optimizer) as mixing:
        (compute_loss(model, make_batch(rank.rank)) * (1 + rank.rank)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        reduce_by_hand(model)
        optimizer.step()
    norms = [torch.zeros(()) for _ in range(4)]
    dist.all_gather(norms, norm)
    expect(mixing, "weighted", [0.1 / float(norm) / 4 for norm in norms])


def test_clipping_the_mean_scales_it(rank):
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.AdamW(model.parameters())
    with ddpcall.measure_mixing(model, optimizer) as mixing:
        compute_loss(model, make_batch(rank.rank)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    expect(mixing, "scaled", 0.1 / float(norm) / 4)


@pytest.mark.parametrize(
    ("unsynced", "shape", "matrix"),
    [
        ((0, 1), "averaged", np.full((4, 4), 0.25)),
        ((1,), "averaged", np.full((4, 4), 0.25)),
        ((2,), "partly_local", np.hstack([np.full((4, 4), 0.25), np.eye(4)])),
        ((0, 1, 2), "local", np.eye(4)),
    ],
    ids=["sync last", "a middle one local", "last local", "none synced"],
)
def test_accumulation_over_three_backwards(rank, unsynced, shape, matrix):
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.AdamW(model.parameters())
    with ddpcall.measure_mixing(model, optimizer) as mixing:
        for index in range(3):
            with model.no_sync() if index in unsynced else nullcontext():
                compute_loss(model, make_batch(rank.rank + 10 * index)).backward()
        optimizer.step()
    expect(mixing, shape, matrix)
    assert mixing.columns == (columns(4, 0) if matrix.shape[1] == 4 else columns(4, 0, 2))


def test_the_same_batch_everywhere_tells_nothing(rank):
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.AdamW(model.parameters())
    with ddpcall.measure_mixing(model, optimizer) as mixing:
        compute_loss(model, make_batch(0)).backward()
        optimizer.step()
    expect(mixing, "unidentifiable")
    assert "same gradient" in mixing.reason


def test_everything_is_undone_also_after_an_exception(rank):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    before = dict(vars(optimizer))

    def step_and_raise():
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.step()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), ddpcall.measure_mixing(model, optimizer):
        step_and_raise()
    # An empty dict of hooks still sends every backward into Python.
    assert all(parameter._backward_hooks is None for parameter in model.parameters())
    assert vars(optimizer) == before
    assert not optimizer._optimizer_step_pre_hooks
    assert torch.amp.GradScaler.step.__module__ == "torch.amp.grad_scaler"


def test_a_collector_gives_a_record_a_step(rank):
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    collector = MixingCollector.of_model(model, optimizer)
    collector.start()
    shapes = []
    for call in (model, model.module, model):
        optimizer.zero_grad()
        compute_loss(call, make_batch(rank.rank)).backward()
        optimizer.step()
        records = exchange_records(collector.take().to_bytes(), 60)
        shapes.append(judge_records([RankSketches.from_bytes(data) for data in records]).shape)
    collector.stop()
    assert shapes == ["averaged", "local", "averaged"]
    assert collector.take().num_steps == 0


def test_a_measurement_can_be_written_and_read(rank):
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with ddpcall.measure_mixing(model, optimizer) as mixing:
        compute_loss(model, make_batch(rank.rank)).backward()
        optimizer.step()
    plain = json.loads(json.dumps(mixing.to_json()))
    assert plain["shape"] == "averaged"
    np.testing.assert_allclose(plain["matrix"], 0.25, atol=1e-5)
    assert plain["columns"] == [[0, 0], [1, 0], [2, 0], [3, 0]]


def test_no_step_in_the_block_is_refused(rank):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    expected = r"the block must hold the backward and the optimizer\.step\(\)"
    with pytest.raises(RuntimeError, match=expected), ddpcall.measure_mixing(model, optimizer):
        compute_loss(model, make_batch(rank.rank)).backward()


def test_another_models_optimizer_is_refused(rank):
    optimizer = torch.optim.AdamW(nn.Linear(2, 3).parameters())
    expected = "holds none of the model's parameters"
    with pytest.raises(ValueError, match=expected), ddpcall.measure_mixing(make_model(), optimizer):
        pass


@pytest.mark.ranks(1)
@pytest.mark.parametrize("what", ["model", "optimizer"])
def test_what_is_no_model_or_optimizer_is_refused(rank, what):
    given = {"model": make_model(), "optimizer": [torch.optim.SGD(make_model().parameters())]}
    given[what] = None if what == "model" else [None]
    with pytest.raises(
        TypeError, match="needs the model, wrapped or inner, and the torch optimizer that steps it"
    ):
        ddpcall.measure_mixing(**given).__enter__()


@pytest.mark.ranks(1)
def test_one_rank_is_refused(rank):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    with (
        pytest.raises(RuntimeError, match="torchrun --nproc-per-node 2"),
        ddpcall.measure_mixing(model, optimizer),
    ):
        pass
