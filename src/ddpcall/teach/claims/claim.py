"""A claim: its text, what a first look suggests, the experiment that decides it, and the judge of its evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ddpcall.teach.question import DEPENDS, FALSE, TRUE, Answer, NotSeen, Outcome, Question

SOURCES = {
    "FI": "a text on `forward` and `_forward_impl`",
    "FM": "an introduction to writing `forward`",
    "CF": "an answer to “why `model(x)` and not `model.forward(x)`?”",
    "TS": "a text on hooks and TorchScript",
}
CLAIMS: list[Claim] = []


@dataclass(frozen=True, kw_only=True)
class Claim(Question):
    """One claim, with the experiment that decides it.

    Attributes:
        first_look: What reading alone suggested; compared with what is measured, never used for it.
        experiment: Called without arguments on every rank; returns what it measured, by name. Its parameters alter
            the premise: tests use them as negative controls.
        judge_evidence: The judge as it is written: it takes the evidence as keyword arguments.
        num_ranks: How many ranks the experiment needs.
        needs: Dotted names that torch must still have, or the claim is skipped.
    """

    first_look: Outcome
    experiment: Callable[..., dict[str, Any]]
    judge_evidence: Callable[..., Answer]
    num_ranks: int = 1
    needs: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """What the claim was read in."""
        return SOURCES[self.key.partition("-")[0]]


def claim(
    key: str,
    text: str,
    first_look: Outcome,
    experiment: Callable[..., dict[str, Any]],
    *,
    num_ranks: int = 1,
    needs: tuple[str, ...] = (),
) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Make a claim of the judge below; the parameters are those of `Claim`."""

    def register(judge: Callable[..., Answer]) -> Callable[..., Answer]:
        CLAIMS.append(
            Claim(
                key=key,
                text=text,
                judge=lambda evidence: judge(**evidence),
                first_look=first_look,
                experiment=experiment,
                judge_evidence=judge,
                num_ranks=num_ranks,
                needs=needs,
            )
        )
        return judge

    return register


def require(seen: bool, control: str) -> None:
    """Insist on a judge's positive control: that a hook "did not fire" says something only if it can.

    Raises:
        NotSeen: The control failed.
    """
    if not seen:
        raise NotSeen(f"the control failed: {control}")


def true_if(holds: bool) -> Outcome:
    """Return `true` or `false`."""
    return TRUE if holds else FALSE


def true_in_parts(parts: Iterable[bool]) -> Outcome:
    """Return `true` if a claim holds in every part, `false` if in none, else `depends`."""
    held = list(parts)
    return true_if(any(held)) if all(held) == any(held) else DEPENDS


def times(number: int) -> str:
    """Say how often: "never", "once", "3 times"."""
    return {0: "never", 1: "once", 2: "twice"}.get(number, f"{number} times")
