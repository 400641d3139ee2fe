"""What `import ddpcall` costs beyond `import torch`: fresh interpreters, alternating, medians."""

import statistics
import subprocess
import sys

ROUNDS = 9
CODE = "import time; import torch; began = time.perf_counter(); {then}; print(time.perf_counter() - began)"


def measure(then: str) -> float:
    """Return the milliseconds that a statement takes after `import torch`."""
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(then=then)], capture_output=True, text=True, check=True
    )
    return float(done.stdout) * 1000


def main() -> None:
    """Measure and print."""
    pairs = [(measure("pass"), measure("import ddpcall")) for _ in range(ROUNDS)]
    nothing, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"import ddpcall, beyond import torch: {ours - nothing:.2f} ms (target: at most 50 ms)")


if __name__ == "__main__":
    main()
