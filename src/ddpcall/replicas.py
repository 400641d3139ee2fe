"""Digests of tensors, and the comparison of replicas across ranks in its explicit, collective form.

CPU tensors are digested by xxh3_64 over numpy views of their memory: read once, at memory speed, never copied.
Tensors on any other device are digested there, by integer arithmetic in chunks of a bounded buffer, and one number
comes back. The two give different numbers for the same values: ranks are comparable when they keep a tensor on the
same kind of device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.nn import Parameter

from ddpcall.taps import is_lazy

CHUNK_BYTES = 8 * 2**20
# Odd, so that multiplying by them modulo 2**64 loses nothing; the splitmix64 finalizer's.
_FIRST_FACTOR = 0xBF58476D1CE4E5B9
_SECOND_FACTOR = 0x94D049BB133111EB
_GOLDEN = 0x9E3779B97F4A7C15


def digest_tensor(tensor: Tensor) -> int:
    """Return a 64-bit digest of a tensor's values, in order; an int in [-2**63, 2**63).

    Args:
        tensor: Any dtype, shape and device; strided. Read in place when contiguous; on its own device.

    Blind to: shape and dtype (same bytes, same digest); uninitialized lazy parameters, and what `is_unreadable`
    names, digest to 0.
    """
    if is_simple(tensor):
        return _signed(xxhash.xxh3_64_intdigest(_Memory().view(tensor)))
    if is_unreadable(tensor):
        return 0
    pieces = list(_contiguous_pieces(_local_values(tensor)))
    if tensor.device.type != "cpu":
        return digest_on_device(pieces)
    stream = xxhash.xxh3_64()
    for piece in pieces:
        stream.update(_Memory().view(piece))
    return _signed(stream.intdigest())


def digest_tensors(tensors: Iterable[Tensor]) -> Tensor:
    """Return the digests of several tensors: shape (number of tensors,), int64, on the CPU."""
    return torch.tensor([digest_tensor(tensor) for tensor in tensors], dtype=torch.int64)


def digest_state(state: Mapping[str, Tensor]) -> str:
    """Return one digest over named tensors, names included, as 16 hex digits."""
    stream = xxhash.xxh3_64()
    for name, tensor in state.items():
        stream.update(name.encode())
        stream.update(digest_tensor(tensor).to_bytes(8, "little", signed=True))
    return stream.hexdigest()


def digest_bytes(data: Any) -> int:
    """Return the xxh3_64 digest of bytes or of any contiguous buffer, an int in [-2**63, 2**63)."""
    return _signed(xxhash.xxh3_64_intdigest(data))


class StateDigester:
    """One digest over named tensors, taken again and again at memory speed.

    Names, dtypes, shapes and memory order are digested once; the views of the memory are kept, and made anew when
    a tensor's address, its size in bytes or that of its storage changes. Tensors whose memory has gaps are read
    through a copy of `CHUNK_BYTES`, or of one slice along the first dim where that is larger; nothing else is
    copied.

    Args:
        tensors: Names and tensors in the same order on every rank; the tensors are kept, not copied.

    Blind to: values of tensors that `is_unreadable` names (their names, dtypes and global shapes are digested).
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._named = dict(tensors)
        self._look()

    def digest(self) -> int:
        """Return the digest, an int in [-2**63, 2**63); waits for the device where a tensor is on one."""
        if self._changes_unseen or not np.array_equal(self._layout, self._read_layout()):
            self._look()
        stream = self._stream_views()
        for tensor in self._scattered:
            for piece in _contiguous_pieces(tensor):
                stream.update(_Memory().view(piece))
        for pieces in self._on_devices:
            stream.update(digest_on_device(pieces).to_bytes(8, "little", signed=True))
        return _signed(stream.intdigest())

    def _stream_views(self) -> Any:
        stream = self._header.copy()
        deque(map(stream.update, self._views), maxlen=0)
        return stream

    def _read_layout(self) -> np.ndarray:
        # The storage's size too: one that was freed and came back smaller at the same address must not be read.
        count = len(self._readable)
        addresses = np.fromiter(map(Tensor.data_ptr, self._readable), np.int64, count)
        sizes = np.fromiter((tensor.nbytes for tensor in self._readable), np.int64, count)
        storages = np.fromiter((t.untyped_storage().nbytes() for t in self._readable), np.int64, count)
        return np.stack([addresses, sizes, storages])

    def _look(self) -> None:
        """Make the header and the views anew."""
        self._header = xxhash.xxh3_64()
        self._readable: list[Tensor] = []
        self._views: list[Any] = []
        self._scattered: list[Tensor] = []
        memory = _Memory()
        by_device: dict[torch.device, list[Tensor]] = {}
        for name, tensor in self._named.items():
            self._header.update(_describe(name, tensor).encode())
            if is_unreadable(tensor):
                continue
            values = _local_values(tensor)
            # The tensor itself, not its detached self: that one would keep the old address when `.data` is set.
            self._readable.append(values if hasattr(tensor, "placements") else tensor)
            ordered = _in_memory_order(values)
            if values.device.type != "cpu":
                by_device.setdefault(values.device, []).extend(_contiguous_pieces(ordered))
            elif not _is_plain(ordered):
                self._scattered.append(ordered)
            elif values.numel():
                self._views.append(memory.view(ordered))
        self._on_devices = [by_device[device] for device in sorted(by_device, key=str)]
        # A lazy parameter becomes a real one, and freed memory comes back, without a change of address seen here.
        self._changes_unseen = any(is_lazy(t) or is_freed(t) for t in self._named.values())
        self._layout = self._read_layout()


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is a DTensor of which this rank holds no whole replica."""
    placements = getattr(tensor, "placements", None)
    return placements is not None and not all(placement.is_replicate() for placement in placements)


def is_unreadable(tensor: Tensor) -> bool:
    """Say whether a tensor has no values here to compare with other ranks'.

    True for uninitialized lazy parameters, DTensor shards (their values differ between ranks by design), tensors
    on the meta device, tensors whose storage was freed (FSDP does) and layouts that are not strided.
    """
    return is_lazy(tensor) or is_sharded(tensor) or tensor.is_meta or _is_strange(tensor) or is_freed(tensor)


def is_simple(tensor: Tensor) -> bool:
    """Say, fast, whether a tensor is what most are: one piece of this process's memory, whole and not empty."""
    if type(tensor) not in (Tensor, Parameter) or not tensor.is_cpu or _is_strange(tensor):
        return False
    numel = tensor.numel()
    needed = (tensor.storage_offset() + numel) * tensor.element_size()
    return numel > 0 and _is_plain(tensor) and tensor.untyped_storage().nbytes() >= needed


