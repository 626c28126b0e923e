"""Time of `import shapwrap` as a multiple of `import torch, timm`, the median of several runs.

python benchmarks/import_time.py
"""

import argparse
import statistics
import subprocess
import sys
import time


def seconds(statement: str) -> float:
    """Wall-clock time of a new interpreter that runs one statement."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Interleave the two, so that a busy machine slows both; print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--limit", type=float, default=None, help="exit 1 above this ratio")
    options = parser.parse_args()
    seconds("import shapwrap, timm")
    pairs = [
        (seconds("import shapwrap"), seconds("import torch, timm")) for _ in range(options.runs)
    ]
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    print(f"import shapwrap takes {ratio:.2f} x the time of import torch, timm")
    if options.limit is not None and ratio > options.limit:
        sys.exit(f"above the limit of {options.limit}")


if __name__ == "__main__":
    main()
