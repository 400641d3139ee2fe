"""The words of the room: a claim, what its judge rules, and the record of one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

SOURCES = {
    "FI": "000_86a0d3b1b2cc4592.txt",
    "FM": "001_674d0fe84a705111.txt",
    "CF": "002_fdd996ae0ed7d643.txt",
    "TS": "003_9885dc491b57ecee.txt",
}


class Verdict(StrEnum):
    """What became of a claim. `skipped`: it could not be run, and the sentence says why."""

    TRUE = "true"
    FALSE = "false"
    DEPENDS = "depends"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Ruling:
    """What a judge makes of the evidence.

    Attributes:
        verdict: Computed from the evidence.
        sentence: One sentence with the measured numbers.
    """

    verdict: Verdict
    sentence: str


class ControlFailed(Exception):
    """What must be seen for the evidence to mean anything was not seen, so there is no verdict."""


def require(seen: bool, control: str) -> None:
    """Insist on a judge's positive control: that a hook "did not fire" says something only if it can.

    Raises:
        ControlFailed: It was not seen.
    """
    if not seen:
        raise ControlFailed(f"the control failed: {control}")


def times(number: int) -> str:
    """Say how often: "never", "once", "3 times"."""
    return {0: "never", 1: "once", 2: "twice"}.get(number, f"{number} times")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim, with the experiment that decides it.

    Attributes:
        id: Two letters for the document it stands in, and a number.
        text: The claim, in our own words.
        first_look: The verdict that reading alone suggested; compared with the measured one, never used for it.
        experiment: Defined at the top level of a module; called without arguments, on every rank; returns a frozen
            record of what it measured. Its parameters alter the premise: tests use them as negative controls.
        judge: A pure function from that record to a ruling.
        num_ranks: How many ranks the experiment needs.
        needs: Dotted names that torch must still have, or the claim is skipped.
    """

    id: str
    text: str
    first_look: Verdict
    experiment: Callable[..., Any]
    judge: Callable[[Any], Ruling]
    num_ranks: int = 1
    needs: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The document the claim stands in."""
        return SOURCES[self.id.partition("-")[0]]


@dataclass(frozen=True)
class Result:
    """One claim, run.

    Attributes:
        claim: Which.
        ruling: The judge's ruling on the evidence of this run; or `skipped`, with the reason.
        torch: The version it was run with.
        warnings: What torch warned of meanwhile, as `Category: first sentence`, each once.
        failed: The experiment raised, died or hung, or its control failed: there is no verdict, and the run is no
            success.
    """

    claim: Claim
    ruling: Ruling
    torch: str
    warnings: tuple[str, ...] = ()
    failed: bool = False

    @property
    def disagrees(self) -> bool:
        """Whether the experiment contradicts the first look."""
        return self.ruling.verdict not in (self.claim.first_look, Verdict.SKIPPED)
