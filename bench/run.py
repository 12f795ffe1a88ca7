"""`make bench`: measure our way beside the plain way, in alternation, and write the medians to bench/results/.

Each file bench/bench_*.py has a function `list_comparisons() -> list[Comparison]`. The two ways of a comparison take turns,
so that whatever else the machine does falls on both; the median of the rounds counts. Names given on the command line
choose files (`python bench/run.py phantom`).
"""

import argparse
import importlib
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).resolve().parent
KNOWN = ("name", "ratio", "median_ours", "median_plain", "lowest_ours", "highest_plain", "unit", "rounds", "what", "machine")


@dataclass(frozen=True)
class Comparison:
    """Two ways to the same end; each function does the work once and returns its rate in `unit` (more is better)."""

    name: str
    ours: Callable[[], float]
    plain: Callable[[], float]
    what: str  # the difference between the two, in a few words
    unit: str = "images/s"
    extra: Callable[[float], dict] | None = None  # given the ratio, more columns of the row


def measure(comparison: Comparison, rounds: int = 5) -> dict:
    """Run both ways once to warm up and then `rounds` times in turn; return the row for the table."""
    rates = {"ours": [], "plain": []}
    for _ in range(rounds + 1):
        for way, found in rates.items():
            found.append(getattr(comparison, way)())
    ours, plain = (statistics.median(found[1:]) for found in rates.values())
    row = {"name": comparison.name, "ratio": ours / plain, "median_ours": ours, "median_plain": plain,
            "lowest_ours": min(rates["ours"][1:]), "highest_plain": max(rates["plain"][1:]), "unit": comparison.unit,
            "rounds": rounds, "what": comparison.what, "machine": describe_machine()}  # fmt: skip
    return row | (comparison.extra(row["ratio"]) if comparison.extra else {})


def describe_machine() -> str:
    """Return processor, cores in use and device, as they stand beside every figure."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{platform.system()} {platform.machine()}, {cores} cores, {torch.get_num_threads()} threads, {device}"


def main() -> None:
    """Run the benchmarks named on the command line (all if none) and print each row as it is found."""
    os.environ["MEDAUG_HEADLESS"] = "1"  # bars go to the terminal only
    known = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*known, []], help=f"of {', '.join(known)}; all if none is given")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    for name in given.names or known:
        rows = []
        for comparison in importlib.import_module(f"bench_{name}").list_comparisons():
            row = measure(comparison, given.rounds)
            print(f"{row['name']:28} {row['ratio']:6.2f}x  {row['median_ours']:9.1f} beside {row['median_plain']:9.1f} "
                  f"{row['unit']}  ({row['what']})", flush=True)
            more = {key: value for key, value in row.items() if key not in KNOWN}
            if more:
                print(" " * 28, ", ".join(f"{key} {value:.4g}" for key, value in more.items()), flush=True)
            rows.append(row)
        if not rows:
            print(f"{name}: not on this machine (no GPU)")
            continue
        target = FOLDER / "results" / f"{name}.csv"
        target.parent.mkdir(exist_ok=True)
        pd.DataFrame(rows).to_csv(target, index=False, float_format="%.4g", lineterminator="\n")


if __name__ == "__main__":
    sys.modules["run"] = sys.modules["__main__"]  # the benchmarks import Comparison from here
    main()
