"""Checkpoints of a trial: one directory a saved step, complete or not there, and verified before it is read.

`torch.distributed.checkpoint` writes one file a rank. Around it stands what it does not do itself: it writes into
a directory of another name, a manifest keeps the checksum of every file, a rename makes the checkpoint, and a file
`latest` names it. A flipped bit loads silently without checksums, and a process that dies while it overwrites
leaves a torn checkpoint that loads.

Reading runs no code: tensors and the rest with `weights_only`, the metadata, which torch pickles, by an unpickler
that knows the classes of metadata and no others.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ddpcall.files import open_regular, parse_json, read_text

FORMAT = 1
MANIFEST, LATEST, METADATA = "manifest.json", "latest", ".metadata"
MAX_MANIFEST_BYTES = 4 * 2**20
MAX_METADATA_BYTES = 64 * 2**20
_STEP = re.compile(r"step\d{1,12}")
_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    *[(_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata")],
    *[(_METADATA, name) for name in ("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")],
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *[(f"pathlib{room}", f"{kind}Path") for room in ("", "._local") for kind in ("Posix", "Windows")],
}


class CheckpointRefused(Exception):
    """A checkpoint is damaged, foreign or not readable; the message names the file."""


@dataclass(frozen=True)
class Saved:
    """What one rank had saved.

    Attributes:
        step: Steps that were finished.
        tensors: As given to `Checkpoints.save`, on the CPU.
        rest: Likewise.
    """

    step: int
    tensors: dict[str, Tensor]
    rest: dict[str, Any]


class Checkpoints:
    """The checkpoints of one trial, on one rank.

    Args:
        path: The trial's directory of checkpoints; the same on every rank, on a file system that all share.
        keep: How many of them are kept.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self._keep = keep

    def save(
        self, step: int, tensors: dict[str, Tensor], rest: dict[str, Any], group: dist.ProcessGroup | None
    ) -> str:
        """Save what this rank holds. A collective: every rank calls it after the same step.

        Args:
            step: Steps that are finished.
            tensors: By name.
            rest: What else there is: dicts, lists, tuples, numbers, text, bytes and tensors.
            group: The probes' process group; None in a world of one.

        Returns:
            Why there is no checkpoint, with the rank and the file that failed; empty where there is one. Then the
            ones before it stand.
        """
        rank = 0 if group is None else dist.get_rank(group)
        draft = self.path / f".step{step}.part"
        failures = [each for each in _gather(self._clear(draft) if rank == 0 else "", group) if each]
        if failures:
            return failures[0]
        packed = {f"rank{rank}/{name}": tensor.detach() for name, tensor in tensors.items()}
        packed[f"rank{rank}/rest"] = _pack(rest)
        try:
            writer = dcp.FileSystemWriter(draft, thread_count=1)
            with _quiet():
                dcp.save(packed, storage_writer=writer, process_group=group)
            written: Any = {path.name: _describe(path) for path in draft.glob(f"__{rank}_*")}
        except (CheckpointException, OSError) as error:
            written = _first_failure(error, rank)
        every = _gather(written, group)
        failures = [each for each in every if isinstance(each, str)]
        if failures or rank != 0:
            return next(iter(failures), "")
        try:
            self._commit(
                draft, step, {name: facts for files in every for name, facts in files.items()}, len(every)
            )
        except (OSError, CheckpointRefused) as error:
            return f"rank 0: {error}"
        return ""

    def _clear(self, draft: Path) -> str:
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        except OSError as error:
            return f"rank 0: {error}"
        return ""

    def _commit(self, draft: Path, step: int, files: dict[str, Any], world_size: int) -> None:
        """Write the manifest, rename, point `latest` at it, and remove what is older than the newest few."""
        for name, facts in files.items():
            path = draft / name
            if not path.exists() or path.stat().st_size != facts["bytes"]:
                raise CheckpointRefused(
                    f"{path} was written by another rank and is not here. Write hydra.run.dir=… on a file system "
                    "that all hosts share"
                )
        files[METADATA] = _describe(draft / METADATA)
        manifest = {"format": FORMAT, "step": step, "world_size": world_size, "files": files}
        _write_synced(draft / MANIFEST, json.dumps({**manifest, "digest": _digest_of(manifest)}, indent=1) + "\n")
        final = self.path / f"step{step}"
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        pointer = self.path / f".{LATEST}.part"
        _write_synced(pointer, f"{final.name}\n")
        pointer.replace(self.path / LATEST)
        _sync_directory(self.path)
        for index, other in enumerate(self._list()):
            if index >= self._keep or _step_of(other) > step:  # one beyond this step was refused, or abandoned
                shutil.rmtree(other, ignore_errors=True)

    def _list(self) -> list[Path]:
        """List the checkpoints, newest first; the one that `latest` names ahead of all."""
        try:
            found = [entry for entry in self.path.iterdir() if _STEP.fullmatch(entry.name)]
        except OSError:
            return []
        latest = ""
        with contextlib.suppress(CheckpointRefused):
            latest = _read(self.path / LATEST, 64).strip()
        return sorted(found, key=lambda path: (path.name != latest, -_step_of(path)))

    def load_newest(self, group: dist.ProcessGroup | None) -> tuple[Saved | None, list[str]]:
        """Load the newest checkpoint that is whole. A collective.

        Args:
            group: The probes' process group; None in a world of one.

        Returns:
            What this rank had saved there, or None; and why each newer one is refused, the same on every rank.
        """
        rank, world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        refused: list[str] = []
        for path in _gather(self._list(), group)[0]:
            saved, failure = None, ""
            try:
                if rank == 0:
                    verify(path, world_size)
            except CheckpointRefused as error:
                failure = str(error)
            failure = _gather(failure, group)[0]
            if not failure:
                try:
                    saved = load(path, rank)
                except CheckpointRefused as error:
                    failure = str(error)
                failure = next(filter(None, _gather(failure, group)), "")
            if not failure:
                return saved, refused
            refused.append(failure)
        return None, refused

    def remove(self) -> None:
        """Remove the trial's checkpoints: it is finished."""
        shutil.rmtree(self.path, ignore_errors=True)


