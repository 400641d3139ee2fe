"""Findings, and what was watched, as SARIF 2.1.0, for upload to code scanning."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ddpcall import __version__
from ddpcall.files import replace_text
from ddpcall.findings import CATALOGUE, Finding, Place
from ddpcall.watch.output.source_line import read_source_line
from ddpcall.watch.output.watched import Watched, weigh


def to_sarif(findings: Iterable[Finding], watched: Watched) -> dict[str, Any]:
    """Return the findings as a SARIF 2.1.0 log, every rule of the catalogue included.

    An empty list of results looks like a clean run: where too little was watched, the invocation did not succeed,
    and its notification says why.
    """
    findings, codes, answer = list(findings), list(CATALOGUE), weigh(watched)
    results = [_sarif_result(finding, codes.index(finding.code)) for finding in findings]
    for result, fingerprint in zip(results, _fingerprints(findings), strict=True):
        result["partialFingerprints"] = {"ddpcall/v1": fingerprint}
    notification = {"level": "note" if answer.is_evidence else "error", "message": {"text": answer.text}}
    driver = {
        "name": "ddpcall",
        "version": __version__,
        "semanticVersion": __version__,
        "informationUri": f"pkg:pypi/ddpcall@{__version__}",  # a package URL: there is no site
        "rules": [_sarif_rule(code) for code in codes],
    }
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": driver},
                "invocations": [
                    {"executionSuccessful": answer.is_evidence, "toolExecutionNotifications": [notification]}
                ],
                "results": results,
                "properties": {"ddpcall": {"watched": dataclasses.asdict(watched)}},
            }
        ],
    }


def _sarif_rule(code: str) -> dict[str, Any]:
    rule = CATALOGUE[code]
    return {
        "id": rule.code,
        "name": "".join(word.capitalize() for word in rule.name.split("-")),
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.why},
        "help": {"text": rule.fix},
        "helpUri": rule.links[0],
        "defaultConfiguration": {"level": rule.severity.value},
    }


def _sarif_result(finding: Finding, rule_index: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": finding.code,
        "ruleIndex": rule_index,
        "level": finding.severity,
        "message": {"text": f"{finding.message} Write instead: {finding.fix}"},
        "properties": {"ranks": list(finding.ranks), "step": finding.step, "parameters": list(finding.parameters)},
    }
    if finding.line:
        result["locations"] = [_sarif_location(finding)]
    if finding.called_from is not None:
        related = {**_sarif_location(finding.called_from), "message": {"text": "called from here"}}
        result["relatedLocations"] = [related]
    return result


def _sarif_location(place: Finding | Place) -> dict[str, Any]:
    region = {"startLine": place.line}
    return {"physicalLocation": {"artifactLocation": {"uri": _uri(place)}, "region": region}}


def _uri(place: Finding | Place) -> str:
    path = Path(place.file)
    inside = path.is_relative_to(Path.cwd())
    return path.relative_to(Path.cwd()).as_posix() if inside else path.absolute().as_uri()


def _fingerprints(findings: list[Finding]) -> list[str]:
    """Return what identifies each finding when lines above it come or go: its text, not its number.

    The same text twice in a file is told apart by order.
    """
    seen: Counter[str] = Counter()
    fingerprints: dict[int, str] = {}
    for index, finding in sorted(enumerate(findings), key=lambda pair: pair[1].line):
        source = read_source_line(finding.file, finding.line) if finding.line else None
        text = finding.function if source is None else source.text
        place = _uri(finding) if finding.line else ""
        content = "\0".join([finding.code, place, text, finding.cause])
        digest = hashlib.sha256(content.encode(errors="replace")).hexdigest()[:16]
        seen[digest] += 1
        fingerprints[index] = f"{digest}:{seen[digest]}"
    return [fingerprints[index] for index in range(len(findings))]


def write_sarif(findings: Iterable[Finding], watched: Watched, path: Path) -> None:
    """Write the SARIF log."""
    replace_text(path, json.dumps(to_sarif(findings, watched), indent=2) + "\n")
