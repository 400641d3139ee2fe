"""What people write about `forward`, tried: every claim is a small experiment to run and to read.

An experiment returns what it measured, by name; a judge, a pure function, turns that into a word and one sentence.
Both stand on their own: a learner can copy and change them (`ddpcall claims CF-3 --show`). That is why this
room, like `paths`, may spell `.forward(`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ddpcall.lab.errors import WrongUse
from ddpcall.teach.claims import calling, distributed, hooks, observing, torchscript
from ddpcall.teach.claims.claim import CLAIMS, SOURCES, Claim

__all__ = ["CLAIMS", "SOURCES", "Claim", "find_claims"]

_TOPICS = (calling, hooks, torchscript, observing, distributed)
CLAIMS.sort(key=lambda claim: (list(SOURCES).index(claim.key[:2]), int(claim.key[3:])))


def find_claims(keys: Sequence[str]) -> list[Claim]:
    """Return the claims with these ids, in the order asked for, each once; all of them for no ids.

    Args:
        keys: Such as "CF-3", in either case.

    Raises:
        WrongUse: There is no claim with one of the ids; names the nearest.
    """
    by_key = {claim.key: claim for claim in CLAIMS}
    for asked in keys:
        if asked.upper() not in by_key:
            nearest = difflib.get_close_matches(asked.upper(), by_key, n=3, cutoff=0)
            raise WrongUse(
                f"there is no claim {asked!r}. The nearest are {', '.join(nearest)}; "
                "`ddpcall claims --list` shows all of them"
            )
    return [by_key[asked] for asked in dict.fromkeys(asked.upper() for asked in keys)] if keys else list(CLAIMS)
