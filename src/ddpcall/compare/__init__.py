"""Would one process have computed the same? A step of all ranks against the same step with the whole batch."""

from ddpcall.compare.result import CAUSES, OneProcessComparison, ParameterNumbers
from ddpcall.compare.same import same_as_one_process

__all__ = ["CAUSES", "OneProcessComparison", "ParameterNumbers", "same_as_one_process"]
