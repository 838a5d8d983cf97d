"""The outcome of a run as a table per file, the reasons of what was skipped, and what failed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import Any

OUTCOMES = ("passed", "failed", "skipped")
# of a parametrisation in which no row is left, of which pytest makes a skip
_EMPTY = "got empty parameter set"


def show(report: dict[str, Any], must_pass: Mapping[str, int], verbose: bool) -> int:
    """Print it all; 1 if anything failed, a parametrisation is empty, or fewer passed than `must_pass`, else 0.

    Args:
        report: what `runner.run` returns.
        must_pass: number of tests that must pass at least in each of these files.
        verbose: print the names of the tests that were left out, too.
    """
    counts: dict[str, Counter[str]] = {file: Counter() for file in report["files"]}
    skips: Counter[str] = Counter()
    failures = []
    for test, result in report["outcomes"].items():
        file = test.partition("::")[0].rpartition("/")[2]
        first_line = result["detail"].partition("\n")[0]
        outcome = "failed" if first_line.startswith(_EMPTY) else result["outcome"]
        counts.setdefault(file, Counter())[outcome] += 1
        if outcome == "skipped":
            skips[first_line] += 1
        elif outcome == "failed":
            failures.append((test, first_line))
    _table(counts, report["left_out"])
    if skips:
        print("\nskipped because")
        for reason, number in skips.most_common():
            print(f"{number:7}  {reason}")
    if failures:
        print("\nfailed")
        for test, line in failures:
            print(f"  {test}\n    {line}")
    if verbose:
        _names(report["left_out"])
    few = {file: least for file, least in must_pass.items() if counts[file]["passed"] < least}
    for file, least in few.items():
        print(f"\nonly {counts[file]['passed']} tests passed in {file}, of at least {least}")
    print("\n" + ", ".join(f"{sum(count[name] for count in counts.values())} {name}" for name in OUTCOMES))
    return 1 if failures or few or not report["outcomes"] else 0


def _table(counts: dict[str, Counter[str]], left_out: dict[str, dict[str, list[str]]]) -> None:
    width = max(map(len, counts))
    print(f"\n{'':{width}}" + "".join(f"{name:>10}" for name in OUTCOMES) + f"{'left out':>10}")
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for file, count in sorted(counts.items()):
        tests = left_out.get(file, {})
        print(
            f"{file:{width}}"
            + "".join(f"{count[name]:10}" for name in OUTCOMES)
            + f"{sum(map(len, tests.values())):10}"
        )
        for reason, names in tests.items():
            reasons[reason][file] += len(names)
    if reasons:
        print("\nleft out because")
        for reason, files in reasons.items():
            print(f"{sum(files.values()):7}  {reason}")


def _names(left_out: Mapping[str, Mapping[str, Collection[str]]]) -> None:
    print("\nleft out")
    for file, reasons in sorted(left_out.items()):
        for reason, tests in reasons.items():
            print(f"  {file}: {reason}")
            for test in sorted(set(tests)):
                print(f"    {test}")
