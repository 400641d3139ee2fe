"""Run claims on a warm pool: every experiment in a process group of its own, with settings put back afterwards."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console

from ddpcall.ranks import RankPool
from ddpcall.teach.claims.claim import Claim
from ddpcall.teach.question import SKIPPED, Result, answer

TIMEOUT_S = 60.0


def run_claims(claims: Sequence[Claim]) -> list[Result]:
    """Run claims on a pool of their own, with a line on a terminal that says which one was last."""
    results: list[Result] = []
    with RankPool() as pool, Console(stderr=True).status("starting ranks") as status:
        for claim in claims:
            results.append(run_claim(claim, pool))
            status.update(f"{len(results)} of {len(claims)}: {claim.key} {results[-1].measured}")
    return results


def run_claim(claim: Claim, pool: RankPool, **premise: Any) -> Result:
    """Run one claim's experiment and have its judge answer by the evidence of rank 0.

    Args:
        claim: Which.
        pool: Its ranks also catch what experiments print, and survive their crashes.
        **premise: Arguments of the experiment, which alter the claim's premise.
    """
    if missing := [f"torch.{name}" for name in claim.needs if not _torch_has(name)]:
        sentence = f"torch {torch.__version__} has no {', '.join(missing)}"
        return Result(claim, claim.first_look, SKIPPED, sentence)
    outcomes = pool.run(observe, claim.num_ranks, claim.experiment, premise, timeout_s=TIMEOUT_S)
    if failures := [outcome for outcome in outcomes if outcome.failed]:
        first = min(failures, key=lambda outcome: outcome.ended_s)
        error = f"rank {first.rank}: {' '.join(first.error.split())}"
        sentence = f"the experiment failed, so there is no evidence: {error}"
        return Result(claim, claim.first_look, SKIPPED, sentence, failed=True)
    evidence, warned = outcomes[0].value
    return dataclasses.replace(answer(claim, evidence, claim.first_look), warnings=warned)


def _torch_has(name: str) -> bool:
    parent, _, last = f"torch.{name}".rpartition(".")
    try:
        return hasattr(importlib.import_module(parent), last) or bool(importlib.import_module(f"torch.{name}"))
    except ImportError:
        return False


def observe(experiment: Callable[..., Any], premise: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """Run an experiment on this rank; returns its evidence, and what torch warned of, each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evidence = experiment(**premise)
    sentences = [" ".join(str(warning.message).split()).split(". ")[0].removesuffix(".") for warning in caught]
    named = (f"{one.category.__name__}: {said}" for one, said in zip(caught, sentences, strict=True))
    return evidence, tuple(dict.fromkeys(named))
