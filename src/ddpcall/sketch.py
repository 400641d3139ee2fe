"""Linear sketches: 64 numbers that stand for a tensor and add up as the tensor does.

`S(a·x + b·y) = a·S(x) + b·S(y)` up to rounding, and the sketches of shards add up to the sketch of the whole,
because an element's bucket and weight depend on the parameter's name and on the element's *global* index alone:
its index in logical (row-major) order in the whole tensor, whatever part of it lies here, in any memory order.

How it works: the indices are cut into blocks of `TILE` elements. A block is scaled by a weight of its own, the
scaled blocks are added up into one tile, and the tile is put into the buckets by one random table. So a large
tensor costs one matrix-vector product, which reads each element once, and one short sum. Weights are random in
sign and in size (0.75 to 1.25 before scaling), so that two exchanged elements in one bucket show.

Cost: about that of `Tensor.sum` for contiguous float32 tensors; 3 times it for 16-bit ones, which are converted in
pieces. Memory that is not in logical order is copied in pieces of `_CHUNK` elements, at the price of such copies.
A shard of another dim than the first is put into rows of zeros in such pieces: it costs what the whole would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from ddpcall import torch_internals as internals
from ddpcall.replicas import is_freed, is_simple

NUM_BUCKETS = 64
TILE = 64 * 1021
"""Elements in a tile: no round number, so that a column of a matrix does not fall into few places of the tile."""

_CHUNK = 2**20
_GROUP = 64  # blocks added in float32 before they go into the float64 tile: their rounding stays near 1e-7
_SHORT = TILE // 4
_SMALL = 2**13  # more gain less by being read together
_QUEUED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_SERIAL = 2**15  # torch adds as many elements in one thread: here threads would wait longer for each other
_SCALE = 1 / math.sqrt(1 + 1 / 48)  # so that a weight's square is 1 in the mean
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class CannotSketch(Exception):
    """Raised for tensors that have no values to sketch here: integers, meta or freed tensors, exotic layouts."""


class SketchQueue:
    """Sketches of small tensors, which are copied now and read together later: alone each costs 50 us.

    What `add` returns is filled by `flush`, and not to be read before.
    """

    def __init__(self) -> None:
        """Start with none."""
        self._copies: list[Tensor] = []
        self._names: list[str] = []
        self._blocks: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._numel = 0

    def add(self, tensor: Tensor, name: str, start: int = 0) -> Tensor:
        """Return the sketch of a tensor as `sketch` does, at once where the tensor is large or no plain one."""
        numel = tensor.numel()
        if start or numel > _SMALL or tensor.dtype not in _QUEUED or not is_simple(tensor):
            return sketch(tensor, name, start)
        if self._numel + numel > _CHUNK:
            self.flush()
        if len(self._rows) == len(self._copies):
            self._blocks.append(torch.zeros(_GROUP, NUM_BUCKETS, dtype=torch.float64))
            self._rows += self._blocks[-1].unbind()
        self._copies.append(tensor.detach().clone())
        self._names.append(name)
        self._numel += numel
        return self._rows[len(self._copies) - 1]

    def flush(self) -> None:
        """Read what was copied."""
        copies, names, blocks = self._copies, self._names, self._blocks
        self._copies, self._names, self._blocks, self._rows, self._numel = [], [], [], [], 0
        if copies:
            for block, filled in zip(blocks, _sketch_small(copies, names).split(_GROUP), strict=True):
                block[: len(filled)] = filled


def _sketch_small(tensors: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """Return the sketches of whole tensors that are shorter than a tile, so that each lies in two at most."""
    seeds = np.array([xxhash.xxh3_64_intdigest(name.encode()) for name in names], np.uint64)
    sizes = np.array([tensor.numel() for tensor in tensors])
    values = torch.cat([tensor.view(-1) for tensor in tensors]).to(torch.float64).numpy()
    shifts = (seeds % np.uint64(TILE // 16)).astype(np.int64) * 16  # as in _Accumulator
    places = np.arange(len(values)) + np.repeat(shifts - np.cumsum(sizes) + sizes, sizes)
    in_second = places >= TILE
    places -= TILE * in_second
    scales = [_make_weights(_mix(_mix(np.array([block + 1])) ^ seeds)) for block in (0, 1)]
    scale = np.where(in_second, *(np.repeat(each, sizes) for each in reversed(scales)))
    weights, buckets = (table.numpy() for table in _make_tables(torch.device("cpu")))
    where = np.repeat(np.arange(len(sizes)) * NUM_BUCKETS, sizes) + buckets[places]
    sums = np.bincount(where, values * weights[places] * scale, len(sizes) * NUM_BUCKETS)
    return torch.from_numpy(sums.reshape(len(sizes), NUM_BUCKETS))


def sketch(tensor: Tensor, name: str, start: int = 0) -> Tensor:
    """Return the sketch of a tensor, or of the part of a DTensor that this rank holds.

    Args:
        tensor: Floating or complex; strided or sparse COO; a DTensor's local part is put where it lies in the
            whole. 16-bit values are added in float32.
        name: Seeds the sketch: the same on every rank, another for every parameter.
        start: Global index of the first element, for a piece that was cut from the flattened whole (a number is
            one element, a complex number two). Not with DTensors.

    Returns:
        Shape (NUM_BUCKETS,), float64, on the tensor's device.

    Raises:
        CannotSketch: the tensor is of a kind that is not understood.
    """
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        raise CannotSketch(f"no sketch of a {tensor.dtype} tensor on {tensor.device}")
    if is_freed(tensor):
        raise CannotSketch(f"no sketch of a {tuple(tensor.shape)} tensor whose memory was freed")
    with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        values, pieces = _split_into_pieces(tensor, start)
        total = _Accumulator(name, values)
        if values.layout is torch.sparse_coo:
            _add_sparse(total, values)
        elif values.layout is torch.strided:
            for piece in pieces:
                _add_box(total, piece.cut(values), piece.starts, piece.shape)
        else:
            raise CannotSketch(f"no sketch of a tensor with layout {values.layout}")
        return total.finish()


@dataclass(frozen=True)
class Piece:
    """A rectangular part of a local tensor and its place in the whole.

    Attributes:
        local: Where it starts in the local tensor, by dim.
        sizes: Its size, by dim.
        starts: Where it starts in the whole, by dim.
        shape: Shape of the whole.
    """

    local: tuple[int, ...]
    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    shape: tuple[int, ...]

    def cut(self, values: Tensor) -> Tensor:
        """Return the view of the local tensor's values that this piece is."""
        for dim, (first, size) in enumerate(zip(self.local, self.sizes, strict=True)):
            values = values.narrow(dim, first, size)
        return values


