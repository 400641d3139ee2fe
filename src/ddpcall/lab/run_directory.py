"""The run directory: everything a run leaves behind, written by one rank, summary.json always whole."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import secrets
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from ddpcall.files import append_text, parse_json, read_text, replace_text

SUMMARY_SCHEMA = 1
_RUNNING, _FAILED = b'"outcome": "running"', b'"outcome": "failed" '
SUMMARY = "summary.json"
MAX_SUMMARY_BYTES = 64 * 2**20
RECORDS = ("evidence.jsonl", "steps.jsonl", "timeline.jsonl")


def new_run_id() -> str:
    """Return a fresh name for a run: local time to the second, and four random hex digits."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


class NotWritten(Exception):
    """A file of the run directory cannot be written; the message names it and says why."""


@contextlib.contextmanager
def writing(path: Path) -> Generator[None]:
    """Tell what fails below a run directory from an error of the user's code.

    Raises:
        NotWritten: In place of an OSError of the body.
    """
    try:
        yield
    except OSError as error:
        raise NotWritten(f"{error.filename or path} cannot be written: {error.strerror or error}") from error


class RunDirectory:
    """Writes and reads the files of one run.

    `config.yaml` (resolved), `environment.json`, `evidence.jsonl` (one record a trial), `steps.jsonl` (one a step
    and rank), `timeline.jsonl` (one a trial and rank), `summary.json` (the contract; see docs/run_directory.md),
    `tensorboard/`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def occupy(self) -> None:
        """Keep other runs out of the directory as long as this process lives.

        Raises:
            NotWritten: Another run is going on there, or it cannot be made.
        """
        if self._lock is not None:
            return
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotWritten(f"{self.path} cannot be written: another run is going on there") from None
        except OSError:
            pass  # a file system without locks

    def create(
        self, config_yaml: str, environment: dict[str, Any], summary: dict[str, Any], *, anew: bool = True
    ) -> None:
        """Start the directory, with a summary whose outcome is `running`.

        Args:
            config_yaml: The resolved configuration.
            environment: What it runs on.
            summary: The first summary.
            anew: Whether to empty the files of records; if not, they go on.

        Raises:
            NotWritten: The directory cannot be written.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._replace("config.yaml", config_yaml)
        self._replace("environment.json", json.dumps(environment, indent=2) + "\n")
        for name in RECORDS if anew else ():
            self._replace(name, "")
        self.write_summary(summary)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file of records; 0 where it is missing."""
        paths = {name: self.path / name for name in RECORDS}
        return {name: path.stat().st_size if path.is_file() else 0 for name, path in paths.items()}

    def truncate(self, lengths: dict[str, int]) -> None:
        """Cut off what stands in the files of records beyond these bytes.

        Raises:
            NotWritten: A file cannot be written.
        """
        for name, length in lengths.items():
            with writing(self.path / name):
                append_text(self.path / name, "")
                os.truncate(self.path / name, length)

    def append(self, name: str, records: list[dict[str, Any]]) -> None:
        """Append records to a JSONL file, one line each.

        Raises:
            NotWritten: It cannot be written.
        """
        with writing(self.path / name):
            append_text(self.path / name, "".join(json.dumps(json_safe(record)) + "\n" for record in records))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace the summary atomically: a reader sees the old one or the new one, never a part."""
        self._replace(SUMMARY, json.dumps(json_safe({"schema": SUMMARY_SCHEMA, **summary}), indent=2) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """Return the summary as it stands; empty where there is none."""
        try:
            found = parse_json(read_text(self.path / SUMMARY, MAX_SUMMARY_BYTES))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def fail(self, outcome: str, reason: str, first_failing_rank: int | None, **more: Any) -> None:
        """Close a run that could not end by itself, keeping the trials already there."""
        summary = self.read_summary()
        if summary.get("outcome") != "running":
            return
        summary.update(outcome=outcome, reason=reason, first_failing_rank=first_failing_rank, **more)
        try:
            self.write_summary(summary)
        except NotWritten:
            self._mark_failed()

    def _mark_failed(self) -> None:
        """Write "failed" over "running" in place, which a full disk allows."""
        with contextlib.suppress(OSError), open(self.path / SUMMARY, "r+b") as file:
            at = file.read().find(_RUNNING)
            if at >= 0:
                file.seek(at)
                file.write(_FAILED)

    def _replace(self, name: str, text: str) -> None:
        with writing(self.path / name):
            replace_text(self.path / name, text)


def json_safe(value: Any) -> Any:
    """Return the value with infinities and NaN as strings: JSON has no word for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value
