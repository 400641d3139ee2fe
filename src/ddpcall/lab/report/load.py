"""Files into records, tolerantly: what cannot be read becomes a sentence, and the rest is handed on.

A run may have been killed while it wrote, its directory copied in part, or the path be something else altogether.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ddpcall.evidence import AXES, Cell, Environment, Evidence
from ddpcall.files import parse_json, read_text
from ddpcall.lab.records import (
    ComparisonRecord,
    RankSteps,
    RunRecord,
    TimelineRecord,
    TrialRecord,
    read_trial,
    restore_trial,
)
from ddpcall.lab.report.load_watch import WatchRecord, load_watch
from ddpcall.lab.run_directory import SUMMARY, SUMMARY_SCHEMA
from ddpcall.lab.typed import Misfit, NothingToShow, describe_error, read_number, read_record

T = TypeVar("T")
FINDINGS = "findings.json"
MAX_BYTES = 256 * 2**20  # of a file of records
MAX_YAML_BYTES = 256 * 2**10  # a configuration has some 5 KB
_NOT_MEASURED = {*AXES, "rank", "step"}


def load(path: Path) -> RunRecord | WatchRecord:
    """Read a run directory, or the JSON file of a watched run (or a directory that holds one).

    Raises:
        NothingToShow: It is neither, or nothing of it can be read.
    """
    if not path.exists():
        raise NothingToShow(
            f"{path} does not exist. Write the directory that the run named: `evidence: DIRECTORY`"
        )
    if path.is_file() and path.name == SUMMARY:
        return load_run(path.parent)
    if path.is_file():
        return load_watch(path)
    if not _is_run(path) and (path / FINDINGS).is_file():
        return load_watch(path / FINDINGS)
    return load_run(path)


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (SUMMARY, "evidence.jsonl", "steps.jsonl"))


def load_run(path: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        NothingToShow: No trial, no question and no outcome can be read in it.
    """
    if not _is_run(path):
        content = "is empty" if not any(path.iterdir()) else f"holds no {SUMMARY}, evidence.jsonl or steps.jsonl"
        raise NothingToShow(
            f"{path} {content}: it is not a run directory. Write the one that a run named: `evidence: DIRECTORY`"
        )
    problems: list[str] = []
    summary = _read_json(path / SUMMARY, problems)
    evidence = _read_evidence(path, problems)
    trials = _merge_trials(_read_trials(summary, problems), evidence)
    steps = _read_steps(path, problems)
    if not trials and not summary and not steps:
        raise NothingToShow(
            f"{path} holds nothing that can be read: {'; '.join(problems) or 'its files are empty'}"
        )
    config = _read_yaml(path / "config.yaml", problems)
    known = [trial.evidence for trial in trials if trial.evidence is not None]
    first = known[0] if known else None
    return RunRecord(
        path=path,
        experiment=_text(summary.get("experiment")) or _text(config.get("name")) or path.name,
        question=_text(summary.get("question")) or _text(config.get("question")),
        outcome=_text(summary.get("outcome")) or "unknown",
        reason=_text(summary.get("reason")) or None,
        first_failing_rank=_whole(summary.get("first_failing_rank")),
        stacks=_texts(summary.get("stacks")),
        environment=_read_environment(path, summary, first, problems),
        num_trials=_whole(summary.get("num_trials")),
        num_comparisons=_whole(summary.get("num_comparisons")),
        comparisons=tuple(_read_comparisons(summary, problems)),
        left_out=tuple(map(str, _items(summary.get("left_out")))),
        trials=trials,
        steps=steps,
        timeline=tuple(_read_lines(path / "timeline.jsonl", _read_timeline, problems, optional=True)),
        overrides=_read_overrides(path, problems),
        search=_read_search(path),
        num_steps=first.steps if first else _whole(config.get("steps")),
        seed=first.seed if first else _whole(config.get("seed")),
        problems=tuple(problems),
    )


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        found = parse_json(read_text(path, MAX_BYTES))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing: how the run ended is not known")
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({describe_error(error)}): how the run ended is not known")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path.name} holds no JSON object: how the run ended is not known")
        return {}
    if found.get("schema") != SUMMARY_SCHEMA:
        problems.append(
            f"{path.name} has schema {found.get('schema')!r}, and this version of ddpcall knows {SUMMARY_SCHEMA}: "
            "what it does not know is left out"
        )
    return found


def _read_trials(summary: Mapping[str, Any], problems: list[str]) -> list[TrialRecord]:
    trials = []
    for number, item in enumerate(_items(summary.get("trials"))):
        try:
            trials.append(read_trial(item, f"trial {number}"))
        except Misfit as error:
            problems.append(f"{SUMMARY}: {error}")
    return trials


def _read_comparisons(summary: Mapping[str, Any], problems: list[str]) -> Iterator[ComparisonRecord]:
    for number, item in enumerate(_items(summary.get("comparisons"))):
        try:
            yield read_record(ComparisonRecord, item, f"comparison {number}")
        except Misfit as error:
            problems.append(f"{SUMMARY}: {error}")


def _read_evidence(path: Path, problems: list[str]) -> dict[Cell, TrialRecord]:
    """Return what evidence.jsonl says, by cell."""
    found = _read_lines(path / "evidence.jsonl", restore_trial, problems)
    return {trial.cell: trial for trial in found}