def _split_into_pieces(tensor: Tensor, start: int) -> tuple[Tensor, Sequence[Piece]]:
    """Return the values that lie here, complex ones as pairs, and where they belong."""
    values: Any = tensor.detach()
    if hasattr(values, "placements"):
        if start:
            raise CannotSketch("a DTensor knows where it lies; start must be 0")
        mesh, shape, placements = values.device_mesh, tuple(values.shape), tuple(values.placements)
        runs = _find_runs(mesh, shape, placements)
        values = values.to_local()
        pieces = _make_pieces(runs, shape)
    else:
        shape = (start + values.numel(),) if start else tuple(values.shape)
        sizes = (values.numel(),) if start else shape
        values = values.reshape(-1) if start else values
        pieces = [Piece((0,) * len(sizes), sizes, (start,) if start else (0,) * len(sizes), shape)]
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
        pieces = [Piece((*p.local, 0), (*p.sizes, 2), (*p.starts, 0), (*p.shape, 2)) for p in pieces]
    return values, pieces


def _find_runs(mesh: Any, shape: tuple[int, ...], placements: tuple[Any, ...]) -> list[list[tuple[int, int, int]]]:
    """Return, by dim, the runs (first in local, first in the whole, length) of indices that lie here.

    The placements cut a list of indices as they cut the tensor, so padding-free, uneven and strided shards are
    understood alike.
    """
    indices = [torch.arange(size) for size in shape]
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise CannotSketch("this rank is not part of the DTensor's mesh")
    for mesh_dim, placement in enumerate(placements):
        if placement.is_replicate() or placement.is_partial():
            continue
        dim = placement.dim % len(shape)
        spread = indices[dim].reshape([-1 if d == dim else 1 for d in range(len(shape))])
        split = internals.SPLIT_TENSOR.of(placement)
        parts, _ = split(spread, mesh.size(mesh_dim), with_padding=False, contiguous=False)
        indices[dim] = parts[coordinate[mesh_dim]].reshape(-1)
    return [list(_group_runs(places.numpy())) for places in indices]


def _group_runs(indices: np.ndarray) -> Iterator[tuple[int, int, int]]:
    breaks = [0, *(np.flatnonzero(np.diff(indices) != 1) + 1).tolist(), len(indices)]
    for first, end in pairwise(breaks):
        if end > first:
            yield first, int(indices[first]), end - first


