"""What importing costs: `python -m benchmarks.import_time [RUNS]`.

Prints the median seconds of `import drkl` after torch is there (to stay below 0.2) and of `drkl --help` (below 1).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

BEYOND_TORCH = "import time, torch; t = time.perf_counter(); import drkl; print(time.perf_counter() - t)"
HELP = "import sys; sys.argv = ['drkl', '--help']; from drkl.cli import main; main()"


def seconds_of_import() -> float:
    """Seconds that `import drkl` takes in a fresh process that has imported torch."""
    done = subprocess.run([sys.executable, "-c", BEYOND_TORCH], capture_output=True, text=True, check=True)
    return float(done.stdout)


def seconds_of_help() -> float:
    """Wall seconds of `drkl --help`, the start of the interpreter included."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", HELP], capture_output=True, check=True)
    return time.perf_counter() - started


def median(measure: Callable[[], float], runs: int) -> float:
    """Median of ``runs`` measurements; a first one, that warms the disk cache, is left out."""
    measure()
    return statistics.median(measure() for _ in range(runs))


def main() -> None:
    """Measure and print."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"import drkl beyond torch: {median(seconds_of_import, runs):.3f} s")
    print(f"drkl --help:              {median(seconds_of_help, runs):.3f} s")


if __name__ == "__main__":
    main()
