"""The outcome of a run as a table per file, the reasons of what was skipped, and what failed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from typing import Any

OUTCOMES = ("passed", "failed", "skipped")


def show(report: dict[str, Any], must_collect: Collection[str]) -> int:
    """Print it all; 1 if anything failed, nothing ran, or nothing takes DLoR in a file of `must_collect`, else 0."""
    counts: dict[str, Counter[str]] = {file: Counter() for file in report["files"]}
    skips: Counter[str] = Counter()
    failures = []
    for test, result in report["outcomes"].items():
        file = test.partition("::")[0].rpartition("/")[2]
        counts.setdefault(file, Counter())[result["outcome"]] += 1
        first_line = result["detail"].partition("\n")[0]
        if result["outcome"] == "skipped":
            skips[first_line] += 1
        elif result["outcome"] == "failed":
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
    empty = [file for file in must_collect if not counts[file]]
    if empty:
        print(f"\nno test takes DLoR in {', '.join(empty)}")
    print("\n" + ", ".join(f"{sum(count[name] for count in counts.values())} {name}" for name in OUTCOMES))
    return 1 if failures or empty or not report["outcomes"] else 0


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
