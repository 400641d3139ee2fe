"""The mixing matrix: who learned from whom in an optimizer step, measured.

In a step, rank i uses the gradient `used_i = Σ_j W[i, j] own_j`, where `own_j` is what rank j's own computation
contributed before any communication. Data parallelism means that every entry of W is 1 / N. Three pieces, one
after the other: each rank collects sketches (no communication), the ranks exchange them, and every rank judges the
same records.
"""

from ddpcall.mixing.collect import MixingCollector
from ddpcall.mixing.exchange import RanksMissing, exchange_records
from ddpcall.mixing.judge import judge_records
from ddpcall.mixing.measure import MixingMeasurement, measure_mixing
from ddpcall.mixing.record import RankSketches
from ddpcall.mixing.result import Mixing
from ddpcall.mixing.shapes import SHAPES

__all__ = [
    "SHAPES",
    "Mixing",
    "MixingCollector",
    "MixingMeasurement",
    "RankSketches",
    "RanksMissing",
    "exchange_records",
    "judge_records",
    "measure_mixing",
]
