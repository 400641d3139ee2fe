"""Gradients that may be in order: whether they are shows only when the ranks are compared."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable

from torch import Tensor

from ddpcall.findings import Finding
from ddpcall.mixing.places import clean_name
from ddpcall.replicas import digest_tensor
from ddpcall.watch.findings_book import FindingsBook


class Suspects:
    """Findings that harm nobody unless their gradients were not the same on all ranks.

    The script reduced them itself, as far as its collectives tell, or wrote them itself. Where the parameters
    differ all the same, and these gradients too, the findings say why.
    """

    def __init__(self, book: FindingsBook) -> None:
        """Take where findings are suspected, and confirmed."""
        self._book = book
        self._parameters: dict[Hashable, tuple[str, ...]] = {}
        self._digests: dict[Hashable, tuple[int, ...]] = {}

    def add(self, key: Hashable, finding: Finding, gradients: Iterable[Tensor]) -> None:
        """Suspect a finding; digests the gradients that are about to be used."""
        self._book.suspect(key, finding)
        self._parameters[key] = finding.parameters
        self._digests[key] = tuple(map(digest_tensor, gradients))

    def digest(self) -> int | None:
        """Return a digest of the gradients as they were last used, None where nothing is suspected."""
        return hash(tuple(self._digests.values())) if self._digests else None

    def convict(self, names: Collection[str] | None = None) -> None:
        """Confirm what was suspected; only of these parameters, where names are given."""
        for key, parameters in list(self._parameters.items()):
            if names is None or not set(names).isdisjoint(map(clean_name, parameters)):
                self._book.confirm(key)
