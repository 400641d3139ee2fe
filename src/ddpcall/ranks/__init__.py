"""Run a function on N local ranks: from a warm pool in milliseconds, or in fresh interpreters.

    from ddpcall.ranks import run_on_ranks

    losses = run_on_ranks(train_step, 2)

Nothing starts at import time, and nothing is left running when the process ends.
"""

from ddpcall.ranks.outcomes import RankOutcome, RanksFailed
from ddpcall.ranks.pool import RankPool, run_on_ranks

__all__ = ["RankOutcome", "RankPool", "RanksFailed", "run_on_ranks"]