def _is_strange(tensor: Tensor) -> bool:
    return tensor.layout is not torch.strided or tensor.is_quantized


def is_freed(tensor: Tensor) -> bool:
    """Say whether a tensor's storage is too small for its values: reading them would end the process.

    FSDP frees what it gathered so. The address does not tell: that of a view that starts within a freed storage
    is its offset, not 0.
    """
    if is_lazy(tensor) or tensor.is_meta or _is_strange(tensor) or hasattr(tensor, "placements"):
        return False
    if tensor.numel() == 0:
        return False
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.untyped_storage().nbytes() < needed


def _local_values(tensor: Tensor) -> Tensor:
    """Return the detached tensor; of a DTensor replicated on this rank, the tensor it holds here."""
    values: Any = tensor.detach()
    return values.to_local() if hasattr(values, "placements") else values


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return the view whose order is the memory's: contiguous for channels_last and transposed tensors too."""
    if tensor.is_contiguous():
        return tensor
    return tensor.permute(sorted(range(tensor.dim()), key=lambda dim: (-tensor.stride(dim), dim)))


def _describe(name: str, tensor: Tensor) -> str:
    if is_lazy(tensor):
        return f"{name}\0lazy\n"
    strided = tensor.layout is torch.strided and not hasattr(tensor, "placements")
    order = "" if not strided or tensor.is_contiguous() else tensor.stride()
    placements = getattr(tensor, "placements", "")
    return f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0{order}\0{placements}\n"


