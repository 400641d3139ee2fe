"""Run claims on a warm pool: every experiment in a process of its own group, with settings put back afterwards."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ddpcall.ranks import RankPool
from ddpcall.teach.claims.claim import Claim, ControlFailed, Result, Ruling, Verdict

TIMEOUT_S = 60.0


def run_claims(claims: Iterable[Claim], pool: RankPool) -> Iterator[Result]:
    """Run each claim's experiment on the ranks it needs and have its judge rule on the evidence of rank 0.

    Args:
        claims: What to run.
        pool: Started on first use. Its ranks also catch what experiments print, and survive their crashes.

    Yields:
        One result a claim, in order, as soon as there is one.
    """
    for claim in claims:
        yield run_claim(claim, pool)


def run_claim(claim: Claim, pool: RankPool, **premise: Any) -> Result:
    """Run one claim; keyword arguments alter the experiment's premise."""
    version = str(torch.__version__)
    if missing := find_missing(claim.needs):
        sentence = f"torch {version} has no {', '.join(f'torch.{name}' for name in missing)}"
        return Result(claim, Ruling(Verdict.SKIPPED, sentence), version)
    outcomes = pool.run(observe, claim.num_ranks, claim.experiment, premise, timeout_s=TIMEOUT_S)
    failures = [outcome for outcome in outcomes if outcome.failed]
    if failures:
        first = min(failures, key=lambda outcome: outcome.ended_s)
        error = " ".join(first.error.split())
        sentence = f"the experiment failed, so there is no evidence: rank {first.rank}: {error}"
        return Result(claim, Ruling(Verdict.SKIPPED, sentence), version, failed=True)
    evidence, warned = outcomes[0].value
    try:
        return Result(claim, claim.judge(evidence), version, warned)
    except ControlFailed as error:
        return Result(claim, Ruling(Verdict.SKIPPED, str(error)), version, warned, failed=True)


def find_missing(needs: Iterable[str]) -> list[str]:
    """Return those dotted names that this torch does not have."""
    return [name for name in needs if not _has(name)]


def _has(name: str) -> bool:
    parent, _, last = f"torch.{name}".rpartition(".")
    with contextlib.suppress(ImportError):
        return hasattr(importlib.import_module(parent), last) or bool(importlib.import_module(f"torch.{name}"))
    return False


def observe(experiment: Callable[..., Any], premise: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """Run an experiment on this rank; returns its evidence, and what it was warned of, each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evidence = experiment(**premise)
    named = (f"{warning.category.__name__}: {_first_sentence(str(warning.message))}" for warning in caught)
    return evidence, tuple(dict.fromkeys(named))


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).split(". ")[0].removesuffix(".")
