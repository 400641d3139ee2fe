"""Records on disk: a directory of a run, in it one for each rank, in it a file for each step. No pickles."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpcall import __version__
from ddpcall.compare.program import META, prepare
from ddpcall.compare.steps import StepRecord
from ddpcall.files import parse_json, read_bytes, read_text

SCHEMA = 1
RANDOM_STATES = ("torch", "numpy", "Python")
_PREFIXES = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_MB = 1e6
MAX_RANKS = 2**16
MAX_META_BYTES = 16 * 2**20
MAX_STEP_BYTES = 2**30  # of one rank, packed and unpacked


class NotARecord(ValueError):
    """What was given is no record, or none that can be read."""


def clean_name(name: str) -> str:
    """Return a parameter's or module's name without the prefixes of wrappers."""
    return _PREFIXES.sub("", name)


class Writer:
    """Writes one rank's records.

    Args:
        directory: Of the run.
        rank: This process's.
        num_ranks: Of the run.
        run: The same text on all ranks of one run.
        num_steps: Steps that are asked for; None where there is no end.
        max_mb: Megabytes that this rank may write.

    Raises:
        ValueError: the directory holds something else.
    """

    def __init__(
        self, directory: Path, rank: int, num_ranks: int, run: str, num_steps: int | None, max_mb: float
    ) -> None:
        prepare(directory)
        self._own = directory / f"rank{rank}"
        self._own.mkdir(exist_ok=True)
        for old in self._own.iterdir():
            old.unlink()
        self._num_steps, self._max_bytes, self._num_bytes = num_steps, max_mb * _MB, 0
        self.steps: list[int] = []
        self.meta: dict[str, Any] = {
            "schema": SCHEMA,
            "rank": rank,
            "num_ranks": num_ranks,
            "run": run,
            "command": sys.argv,
            "ddpcall": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "failure": "",
        }
        self._save_meta()

    def say_size(self, bytes_a_step: int) -> None:
        """Say how much will be written, before it is."""
        if self.meta["rank"] == 0:
            steps = "" if self._num_steps is None else f", {self._num_steps} steps at most"
            print(
                f"ddpcall record: about {bytes_a_step / _MB:.2g} MB a step and rank{steps}, and never more than "
                f"{self._max_bytes / _MB:g} MB a rank, in {self._own.parent}",
                file=sys.stderr,
            )

    def write(
        self,
        step: int,
        record: StepRecord,
        weights: np.ndarray,
        rates: Sequence[float],
        random_state: Mapping[str, int],
    ) -> bool:
        """Write a step's record.

        Returns:
            False where there is no more room: this step and later ones are not kept.
        """
        stream = io.BytesIO()
        data = np.frombuffer(record.to_bytes(), np.uint8)
        np.savez_compressed(
            stream,
            record=data,
            weights=weights,
            rates=np.array(rates, np.float64),
            random=np.frombuffer(json.dumps(random_state).encode(), np.uint8),
        )
        self._num_bytes += len(stream.getvalue())
        if self._num_bytes > self._max_bytes:
            self.meta["failure"] = f"step {step} and later ones did not fit into {self._max_bytes / _MB:g} MB"
            print(f"ddpcall record: {self.meta['failure']}: give more with --max-mb", file=sys.stderr)
            return False
        (self._own / f"step{step:08d}.npz").write_bytes(stream.getvalue())
        self.steps.append(step)
        self._save_meta()
        return True

    def close(self) -> None:
        """Write the list of what there is."""
        self._save_meta()

    def _save_meta(self) -> None:
        path = self._own / META
        path.with_suffix(".new").write_text(json.dumps(self.meta | {"steps": self.steps}, indent=1))
        os.replace(path.with_suffix(".new"), path)


@dataclass(frozen=True)
class RecordedStep:
    """One step of one rank, as it was written.

    Attributes:
        record: What was seen.
        weights: Shape (parameters, buckets): sketches from before the step.
        rates: Learning rates, by group.
        random_state: Digests of the random state when the step began, by whose it is; empty in older records.
    """

    record: StepRecord
    weights: np.ndarray
    rates: tuple[float, ...]
    random_state: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A record that was read.

    Attributes:
        directory: Where it lies.
        meta: By rank.
        steps: Those that all ranks have.
    """

    directory: Path
    meta: tuple[dict[str, Any], ...]
    steps: tuple[int, ...] = field(default_factory=tuple)

    def load(self, step: int) -> list[RecordedStep]:
        """Read a step, by rank.

        Raises:
            NotARecord: a file is damaged.
        """
        paths = [self.directory / f"rank{rank}" / f"step{step:08d}.npz" for rank in range(len(self.meta))]
        return [_read_step(path) for path in paths]


def _read_step(path: Path) -> RecordedStep:
    try:
        content = read_bytes(path, MAX_STEP_BYTES)
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            if sum(entry.file_size for entry in packed.infolist()) > MAX_STEP_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_STEP_BYTES} bytes")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            record = StepRecord.from_bytes(arrays["record"].tobytes()).rename(clean_name)
            written = json.loads(arrays["random"].tobytes()) if "random" in arrays else {}
            random_state = {name: int(written[name]) for name in RANDOM_STATES if name in written}
            return RecordedStep(record, arrays["weights"], tuple(arrays["rates"].tolist()), random_state)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise NotARecord(f"{path} cannot be read: {error}") from error


def open_run(directory: Path) -> Run:
    """Read what a record says of itself.

    Raises:
        NotARecord: there is none, ranks are missing, or it was written by a later version.
    """
    first = _read_meta(directory, 0)
    meta = tuple(_read_meta(directory, rank) for rank in range(first["num_ranks"]))
    if len({own["run"] for own in meta}) > 1:
        raise NotARecord(f"{directory} holds ranks of different runs: record it again")
    common = set.intersection(*[set(own["steps"]) for own in meta])
    if not common:
        failures = sorted({own["failure"] for own in meta} - {""})
        raise NotARecord(
            f"{directory} holds no step that all {len(meta)} ranks have recorded"
            + (f" ({'; '.join(failures)})" if failures else "")
        )
    return Run(directory, meta, tuple(sorted(common)))


def _read_meta(directory: Path, rank: int) -> dict[str, Any]:
    path = directory / f"rank{rank}" / META
    try:
        meta = parse_json(read_text(path, MAX_META_BYTES))
        if meta["schema"] > SCHEMA:
            raise NotARecord(f"{path} was written by ddpcall {meta['ddpcall']}: read it with that version")
        if not (1 <= int(meta["num_ranks"]) <= MAX_RANKS) or not all(isinstance(s, int) for s in meta["steps"]):
            raise ValueError("num_ranks or steps are no numbers of a run")
        if not isinstance(meta["run"], str) or not isinstance(meta["failure"], str):
            raise ValueError("run and failure are no text")
        return meta
    except OSError:
        what = "is no record" if rank == 0 else f"lacks rank {rank}"
        raise NotARecord(f"{directory} {what}: there is no {path.relative_to(directory)}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise NotARecord(f"{path} cannot be read: {error!r}") from error