def _make_pieces(runs: list[list[tuple[int, int, int]]], shape: tuple[int, ...]) -> list[Piece]:
    return [
        Piece(tuple(r[0] for r in combined), tuple(r[2] for r in combined), tuple(r[1] for r in combined), shape)
        for combined in product(*runs)
    ]


def _add_box(total: _Accumulator, block: Tensor, starts: Sequence[int], shape: Sequence[int]) -> None:
    """Add a rectangular part of the whole."""
    if not block.numel():
        return
    partial_dims = [dim for dim, size in enumerate(shape) if block.shape[dim] != size]
    last = partial_dims[-1] if partial_dims else 0
    first = next((dim for dim, size in enumerate(block.shape) if size > 1), last)
    if first >= last:
        _add_run(total, block, _ravel(starts, shape))
    elif not any(first < dim < last for dim in partial_dims):
        _add_rows(total, block.flatten(0, last - 1), _ravel(starts, shape), math.prod(shape[last:]))
    else:  # parts of three dims and more
        for index in range(block.shape[first]):
            place = (*starts[:first], starts[first] + index, *starts[first + 1 :])
            _add_box(total, block.narrow(first, index, 1), place, shape)


def _ravel(starts: Sequence[int], shape: Sequence[int]) -> int:
    index = 0
    for first, size in zip(starts, shape, strict=True):
        index = index * size + first
    return index


