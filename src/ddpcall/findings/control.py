"""DC5xx: what the ranks do, and how often."""

from __future__ import annotations

from ddpcall.findings.finding import Rule, Severity

RULES = (
    Rule(
        code="DC502",
        name="ranks-step-apart",
        severity=Severity.ERROR,
        title="Ranks took different numbers of optimizer steps, and ended with different parameters",
        why="A gradient is averaged over all ranks, but only some of them use it: each rank that skips a step by "
        "its own measure (its KL, its loss, its number of batches) keeps other parameters from there on.",
        wrong="if kl > 1.5 * target_kl:  # this rank's own KL\n    break",
        fix="Decide on what all ranks share: `dist.all_reduce(kl, op=dist.ReduceOp.AVG)` before the comparison.",
        silent_when="The parameters are equal at the end (`Join` broadcasts them); the script averages parameters "
        "(local SGD); a rank crashed, or took no step at all.",
        blind_to="Steps that all ranks skip equally often, but not the same ones; other optimizers than the first "
        "that stepped a wrapped model.",
        links=(
            "https://github.com/huggingface/trl/issues/254",
            "https://docs.pytorch.org/docs/stable/distributed.algorithms.join.html",
        ),
    ),
)
