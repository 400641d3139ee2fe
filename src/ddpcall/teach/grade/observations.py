"""What each rank of a graded run tells: one JSON object a line, in a file of its own.

A rank's file must be new when the rank opens it, before its script starts: nobody else can speak for it without
making it fail. What is in the files is not believed to be whole.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddpcall.files import open_regular

FACTS, FINDINGS = "DDPCALL_GRADE_FACTS", "DDPCALL_GRADE_FINDINGS"  # where a rank and its watch write
MOST_BYTES = 64 * 2**20  # of one rank; a flood beyond it is not read


class FactFile:
    """Where one rank tells what it did, as it happens: one that leaves early has told that, and nothing more."""

    def __init__(self, directory: Path, rank: int) -> None:
        """Open the rank's file.

        Raises:
            FileExistsError: Somebody has told something in this rank's name.
        """
        self._file = (directory / f"rank{rank}.jsonl").open("x")

    def tell(self, kind: str, **facts: Any) -> None:
        """Write one fact; where that is no longer possible, nothing happens."""
        with contextlib.suppress(OSError, ValueError):
            self._file.write(json.dumps({"kind": kind, **facts}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass
class RankObservations:
    """What one rank told.

    Attributes:
        rank: Which.
        wraps: A record for each DDP built: `modules`, a list of [name, repr], and `ranks`.
        forwards: A record for each forward of a wrapped model: `gradients`, `training`, `rows` (a digest of each
            sample), and `step`: how many optimizer steps had been made.
        begin: The state of the wrapped models before the first optimizer step: a dict of tensors for each.
        steps: A record for each optimizer step: `world_size`, `evaluating` (modules in eval mode), `fired` (hooks
            by role), `parameters` (see `ddpcall.teach.grade.observe`).
        end: How the script ended: `code`, `error`, `tampered`, `state`; None where the rank never said so.
    """

    rank: int
    wraps: list[dict[str, Any]] = field(default_factory=list)
    forwards: list[dict[str, Any]] = field(default_factory=list)
    begin: dict[str, Any] | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None

    @classmethod
    def read(cls, rank: int, data: bytes) -> RankObservations:
        """Read facts up to the first thing that is none."""
        seen = cls(rank)
        for line in data.splitlines():
            try:
                fact = json.loads(line)
                kind = fact["kind"]
            except (ValueError, TypeError, KeyError, RecursionError):
                break
            match kind:
                case "wrap":
                    seen.wraps.append(fact)
                case "forward":
                    seen.forwards.append({**fact, "step": len(seen.steps)})
                case "step":
                    seen.steps.append(fact)
                case "begin":
                    seen.begin = fact
                case "end":
                    seen.end = fact
                case _:
                    pass
        return seen

    def trained_rows(self, step: int | None = None) -> list[int]:
        """Return the samples that it trained on, in order: all, or those of one step."""
        return [
            row
            for forward in self.forwards
            if forward["gradients"] and step in (None, forward["step"])
            for row in forward["rows"]
        ]


def read_observations(directory: Path, num_ranks: int) -> list[RankObservations]:
    """Return what was told, by rank; ranks that never started are missing."""
    told = []
    for rank in range(num_ranks):
        with contextlib.suppress(OSError), open_regular(directory / f"rank{rank}.jsonl") as file:
            told.append(RankObservations.read(rank, file.read(MOST_BYTES)))
    return told
