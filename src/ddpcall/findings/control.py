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
        "(local SGD); a rank crashed by itself, or took no step at all. Where a collective failed because another "
        "rank's script was over, it is told of that collective.",
        blind_to="Steps that all ranks skip equally often, but not the same ones; other optimizers than the first "
        "that stepped a wrapped model.",
        links=(
            "https://github.com/huggingface/trl/issues/254",
            "https://docs.pytorch.org/docs/stable/distributed.algorithms.join.html",
        ),
    ),
    Rule(
        code="DC503",
        name="ranks-wait-apart",
        severity=Severity.ERROR,
        title="The run hangs: ranks wait in different collectives, or for a rank whose script is over",
        why="A collective ends when all ranks of its group are in it. A rank that skips a backward, calls one "
        "more `barrier` or has fewer batches is never there, and the others wait until a timeout, of minutes, "
        "says which collective failed, but not why.",
        wrong="if not loss.isfinite():  # this rank's own loss\n    continue  # the others wait in their backward",
        fix="Let every rank run the same collectives in the same order: decide on what all ranks share, "
        "`dist.all_reduce(flag, op=dist.ReduceOp.MIN)`.",
        silent_when="A rank is slow (an evaluation, a checkpoint, a first compilation, its data): where each rank "
        "stands is said after `--hang-after` seconds, 60 by default, and is no finding. A rank that is in no "
        "collective and has done more optimizer steps than one that waits is a warning.",
        blind_to="Which of the ranks is wrong, where counts do not tell; who waits for whom in a send or a "
        "receive; a hang that holds the interpreter's lock, or that is shorter than `--hang-after`.",
        links=(
            "https://docs.pytorch.org/docs/stable/distributed.html#monitored-barrier",
            "https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html",
            "https://github.com/Lightning-AI/pytorch-lightning/issues/20404",
        ),
    ),
)