def verify(path: Path, world_size: int) -> None:
    """Compare every file of a checkpoint with its checksum.

    Args:
        path: Its directory.
        world_size: Ranks that would go on with it.

    Raises:
        CheckpointRefused: A file is missing, torn, changed, too large or no regular file; the manifest likewise;
            or another number of ranks saved it.
    """
    if path.is_symlink():
        raise CheckpointRefused(f"{path} is a link: a checkpoint is a directory of its own")
    try:
        manifest = parse_json(_read(path / MANIFEST, MAX_MANIFEST_BYTES))
        digest = manifest.pop("digest")
        whole = digest == _digest_of(manifest) and manifest["format"] == FORMAT
        files = {
            str(name): (int(facts["bytes"]), str(facts["xxh3_128"])) for name, facts in manifest["files"].items()
        }
        num_ranks = int(manifest["world_size"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointRefused(f"{path / MANIFEST} is damaged, or not of this version's format") from None
    if not whole:
        raise CheckpointRefused(f"{path / MANIFEST} was changed: its checksum differs")
    for name, (size, checksum) in files.items():
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise CheckpointRefused(f"{path / MANIFEST} names a file outside of its directory: {name!r}")
        with _open_regular(path / name) as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise CheckpointRefused(f"{path / name} is torn: {found} bytes of {size}")
            if _checksum(file) != checksum:
                raise CheckpointRefused(f"{path / name} was changed: its checksum differs")
    if num_ranks != world_size:
        raise CheckpointRefused(
            f"{path} was saved by {num_ranks} ranks, and {world_size} run now: every step would see another "
            "batch, and a trial that is half measured on each is evidence of neither. The trial begins anew"
        )


def load(path: Path, rank: int) -> Saved:
    """Read what one rank saved into a verified checkpoint.

    Raises:
        CheckpointRefused: The metadata asks for more than metadata, or the rank saved nothing.
    """
    reader = _Reader(path)
    prefix = f"rank{rank}/"
    try:
        of_rank = {
            name: found
            for name, found in reader.read_metadata().state_dict_metadata.items()
            if name.startswith(prefix) and isinstance(found, TensorStorageMetadata)
        }
        stored = sum(entry.stat().st_size for entry in path.iterdir())
        if sum(found.size.numel() * found.properties.dtype.itemsize for found in of_rank.values()) > stored:
            raise CheckpointRefused(f"{path / METADATA} speaks of more than the files hold")
        packed: Any = {
            name: torch.empty(found.size, dtype=found.properties.dtype) for name, found in of_rank.items()
        }
        with _quiet():
            dcp.load(packed, storage_reader=reader, no_dist=True)
        rest = torch.load(io.BytesIO(packed.pop(prefix + "rest").numpy().tobytes()), weights_only=True)
    except CheckpointRefused:
        raise
    except (CheckpointException, Exception) as error:  # the first is no Exception; whatever the files hold
        raise CheckpointRefused(f"{path} cannot be read: {_first_failure(error, rank)}") from None
    return Saved(_step_of(path), {name.removeprefix(prefix): tensor for name, tensor in packed.items()}, rest)


class _Reader(dcp.FileSystemReader):
    """Reads a checkpoint's files without running what a pickle may hold, and no file outside of it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata; every file that it names is in the checkpoint's own directory."""
        with _open_regular(Path(self.path) / METADATA) as file:
            metadata = _MetadataUnpickler(io.BytesIO(file.read(MAX_METADATA_BYTES))).load()
        if not isinstance(metadata, Metadata) or metadata.storage_data is None:
            raise CheckpointRefused(f"{Path(self.path) / METADATA} holds no metadata")
        for stored in metadata.storage_data.values():
            name = stored.relative_path
            if name != os.path.basename(name) or stored.transform_descriptors:
                raise CheckpointRefused(f"{Path(self.path) / METADATA} names a file outside of its directory")
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) not in _CLASSES:
            raise CheckpointRefused(f"{METADATA} asks for {module}.{name}, which is not read: it could run code")
        return super().find_class(module, name)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Silence torch's warning that a rank reads alone, or is alone: that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable|uninitialized)")
        yield


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step"))


def _gather(own: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Return what every rank gave; picklable, between the ranks of one run."""
    if group is None:
        return [own]
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, own, group=group)
    return every


def _first_failure(error: BaseException, rank: int) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        rank, (error, _) = min(error.failures.items())
    return f"rank {rank}: {type(error).__name__}: {error}"


def _pack(rest: dict[str, Any]) -> Tensor:
    stream = io.BytesIO()
    torch.save(rest, stream)
    return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "xxh3_128": _checksum(file)}


def _checksum(file: Any) -> str:
    digest = xxhash.xxh3_128()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _digest_of(manifest: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


@contextlib.contextmanager
def _open_regular(path: Path) -> Generator[Any]:
    """Open a regular file; a link, a device and a FIFO are refused without being read."""
    try:
        with open_regular(path) as file:
            yield file
    except FileNotFoundError:
        raise CheckpointRefused(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointRefused(f"{path} cannot be read: {error.strerror}") from None


def _read(path: Path, max_bytes: int) -> str:
    try:
        return read_text(path, max_bytes)
    except FileNotFoundError:
        raise CheckpointRefused(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointRefused(f"{path} cannot be read: {error.strerror}") from None


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
