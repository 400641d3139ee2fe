"""What the ranks of a graded run told, received by the grading process, which trusts none of it to be whole.

Facts come over a Unix socket. No rank's script starts before all ranks have said hello; from then on nobody else
is let in.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

GO = b"go"
MOST_BYTES = 64 * 2**20  # one rank's facts; a flood beyond it is cut off
JOIN_SECONDS = 10.0


@dataclass
class Testimony:
    """What one rank told.

    Attributes:
        rank: Who.
        wraps: A record for each DDP built: `modules`, a list of [name, repr], and `ranks`.
        forwards: A record for each forward of a wrapped model: `gradients`, `training`, `rows` (a digest of each
            sample), and `step`: how many optimizer steps had been made.
        begin: The state of the wrapped models before the first optimizer step: a dict of tensors for each.
        steps: A record for each optimizer step: `world_size`, `evaluating` (modules in eval mode), `fired` (hooks
            by role), `parameters` (see `ddpcall.teach.witness`).
        end: How the script ended: `code`, `error`, `tampered`, `state`; None where the rank never said so.
    """

    rank: int
    wraps: list[dict[str, Any]] = field(default_factory=list)
    forwards: list[dict[str, Any]] = field(default_factory=list)
    begin: dict[str, Any] | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None

    def hear(self, fact: dict[str, Any]) -> None:
        """Take in one fact; what is none is dropped."""
        match fact.get("kind"):
            case "wrap":
                self.wraps.append(fact)
            case "forward":
                self.forwards.append({**fact, "step": len(self.steps)})
            case "begin":
                self.begin = fact
            case "step":
                self.steps.append(fact)
            case "end":
                self.end = fact


class Hearing:
    """Listens to the ranks, one thread a rank, until they are gone."""

    def __init__(self, path: Path, num_ranks: int) -> None:
        """Listen at a path that nobody else uses, for so many ranks."""
        self._num_ranks = num_ranks
        self._heard: dict[int, Testimony] = {}
        self._connections: dict[int, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> list[Testimony]:
        """Stop listening, when no rank is left, and return what was told, by rank."""
        self._stop_accepting()
        self._accepting.join(JOIN_SECONDS)
        for thread in self._threads:
            thread.join(JOIN_SECONDS)
        return [self._heard[rank] for rank in sorted(self._heard)]

    def _stop_accepting(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._listen, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _listen(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, ValueError, RecursionError):
            facts = _read_facts(connection)
            testimony = self._welcome(next(facts, {}), connection)
            if testimony is not None:
                for fact in facts:
                    testimony.hear(fact)

    def _welcome(self, hello: dict[str, Any], connection: socket.socket) -> Testimony | None:
        """Let a rank in; when all are there, nobody else is, and their scripts may start."""
        rank = hello.get("rank")
        with self._lock:
            if not isinstance(rank, int) or rank not in range(self._num_ranks) or rank in self._heard:
                return None
            self._connections[rank] = connection
            testimony = self._heard[rank] = Testimony(rank)
            if len(self._heard) == self._num_ranks:
                self._stop_accepting()
                for waiting in self._connections.values():
                    waiting.sendall(GO)
            return testimony


def _read_facts(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """Yield one JSON object after the other.

    Raises:
        ValueError: What came is no JSON object, or too much.
    """
    heard, rest = 0, b""
    while chunk := connection.recv(1 << 20):
        heard += len(chunk)
        if heard > MOST_BYTES:
            raise ValueError("too much")
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            fact = json.loads(line)
            if not isinstance(fact, dict):
                raise ValueError("no object")
            yield fact


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """Return a tensor that `witness.pack` made, float32.

    Raises:
        ValueError: It is none.
    """
    values = np.frombuffer(base64.b64decode(packed["values"]), dtype=np.float32)
    return values.reshape(packed["shape"])
