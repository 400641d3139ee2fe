"""What a run proves: who learned from whom in the steps that were measured, in one sentence. No torch.

Says facts and judges none of them: a sum instead of a mean, weights, or a transformed gradient may be meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ALONE = {
    "averaged": "every rank used the mean of {ranks} ranks' gradients",
    "summed": "every rank used the sum of {ranks} ranks' gradients",
    "scaled": "every rank used {scale:.4g} times the mean of {ranks} ranks' gradients, as after clipping or with "
    "a loss scale",
    "weighted": "every rank used the same gradient, in which the ranks do not weigh the same",
    "transformed": "every rank used the same gradient, which is no mixture of what they computed (compression, "
    "clipping by value or by parameter)",
    "local": "every rank used its own gradient alone",
    "unaccounted": "every rank used gradients that no backward on its parameters was seen to compute",
}


def tells_something(mixing: Mapping[str, Any]) -> bool:
    """Say whether any measured step told who learned from whom."""
    shapes: Mapping[str, int] = mixing.get("shapes", {})
    return any(count for shape, count in shapes.items() if shape not in ("unidentifiable", "unaccounted"))


def certify(mixing: Mapping[str, Any], not_measured: str) -> str:
    """Return what was measured, as a part of a sentence; empty where nothing was to be measured.

    Args:
        mixing: The fields of `ddpcall.watch.rules.mixing.Certificate`.
        not_measured: Why no step was measured any more; empty where nothing went wrong.
    """
    steps = mixing.get("steps", 0)
    if not steps:
        return f"gradients not measured ({not_measured})" if not_measured else ""
    shapes: dict[str, int] = mixing["shapes"]
    measured = f"{steps} step{'s' * (steps != 1)} measured"
    told = {shape: count for shape, count in shapes.items() if shape != "unidentifiable"}
    if not told:
        return f"{measured}, who learned from whom could not be told ({mixing['reason']})"
    if len(told) == 1:
        [shape] = told
        ranks = "both" if mixing["ranks"] == 2 else f"all {mixing['ranks']}"
        sentence = _ALONE.get(shape, f"shape of the mixing matrix: {shape.replace('_', ' ')}")
        sentence = sentence.format(ranks=ranks, scale=mixing["scale"] or 0.0)
    else:
        sentence = "shape of the mixing matrix: " + ", ".join(
            f"{shape.replace('_', ' ')} in {count}" for shape, count in told.items()
        )
    if set(told) <= {"averaged", "summed", "scaled"}:
        sentence += f" (largest residual {mixing['residual']:.0e})"
    untold = shapes.get("unidentifiable", 0)
    return f"{measured}: {sentence}" + f"; {untold} of them could not be told" * (untold > 0)