def _add_rows(total: _Accumulator, rows: Tensor, first_index: int, pitch: int) -> None:
    """Add rows that begin `pitch` elements apart in the whole."""
    width = rows[0].numel()
    if width >= _SHORT or pitch > _CHUNK:
        for number, row in enumerate(rows):
            _add_run(total, row, first_index + number * pitch)
        return
    num_rows = max(1, _CHUNK // pitch)
    padded = torch.zeros(min(num_rows, len(rows)), pitch, dtype=rows.dtype, device=rows.device)
    for number, part in enumerate(rows.split(num_rows)):
        padded[: len(part), :width].view(len(part), *part.shape[1:]).copy_(part)
        # The last row ends with its own values: what follows them may lie beyond the whole.
        filled = padded.view(-1)[: (len(part) - 1) * pitch + width]
        total.add(filled, first_index + number * num_rows * pitch)


def _add_run(total: _Accumulator, block: Tensor, first_index: int) -> None:
    """Add values that follow each other in the whole, in logical order, copying at most `_CHUNK` at a time."""
    if block.is_contiguous() and not block.is_neg():
        total.add(block.view(-1), first_index)
        return
    size = block[0].numel()
    if size > _CHUNK and block.dim() > 1:
        for number, part in enumerate(block):
            _add_run(total, part, first_index + number * size)
        return
    num_rows = max(1, _CHUNK // size)
    for number, part in enumerate(block.split(num_rows)):
        total.add(part.resolve_neg().reshape(-1), first_index + number * num_rows * size)


def _add_sparse(total: _Accumulator, tensor: Tensor) -> None:
    """Add a sparse tensor's rows, each where its indices say."""
    tensor = tensor.coalesce()
    values = tensor.values()
    sparse_shape = tensor.shape[: tensor.sparse_dim()]
    first = torch.zeros_like(tensor.indices()[0])
    for index, size in zip(tensor.indices(), sparse_shape, strict=True):
        first = first * size + index
    width = values[0].numel() if len(values) else 0
    if width:
        within = torch.arange(width, device=values.device)
        num_rows = max(1, _CHUNK // width)
        for rows, part in zip(first.split(num_rows), values.split(num_rows), strict=True):
            total.add_at(part.reshape(-1), (rows[:, None] * width + within).reshape(-1))


class _Accumulator:
    """The sketch of one tensor, while its parts are added."""

    def __init__(self, name: str, like: Tensor) -> None:
        seed = xxhash.xxh3_64_intdigest(name.encode())
        self._seed = seed
        # Aligned, so that blocks start where vector instructions like it.
        self._shift = seed % (TILE // 16) * 16
        self._device = like.device
        self._dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
        self._weights, self._buckets = _make_tables(like.device)
        self._sums = torch.zeros(NUM_BUCKETS, dtype=torch.float64, device=like.device)
        self._tile: Tensor | None = None

    def add(self, flat: Tensor, start: int) -> None:
        """Add elements that follow each other in memory and in the whole."""
        block, place = divmod(start + self._shift, TILE)
        if place or flat.numel() < TILE:
            head, flat = flat[: TILE - place], flat[TILE - place :]
            self._add_within(head, block, place)
            block += 1
        num_blocks = flat.numel() // TILE
        if num_blocks:
            self._add_blocks(flat[: num_blocks * TILE].view(num_blocks, TILE), block)
            flat = flat[num_blocks * TILE :]
        if flat.numel():
            self._add_within(flat, block + num_blocks, 0)

    def _add_within(self, flat: Tensor, block: int, place: int) -> None:
        """Add elements of one block."""
        weight = _block_weight(self._seed, block)
        places = slice(place, place + flat.numel())
        if flat.numel() < _SHORT:
            values = flat.to(torch.float64) * self._weights[places]
            self._sums.index_add_(0, self._buckets[places], values, alpha=weight)
        else:
            filled = self._open_tile()[places]
            for part, values in zip(filled.split(_SERIAL), flat.split(_SERIAL), strict=True):
                part.add_(values, alpha=weight)

    def _add_blocks(self, blocks: Tensor, first: int) -> None:
        tile = self._open_tile()
        weights = _device_weights(self._seed, first, len(blocks), self._dtype, self._device)
        is_short = blocks.dtype is not self._dtype
        size = _GROUP // 4 if is_short else _GROUP
        # Short floats are converted in pieces that stay in the cache.
        buffer = blocks.new_empty((min(size, len(blocks)), TILE), dtype=self._dtype) if is_short else blocks
        added = blocks.new_empty(TILE, dtype=self._dtype)
        for begin in range(0, len(blocks), size):
            group = blocks[begin : begin + size]
            group = buffer[: len(group)].copy_(group) if is_short else group
            torch.mv(group.t(), weights[begin : begin + size], out=added)
            if self._device.type == "cpu":  # too short to be worth that threads wait for each other
                np.add(tile.numpy(), added.numpy(), out=tile.numpy())
            else:
                tile.add_(added)

    def add_at(self, flat: Tensor, indices: Tensor) -> None:
        """Add elements at given global indices."""
        indices = indices + self._shift
        blocks, places = indices // TILE, indices % TILE
        used, inverse = torch.unique(blocks, return_inverse=True)
        weights = [_block_weight(self._seed, block) for block in used.tolist()]
        by_block = torch.tensor(weights, dtype=torch.float64, device=self._device)
        values = flat.to(torch.float64) * self._weights[places] * by_block[inverse]
        self._sums.index_add_(0, self._buckets[places], values)

    def _open_tile(self) -> Tensor:
        if self._tile is None:
            self._tile = torch.from_numpy(np.zeros(TILE)).to(self._device)
        return self._tile

    def finish(self) -> Tensor:
        """Return the sketch."""
        if self._tile is not None and self._device.type == "cpu":  # see `_add_blocks`
            weighted = self._tile.numpy() * self._weights.numpy()
            self._sums += torch.from_numpy(np.bincount(self._buckets.numpy(), weighted, NUM_BUCKETS))
        elif self._tile is not None:
            self._sums.index_add_(0, self._buckets, self._tile * self._weights)
        return self._sums


def _mix(numbers: np.ndarray) -> np.ndarray:
    """Return splitmix64's output for each number: the same on every machine, and in every version of numpy."""
    with np.errstate(over="ignore"):
        mixed = numbers.astype(np.uint64) * _GOLDEN
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def _make_weights(bits: np.ndarray) -> np.ndarray:
    """Return a random sign and a size between 0.75 and 1.25 (scaled) for each number: exact in float32."""
    signs = 1.0 - 2.0 * (bits & np.uint64(1)).astype(np.float64)
    sizes = 0.75 + (bits >> np.uint64(41)).astype(np.float64) / 2**24
    return (signs * sizes * _SCALE).astype(np.float32).astype(np.float64)


@cache
def _make_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the weight and the bucket of each place of a tile."""
    bits = _mix(np.arange(1, TILE + 1))
    buckets = (_mix(bits) % np.uint64(NUM_BUCKETS)).astype(np.int64)
    return torch.from_numpy(_make_weights(bits)).to(device), torch.from_numpy(buckets).to(device)


def _block_weights(seed: int, first: int, count: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        numbers = np.arange(first + 1, first + count + 1).astype(np.uint64)
        return _make_weights(_mix(_mix(numbers) ^ np.uint64(seed)))


@lru_cache(maxsize=4096)
def _block_weight(seed: int, block: int) -> float:
    return float(_block_weights(seed, block, 1)[0])


@lru_cache(maxsize=4096)
def _device_weights(seed: int, first: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.from_numpy(_block_weights(seed, first, count)).to(device, dtype)
