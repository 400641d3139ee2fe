"""`python -m tests.soak --seed 0 --cases 1000`: random faults, and what the watch and the lab promise of each.

Every case has a seed of its own, `--seed` plus its number, and one that fails prints the command that repeats it.
"""

import argparse
import sys
import time
from collections import Counter

from tests.soak.cases import Soak, draw

parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--cases", type=int, default=1000)
options = parser.parse_args()

began, failed, counts = time.monotonic(), 0, Counter()
with Soak() as soak:
    for seed in range(options.seed, options.seed + options.cases):
        case = draw(seed)
        counts[case["kind"], case["fault"]] += 1
        broken = soak.run(case)
        if broken:
            failed += 1
            print(f"{case}\n  " + "\n  ".join(broken), flush=True)
            print(f"  repeat it: python -m tests.soak --seed {seed} --cases 1\n", flush=True)
for (kind, fault), count in sorted(counts.items()):
    print(f"{count:5} {kind} {fault}")
print(
    f"{options.cases} cases from seed {options.seed} in {time.monotonic() - began:.0f} s: {failed} broke a promise"
)
sys.exit(failed > 0)
