"""All claims, in the order of the documents they stand in."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ddpcall.lab.errors import WrongUse
from ddpcall.teach.claims import calling, distributed, hooks, observing, scripted_hooks, scripting
from ddpcall.teach.claims.claim import SOURCES, Claim

_MODULES = (calling, hooks, scripting, scripted_hooks, observing, distributed)


def _document_order(claim: Claim) -> tuple[int, int]:
    prefix, _, number = claim.id.partition("-")
    return list(SOURCES).index(prefix), int(number)


CLAIMS: tuple[Claim, ...] = tuple(
    sorted((claim for module in _MODULES for claim in module.CLAIMS), key=_document_order)
)


def find_claims(ids: Sequence[str]) -> list[Claim]:
    """Return the claims with these ids, in the order asked for, each once; all of them for no ids.

    Args:
        ids: Such as "CF-3", in either case.

    Raises:
        WrongUse: There is no claim with one of the ids; names the nearest.
    """
    if not ids:
        return list(CLAIMS)
    by_id = {claim.id: claim for claim in CLAIMS}
    for asked in ids:
        if asked.upper() not in by_id:
            nearest = difflib.get_close_matches(asked.upper(), by_id, n=3, cutoff=0)
            raise WrongUse(
                f"there is no claim {asked!r}. The nearest are {', '.join(nearest)}; "
                "`ddpcall claims --list` shows all of them"
            )
    return [by_id[asked] for asked in dict.fromkeys(asked.upper() for asked in ids)]