def _contiguous_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a strided tensor's bytes, in order: 1-D uint8 tensors, views where its memory is contiguous."""
    if _is_plain(tensor):
        if tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8)
        return
    row_bytes = tensor[:1].numel() * tensor.element_size() if tensor.dim() else 1
    for rows in tensor.split(max(1, CHUNK_BYTES // max(1, row_bytes))) if tensor.dim() else (tensor,):
        if rows.numel():
            yield rows.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _is_plain(tensor: Tensor) -> bool:
    """Say whether a tensor's values are what its memory holds, without gaps and in order."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


class _Memory:
    """Makes numpy arrays of memory that is not numpy's.

    Not by `Tensor.numpy`: it forbids for good that the storage is resized, as FSDP does, keeps the storage alive,
    and knows neither bfloat16 nor the 8-bit floats.
    """

    def view(self, tensor: Tensor) -> Any:
        """Return a contiguous CPU tensor's bytes, read-only; good for as long as the tensor has this address."""
        place = (tensor.data_ptr(), True)
        shape = (tensor.numel() * tensor.element_size(),)
        self.__array_interface__ = {"data": place, "shape": shape, "typestr": "|u1", "version": 3}
        return np.asarray(self)


def _signed(digest: int) -> int:
    digest &= 2**64 - 1
    return digest - 2**64 if digest >= 2**63 else digest


def digest_on_device(pieces: Sequence[Tensor], chunk_bytes: int = CHUNK_BYTES) -> int:
    """Return a 64-bit digest of bytes, computed where they lie; an int in [-2**63, 2**63).

    Every 8 bytes, as one word, are mixed with their position by steps that can be undone, and the results are
    summed modulo 2**64: a change of one word always changes the sum, exchanged words do but for a chance of
    2**-64, and the order in which a device adds does not matter.

    Args:
        pieces: 1-D uint8 tensors on one device; their concatenation is digested.
        chunk_bytes: A multiple of 8: how much is mixed at a time. The device holds three buffers of this size
            meanwhile. Part of the definition of the digest.
    """
    if not pieces:
        return 0
    mixer = _ChunkMixer(pieces[0].device, chunk_bytes)
    for chunk in _fill_chunks(pieces, chunk_bytes):
        mixer.add(chunk)
    size = sum(piece.numel() for piece in pieces)
    return digest_bytes(f"{size} {mixer.total.item()}".encode())


def _fill_chunks(pieces: Sequence[Tensor], chunk_bytes: int) -> Iterator[list[Tensor]]:
    """Cut the pieces' concatenation into chunks of `chunk_bytes`; yield each as the list of its parts."""
    chunk: list[Tensor] = []
    room = chunk_bytes
    for piece in pieces:
        start = 0
        while start < piece.numel():
            part = piece[start : start + room]
            chunk.append(part)
            start += part.numel()
            room -= part.numel()
            if room == 0:
                yield chunk
                chunk, room = [], chunk_bytes
    if chunk:
        yield chunk


class _ChunkMixer:
    """Adds up the mixed words of chunk after chunk on one device."""

    def __init__(self, device: torch.device, chunk_bytes: int) -> None:
        self.total = torch.zeros((), dtype=torch.int64, device=device)
        positions = torch.arange(1, chunk_bytes // 8 + 1, dtype=torch.int64, device=device)
        self._keys = _mix(positions.mul_(_signed(_GOLDEN)), _signed(_FIRST_FACTOR))
        self._words = torch.empty_like(self._keys)
        self._packed = torch.empty(0, dtype=torch.uint8, device=device)
        self._chunk_bytes = chunk_bytes
        self._num_chunks = 0

    def add(self, chunk: list[Tensor]) -> None:
        """Mix one chunk into the total."""
        words = self._as_words(chunk)
        mixed = torch.bitwise_xor(words, self._keys[: words.numel()], out=self._words[: words.numel()])
        self._num_chunks += 1
        # A factor of its own for each chunk, so that exchanged chunks show.
        factor = (self._num_chunks * _GOLDEN * 2 + _FIRST_FACTOR) & (2**64 - 1)
        self.total.add_(_mix(mixed, _signed(factor)).sum())

    def _as_words(self, chunk: list[Tensor]) -> Tensor:
        num_bytes = sum(part.numel() for part in chunk)
        if len(chunk) == 1 and num_bytes % 8 == 0 and chunk[0].storage_offset() % 8 == 0:
            return chunk[0].view(torch.int64)
        if not self._packed.numel():
            self._packed = torch.empty(self._chunk_bytes, dtype=torch.uint8, device=self._keys.device)
        padded = -(-num_bytes // 8) * 8
        self._packed[num_bytes:padded].zero_()
        torch.cat(chunk, out=self._packed[:num_bytes])
        return self._packed[:padded].view(torch.int64)


def _mix(words: Tensor, factor: int) -> Tensor:
    """Mix int64 words in place by steps that can each be undone: odd factors, and high half onto low half."""
    halves = words.view(torch.int32)
    words.mul_(factor)
    halves[0::2].bitwise_xor_(halves[1::2])  # little-endian: words ^= words >>> 32
    words.mul_(_signed(_SECOND_FACTOR))
    halves[0::2].bitwise_xor_(halves[1::2])
    return words


def gather_over_ranks(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Stack the same tensor from every rank: shape (ranks, *tensor.shape). Every rank must call it.

    Args:
        tensor: Same shape and dtype on every rank; on the CPU for a gloo group.
        group: The process group, or None for a world of one rank.
    """
    if group is None:
        return tensor.unsqueeze(0)
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, tensor.contiguous(), group=group)
    return torch.stack(gathered)


def differs_between_ranks(gathered: Tensor) -> Tensor:
    """Say where any rank's value differs from rank 0's.

    Args:
        gathered: Shape (ranks, *shape), as from `gather_over_ranks`.

    Returns:
        Shape (*shape), bool.
    """
    return (gathered != gathered[0]).any(dim=0)
