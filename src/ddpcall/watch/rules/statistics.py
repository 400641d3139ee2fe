"""DC205 of buffers that nothing sends around: each rank goes on with statistics of its own batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ddpcall.findings import Finding
from ddpcall.taps import CallSite
from ddpcall.watch.rules.replicas import REDUCE_STATISTICS
from ddpcall.watch.rules.rule import make_finding

LEAST_DIFFERENCE = 1e-2
"""Of a buffer's norm; what rounding leaves of equal updates is far less."""


def first_line(sites: Sequence[CallSite]) -> CallSite:
    """Return the line that comes first, of those in the first file."""
    return min(sites, key=lambda site: (site.file != sites[0].file, site.line))


def judge_statistics(
    seen: int,
    step: int,
    parameters: Mapping[int, int],
    differences: Mapping[str, float],
    sites: Mapping[str, CallSite],
) -> Finding | None:
    """Return what is wrong where ranks train one model and keep statistics of their own in it.

    Args:
        seen: The step in which a line was seen to change the buffers.
        step: Optimizer steps done when they were compared.
        parameters: Digest of the model's parameters by rank; where they differ, ranks have models of their own.
        differences: By buffer: how far ranks are apart, relative to its norm.
        sites: By buffer: the line that changes it.
    """
    apart = {name: size for name, size in differences.items() if size > LEAST_DIFFERENCE}
    if not apart or len(set(parameters.values())) > 1 or len(parameters) < 2:
        return None
    named = ", ".join(f"`{name}`" for name in list(apart)[:3])
    message = (
        f"Each rank adds its own batches alone to buffers here: after optimizer step {step} {named} "
        f"{'differs' if len(apart) == 1 else 'differ'} between ranks, by up to {max(apart.values()):.1e} of a "
        "buffer's norm, while the parameters are equal. Nothing sends these buffers around: each rank goes on "
        "with statistics of its own, and a checkpoint has one rank's."
    )
    return make_finding(
        "DC205",
        "own_statistics",
        first_line([sites[name] for name in apart]),
        message,
        step=seen,
        ranks=tuple(sorted(parameters)),
        parameters=tuple(apart),
        fix=REDUCE_STATISTICS,
    )