def _merge_trials(trials: list[TrialRecord], evidence: dict[Cell, TrialRecord]) -> tuple[TrialRecord, ...]:
    """Join both files by cell; a trial that only one of them has is shown all the same."""
    merged = [
        dataclasses.replace(trial, evidence=evidence[trial.cell].evidence) if trial.cell in evidence else trial
        for trial in trials
    ]
    known = {trial.cell for trial in trials}
    return (*merged, *(trial for cell, trial in evidence.items() if cell not in known))


def _read_steps(path: Path, problems: list[str]) -> dict[Cell, dict[int, RankSteps]]:
    rows: dict[Cell, dict[int, dict[int, dict[str, float | None]]]] = {}
    for item in _read_objects(path / "steps.jsonl", problems, optional=False):
        rank, step = _whole(item.get("rank")), _whole(item.get("step"))
        if rank is None or step is None or not isinstance(item.get("path"), str):
            continue
        cell = Cell(**{axis: str(item[axis]) for axis in AXES if axis in item}) if "wrapper" in item else None
        if cell is not None:
            values = {name: _measured(value) for name, value in item.items() if name not in _NOT_MEASURED}
            rows.setdefault(cell, {}).setdefault(rank, {})[step] = values
    return {cell: {rank: _columns(by_step) for rank, by_step in ranks.items()} for cell, ranks in rows.items()}


def _measured(value: Any) -> float | None:
    return float(value) if isinstance(value, bool) else read_number(value)


def _columns(by_step: dict[int, dict[str, float | None]]) -> RankSteps:
    steps = sorted(by_step)
    names = dict.fromkeys(name for step in steps for name in by_step[step])
    return RankSteps(tuple(steps), {name: tuple(by_step[step].get(name) for step in steps) for name in names})


def _read_environment(
    path: Path, summary: Mapping[str, Any], evidence: Evidence | None, problems: list[str]
) -> Environment | None:
    if evidence is not None:
        return evidence.environment
    unread: list[str] = []
    for source in (summary.get("environment"), _silently(path / "environment.json")):
        try:
            return read_record(Environment, source, "environment")
        except Misfit as error:
            unread.append(str(error))
    problems.append(f"where it was measured is not known: {unread[-1]}")
    return None


def _silently(path: Path) -> Any:
    try:
        return parse_json(read_text(path, MAX_BYTES))
    except (OSError, ValueError):
        return None


def _read_overrides(path: Path, problems: list[str]) -> tuple[str, ...] | None:
    file = path / ".hydra" / "overrides.yaml"
    if not file.is_file():
        return None
    found = _load_yaml(file, problems)
    return tuple(map(str, found)) if isinstance(found, list) else None


def _read_search(path: Path) -> tuple[str, ...]:
    """Return what the command line said of where configuration lies; empty where Hydra's record does not say."""
    found = _read_yaml(path / ".hydra" / "hydra.yaml", [])
    try:
        sources = found["hydra"]["runtime"]["config_sources"]
        of_hydra = map(str, found["hydra"]["overrides"]["hydra"])
        directories = [source["path"] for source in sources if source["provider"] == "command-line"]
    except (KeyError, TypeError):
        return ()
    options = [option for directory in directories for option in ("--config-dir", str(directory))]
    return (*options, *(one for one in of_hydra if one.startswith("hydra.searchpath=")))


def _read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    found = _load_yaml(path, problems) if path.is_file() else None
    return found if isinstance(found, dict) else {}


def _load_yaml(path: Path, problems: list[str]) -> Any:
    import yaml  # OmegaConf's own parser; what it makes of a run's files is plain data

    try:
        text = read_text(path, MAX_YAML_BYTES)
        # An alias of aliases grows without bound once it is written out; ours have none.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("it holds aliases")
        return yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problems.append(f"{path.name} cannot be read: {str(error).splitlines()[0]}")
        return None


def _read_timeline(line: dict[str, Any]) -> TimelineRecord:
    return read_record(TimelineRecord, line, "a record")


def _read_lines(
    path: Path, read: Callable[[dict[str, Any]], T], problems: list[str], *, optional: bool = False
) -> Iterator[T]:
    misfits = []
    for item in _read_objects(path, problems, optional=optional):
        try:
            yield read(item)
        except Misfit as error:
            misfits.append(str(error))
    if misfits:
        problems.append(f"{path.name}: {_count(misfits, 'record')} left out: {misfits[0]}")


def _read_objects(path: Path, problems: list[str], *, optional: bool) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file; lines that are none are counted, a killed run's half line too."""
    if not path.is_file():
        if not optional:
            problems.append(f"{path.name} is missing")
        return
    broken = []
    try:
        for number, line in enumerate(io.StringIO(read_text(path, MAX_BYTES)), start=1):
            item = _parse(line)
            if isinstance(item, dict):
                yield item
            elif line.strip():
                broken.append(number)
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {describe_error(error)}")
    if broken:
        problems.append(f"{path.name}: {_count(broken, 'line')} left out, the first is line {broken[0]}: not JSON")


def _parse(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        return None


def _count(items: list[Any], noun: str) -> str:
    return f"1 {noun} is" if len(items) == 1 else f"{len(items)} {noun}s are"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _texts(value: Any) -> dict[str, str]:
    return {str(key): str(item) for key, item in value.items()} if isinstance(value, dict) else {}
