"""What an earlier attempt left in the run directory, and what of it stands."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ddpcall.evidence import Environment
from ddpcall.files import parse_json, read_bytes, read_text
from ddpcall.lab.errors import WrongUse
from ddpcall.lab.run_directory import RECORDS, RunDirectory

# These say how a run is kept and shown, not what it measures.
MAY_DIFFER = ("checkpoint", "logger", "ranks", "report", "tensorboard", "trial_timeout_s")
MAX_BYTES = 256 * 2**20
MAX_CONFIG_BYTES = 256 * 2**10
_FACTS = ("torch", "python", "device", "device_name", "backend")


@dataclass(frozen=True)
class Earlier:
    """What an earlier attempt finished.

    Attributes:
        records: The evidence of its finished trials, in the order of the grid.
        lengths: Bytes of each file of records after each of them.
        notes: What somebody who reads the result should know.
        is_there: Whether there was an attempt.
    """

    records: tuple[dict[str, Any], ...] = ()
    lengths: tuple[dict[str, int], ...] = ()
    notes: tuple[str, ...] = ()
    is_there: bool = False


def find_earlier(directory: RunDirectory, config: dict[str, Any], environment: Environment) -> Earlier:
    """Read what an earlier attempt finished, and cut off what it left of the trial after that.

    Returns:
        Nothing, where there was no attempt.

    Raises:
        WrongUse: The directory holds a run of another configuration.
    """
    summary = directory.read_summary()
    if not summary:
        return Earlier()
    _check_config(directory, config)
    try:
        lengths = [{name: int(each[name]) for name in RECORDS} for each in summary["lengths"]]
    except (KeyError, TypeError, ValueError):
        raise WrongUse(f"{directory.path}: its summary does not say which trials are finished. {_ANEW}") from None
    records, torn = _read_whole(directory, lengths)
    lengths = lengths[: len(records)]
    directory.truncate(lengths[-1] if lengths else dict.fromkeys(RECORDS, 0))
    notes = [torn] if torn else []
    notes += _compare_environments(summary.get("environment") or {}, environment)
    return Earlier(tuple(records), tuple(lengths), tuple(notes), is_there=True)


_ANEW = "Write checkpoint.resume=never to begin anew there, or another hydra.run.dir"


def _check_config(directory: RunDirectory, config: dict[str, Any]) -> None:
    try:
        text = read_text(directory.path / "config.yaml", MAX_CONFIG_BYTES)
        earlier: Any = OmegaConf.to_container(OmegaConf.create(text))
        if not isinstance(earlier, dict):
            raise ValueError("it holds no configuration")
    except (OSError, ValueError, RecursionError, OmegaConfBaseException, YAMLError) as error:
        raise WrongUse(f"{directory.path / 'config.yaml'} cannot be read: {error}. {_ANEW}") from None
    now = json.loads(json.dumps(config))
    different = [
        f"  {key}: {earlier.get(key)} there, {now.get(key)} here"
        for key in now.keys() | earlier.keys()
        if key not in MAY_DIFFER and earlier.get(key) != now.get(key)
    ]
    if different:
        raise WrongUse(
            "\n".join([f"{directory.path} holds a run of another configuration:", *different, f"{_ANEW}."])
        )


def _read_whole(directory: RunDirectory, lengths: list[dict[str, int]]) -> tuple[list[dict[str, Any]], str]:
    """Read the trials up to the first of which a file does not hold all; say which file that is."""
    records: list[dict[str, Any]] = []
    sizes = directory.sizes()
    path = directory.path / "evidence.jsonl"
    try:
        content = read_bytes(path, MAX_BYTES)
    except OSError:
        content = b""
    begin = 0
    for number, length in enumerate(lengths):
        short = [name for name in RECORDS if sizes[name] < length[name]]
        try:
            record = parse_json(content[begin : length["evidence.jsonl"]].decode())
        except ValueError:
            record = None
        if short or not isinstance(record, dict):
            name = (short or ["evidence.jsonl"])[0]
            return records, f"{directory.path / name} is torn or changed: trials from number {number} on run again"
        records.append(record)
        begin = length["evidence.jsonl"]
    return records, ""


def _compare_environments(earlier: dict[str, Any], now: Environment) -> list[str]:
    notes = []
    ranks = earlier.get("world_size")
    if ranks != now.world_size:
        notes.append(
            f"finished trials were measured on {ranks} ranks and stand; {now.world_size} ranks run now, with "
            "other batches and another mean: what is measured from here on is another experiment"
        )
    values = dataclasses.asdict(now)
    notes += [
        f"{name} was {earlier.get(name)} and is {values[name]}: what is resumed may not be equal to the bit"
        for name in _FACTS
        if earlier.get(name) != values[name]
    ]
    return notes
