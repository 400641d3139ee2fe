"""Sketches: linear, the same for shards as for the whole, and no change of a tensor goes unseen."""

import math

import numpy as np
import pytest
import torch

from ddpcall.sketch import NUM_BUCKETS, TILE, CannotSketch, Piece, SketchQueue, _Accumulator, _add_box, sketch

SHAPES = [(), (1,), (7,), (300, 40), (3, 5, 7, 2), (TILE,), (TILE + 1,), (3, TILE - 5), (20, TILE)]


def distance(a, b):
    return float((a - b).norm() / b.norm())


def make(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sketch_is_linear(shape):
    x, y = make(shape, 1), make(shape, 2)
    mixed = sketch(0.25 * x - 3 * y, "weight")
    assert distance(mixed, 0.25 * sketch(x, "weight") - 3 * sketch(y, "weight")) < 3e-7


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_counts_at_its_global_index(shape):
    x = make(shape, 3)
    slow = _Accumulator("weight", x.double())
    slow.add_at(x.double().reshape(-1), torch.arange(x.numel()))
    assert distance(sketch(x, "weight"), slow.finish()) < 2e-7


def test_sketches_that_are_made_together_are_those_made_alone():
    queue = SketchQueue()
    shapes = [
        (),
        (7,),
        (300, 40),
        (64, 128),
        (0,),
        (3, 5),
    ] * 40  # some lie in two tiles, more than a block of rows
    tensors = [make(shape, seed) for seed, shape in enumerate(shapes)]
    tensors += [make((20, 30)).t(), make((9, 9), dtype=torch.bfloat16), make((9, 9), dtype=torch.float64)]
    alone = [sketch(tensor, f"layer{index}") for index, tensor in enumerate(tensors)]
    together = [queue.add(tensor, f"layer{index}") for index, tensor in enumerate(tensors)]
    for tensor in tensors:
        tensor.zero_()  # as a reduction in place changes a gradient once a hook has seen it
    queue.flush()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_same_call_gives_the_same_bits_and_names_give_others():
    x = make((10, 100))
    assert torch.equal(sketch(x, "weight"), sketch(x.clone(), "weight"))
    assert distance(sketch(x, "weight"), sketch(x, "bias")) > 0.5


def test_the_seed_is_the_same_in_every_process():
    bucket = int(sketch(torch.ones(1), "weight").abs().argmax())
    assert (bucket, float(sketch(torch.ones(1), "weight").sum())) == (35, pytest.approx(-0.9219551441924523))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("num_shards", [2, 3, 7])
@pytest.mark.parametrize("shape", [(50, 40), (1000, 300), (5, 3 * TILE // 2)], ids=str)
def test_sketches_of_uneven_shards_add_up(shape, num_shards, dim):
    x = make(shape)
    total, first = torch.zeros(NUM_BUCKETS, dtype=torch.float64), 0
    for shard in x.chunk(num_shards, dim):
        part = _Accumulator("weight", x)
        starts = [0, 0]
        starts[dim] = first
        _add_box(part, shard, starts, shape)
        total += part.finish()
        first += shard.shape[dim]
    assert distance(total, sketch(x, "weight")) < 2e-7


def test_boxes_of_several_dims_add_up():
    x = make((6, 10, 12, 8))
    total = torch.zeros(NUM_BUCKETS, dtype=torch.float64)
    for a in (0, 3):
        for b in (0, 6):
            for c in (0, 5):
                part = _Accumulator("weight", x)
                box = x[a : a + 3, :, b : b + 6, c : 5 if c == 0 else 8]
                _add_box(part, box, (a, 0, b, c), x.shape)
                total += part.finish()
    assert distance(total, sketch(x, "weight")) < 1e-12


def test_runs_of_a_flattened_tensor_add_up():
    x = make((1000, 200))
    flat = x.reshape(-1)
    total = sketch(flat[:12345], "weight") + sketch(flat[12345:], "weight", start=12345)
    assert distance(total, sketch(x, "weight")) < 2e-7


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: x.unsqueeze(0).expand(1, *x.shape)[0],
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: x.reshape(-1).reshape(x.shape),
    ],
    ids=["transposed memory", "expanded", "memory with gaps", "view"],
)
def test_logical_order_counts_and_not_that_of_the_memory(change):
    x = make((700, 300))
    assert distance(sketch(change(x), "weight"), sketch(x, "weight")) < 2e-7


def test_channels_last_is_sketched_in_logical_order():
    x = make((8, 16, 5, 5))
    assert distance(sketch(x.to(memory_format=torch.channels_last), "weight"), sketch(x, "weight")) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_added_in_float32(dtype):
    x = make((40, TILE), dtype=dtype)
    assert distance(sketch(x, "weight"), sketch(x.float(), "weight")) < 2e-7
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(sketch(x.float(), "weight"), sketch(x.double(), "weight")) < 3e-7


def test_complex_tensors_keep_their_imaginary_part():
    x = torch.complex(make((30, 20), 1), make((30, 20), 2))
    real_and_imaginary = sketch(torch.view_as_real(x), "weight")
    assert distance(sketch(x, "weight"), real_and_imaginary) < 1e-12
    assert distance(sketch(x.real, "weight"), sketch(x, "weight")) > 0.3


@pytest.mark.parametrize("sparse_dim", [1, 2])
def test_sparse_tensors_are_sketched_like_dense_ones(sparse_dim):
    dense = torch.zeros(500, 300)
    dense[[3, 77, 410]] = make((3, 300))
    assert distance(sketch(dense.to_sparse(sparse_dim), "weight"), sketch(dense, "weight")) < 2e-7
    twice = torch.sparse_coo_tensor(torch.tensor([[3, 3]]), make((2, 300)), (500, 300), check_invariants=True)
    assert distance(sketch(twice, "weight"), sketch(twice.to_dense(), "weight")) < 1e-6


@pytest.mark.parametrize("tensor", [torch.arange(4), torch.ones(4, device="meta")], ids=["integers", "meta"])
def test_what_has_no_values_is_refused(tensor):
    with pytest.raises(CannotSketch, match="no sketch of a"):
        sketch(tensor, "weight")


def change_sign(x, at, _):
    x[at] = -x[at]


def swap(x, at, other):
    x[[at, other]] = x[[other, at]]


def zero_row(x, at, _):
    x.view(-1, 20)[at // 20] = 0


@pytest.mark.parametrize("change", [change_sign, swap, zero_row])
@pytest.mark.parametrize("numel", [400, 2 * TILE + 400])
def test_no_change_goes_unseen(change, numel):
    generator = torch.Generator().manual_seed(0)
    x = make((numel // 20 * 20,))
    before = sketch(x, "weight")
    smallest = math.inf
    for _ in range(60):
        at, other = torch.randint(len(x), (2,), generator=generator).tolist()
        if abs(x[at] - x[other]) < 0.1 or abs(x[at]) < 0.1:
            continue
        changed = x.clone()
        change(changed, at, other)
        smallest = min(smallest, float((sketch(changed, "weight") - before).norm() / (changed - x).norm()))
    assert smallest > 1e-4


@pytest.mark.parametrize("features", [1024, 65536, 64, TILE // 64])
def test_one_active_input_feature_fills_many_buckets(features):
    gradient = torch.zeros(256, features)
    gradient[:, 5] = make((256,))
    assert (sketch(gradient, "weight") != 0).sum() >= 32


def test_the_size_of_a_sketch_is_that_of_the_tensor():
    sizes = [float(sketch(make((3000,), seed), f"{seed}").norm()) / math.sqrt(3000) for seed in range(100)]
    assert np.mean(sizes) == pytest.approx(1, abs=0.05)


def test_a_piece_cuts_what_it_names():
    x = torch.arange(12).reshape(3, 4)
    assert Piece((1, 0), (2, 3), (0, 0), (3, 4)).cut(x).tolist() == [[4, 5, 6], [8, 9, 10]]


def test_a_sketch_takes_no_copy_of_the_tensor():
    x = torch.zeros(64 * TILE)
    with torch.profiler.profile(profile_memory=True) as profile:
        sketch(x, "weight")
    largest = max(event.self_cpu_memory_usage for event in profile.events() or ())
    assert largest <= 8 * TILE + 4096
