"""When to choose DLoR: what the rows answer, each question in a table of its own."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from .reading import Arm, Reading
from .statistics import Difference, corrected, paired

DLOR = "dlor scaled U x4"
"""The default form and the default rates of `dlor_peft.create_dlor_optimizer`."""

COMPARED = {"LoRA": "lora", "DoRA": "dora", "DLoR with one rate": "dlor scaled"}
"""Name -> method."""

SMALL = (1, 2)

DEPTHS = {1: "dlor multiplicative", 2: "dlor multiplicative depth 2", 4: "dlor multiplicative depth 4"}


def answers(readings: Iterable[Reading], times: list[dict[str, Any]]) -> list[str]:
    """In Markdown; a question that no row answers yet is left out."""
    readings = list(readings)
    tables = (
        *(_headline(readings, times, name, method) for name, method in COMPARED.items()),
        _small_budgets(readings),
        _forgetting(readings),
        _robustness(readings),
        _alignment(readings),
    )
    return [table for table in tables if table]


def compare(reading: Reading, one: Arm, other: Arm) -> Difference | None:
    """Test, seed by seed, of the same seeds; None of fewer than three, or where a seed of either diverged."""
    values, others = reading.test.get(one, {}), reading.test.get(other, {})
    seeds = sorted(set(values) & set(others))
    if len(seeds) < 3 or one == other or reading.num_diverged(one) or reading.num_diverged(other):
        return None
    return paired([values[s] for s in seeds], [others[s] for s in seeds], reading.margin)


def with_lora(reading: Reading, k: int) -> dict[Arm, Difference]:
    """Of every arm of a budget less LoRA, one family of tests; what has no budget (0) less the largest LoRA."""
    arms = [arm for arm in reading.test if arm[1] == k]
    found = {arm: compare(reading, arm, ("lora", k or 8)) for arm in arms}
    return corrected({arm: difference for arm, difference in found.items() if difference})


def shown(found: Difference) -> str:
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _table(title: str, text: str, head: str, lines: list[str]) -> str:
    if not lines:
        return ""
    rule = "|" + "---|" * (head.count("|") - 1)
    return "\n".join((f"## {title}", "", text, "", head, rule, *lines))


def headline(readings: Iterable[Reading], method: str) -> dict[tuple[str, int], Difference]:
    """Of the default form and rates less a method, by task and budget, each alone."""
    budgets = [(reading, k) for reading in readings for k in sorted({k for _, k in reading.test})]
    return {
        (reading.task, k): difference
        for reading, k in budgets
        if (difference := compare(reading, (DLOR, k), (method, k)))
    }


def _headline(readings: list[Reading], times: list[dict[str, Any]], name: str, method: str) -> str:
    """Of the default form and rates, over all tasks and budgets."""
    found = headline(readings, method)
    ratios = {
        (one["task"], one["k"]): f"{one['methods'][DLOR]['median'] / one['methods'][method]['median']:.2f}"
        for one in times
        if {DLOR, method} <= one["methods"].keys()
    }
    lines = [
        f"| {task} | {k} | {shown(difference)} | {found[task, k].p:.3f} | {difference.p:.3f} "
        f"| {difference.is_equivalent} | {ratios.get((task, k), '')} |"
        for (task, k), difference in corrected(found).items()
    ]
    return _table(
        f"DLoR and {name}",
        f"Test metric of {DLOR} less that of {method}, paired by seed, and the time of a training step over that "
        "one's. One family of tests: Holm's correction, and that of equivalence, are over all tasks and budgets.",
        "| task | k | difference | p | p (Holm) | equivalent | time |",
        lines,
    )


def _small_budgets(readings: list[Reading]) -> str:
    lines = [
        f"| {reading.task} | {k} | {method} | {shown(difference)} | {difference.p:.3f} | {difference.is_equivalent} |"
        for reading in readings
        for k in SMALL
        for (method, _), difference in with_lora(reading, k).items()
        if method.startswith("dlor")
    ]
    return _table(
        "Budgets of LoRA r 1 and 2",
        "Test metric less LoRA's, as in the tables of the tasks.",
        "| task | k | method | difference | p (Holm) | equivalent |",
        lines,
    )


def _forgetting(readings: list[Reading]) -> str:
    found = {}
    for reading in readings:
        for arm in reading.test:
            pairs = _at_equal_loss(reading, arm, ("lora", arm[1] or 8))
            if len(pairs) >= 3 and arm[0] != "lora":
                own, lora = zip(*pairs, strict=True)
                found[reading.task, arm] = (own, lora, paired(own, lora, margin=reading.margin))
    differences = corrected({key: difference for key, (_, _, difference) in found.items()})
    lines = [
        f"| {task} | {k or '-'} | {method} | {np.mean(own):.3f} | {np.mean(lora):.3f} "
        f"| {shown(difference)} | {difference.p:.3f} |"
        for ((task, (method, k)), (own, lora, _)), difference in zip(found.items(), differences.values(), strict=True)
    ]
    return _table(
        "Forgetting at equal task loss",
        "Bits a byte on what the base was trained on, where a run and LoRA's of the same seed have the same task "
        "loss, the higher of their last two. The other one is there in the middle of its run, at a higher rate than "
        "at its end: interpolated on its way. Each has its own best learning rate.",
        "| task | k | method | base | base, LoRA | difference | p (Holm) |",
        lines,
    )


def _at_equal_loss(reading: Reading, arm: Arm, other: Arm) -> list[tuple[float, float]]:
    paths, others = (
        {seed: _path(reading, row) for seed, row in reading.reported(of_arm).items() if "path" in row}
        for of_arm in (arm, other)
    )
    pairs = []
    for seed in sorted(set(paths) & set(others)):
        target = max(paths[seed][-1][0], others[seed][-1][0])
        own, other_one = _base_at(paths[seed], target), _base_at(others[seed], target)
        if own is not None and other_one is not None:
            pairs.append((own, other_one))
    return pairs


def _path(reading: Reading, row: dict[str, Any]) -> list[tuple[float, float]]:
    """Task and base loss, from the start to the end of the run."""
    return [(task, base) for _, task, base in row["path"]] + [(row["test"][reading.metric], row["base_loss"])]


def _base_at(path: list[tuple[float, float]], target: float) -> float | None:
    """The base loss where the task loss falls to the target for the last time; None where it never does."""
    for (task, base), (next_task, next_base) in reversed(list(pairwise(path))):
        if task >= target >= next_task:
            share = (task - target) / (task - next_task) if task > next_task else 1.0
            return base + share * (next_base - base)
    return None


def _robustness(readings: list[Reading]) -> str:
    lines = []
    for reading in readings:
        budgets = sorted({k for _, k in reading.dev if k > 0})
        series: dict[str, dict[int, Arm]] = {
            f"{method} | k": {k: (method, k) for k in budgets}
            for method in sorted({method for method, _ in reading.dev})
        }
        series |= {
            f"dlor multiplicative, k {k} | depth": {depth: (method, k) for depth, method in DEPTHS.items()}
            for k in budgets
        }
        for name, arms in series.items():
            values = {at: first for at, arm in arms.items() if (first := reading.first(arm))}
            if len(values) < 2:
                continue
            best = {at: next(iter(first)) for at, first in values.items()}
            kept = best[min(best)]
            rates = ", ".join(f"{at}: {lr:.2g}" for at, lr in best.items())
            if any(kept not in reading.dev[arms[at]] for at in values):
                lost = "not tried"
            elif any(kept not in first for first in values.values()):
                lost = "diverged"
            else:
                lost = (
                    f"{max(reading.sign * (first[best[at]] - first[kept]) for at, first in values.items()) + 0.0:.4f}"
                )
            lines.append(f"| {reading.task} | {name} | {rates} | {lost} |")
    return _table(
        "The learning rate over budgets and depths",
        "The best on dev with the first seed, and the most that is lost there by keeping the one of the smallest.",
        "| task | method | over | learning rates | lost |",
        lines,
    )


def _alignment(readings: list[Reading]) -> str:
    found = []
    for reading in readings:
        full = reading.best(("full", 0))
        of_full = [row for run, row in reading.rows.items() if full and (run.method, run.lr) == ("full", full.lr)]
        indices = [row["alignment"] for row in of_full if "alignment" in row]
        gains = {k: difference for k in (1, 2, 4, 8) if (difference := compare(reading, (DLOR, k), ("lora", k)))}
        if indices and gains:
            rows, columns = (float(np.mean([index[axis] for index in indices])) for axis in ("rows", "columns"))
            k = min(gains)
            # in units of what would not matter, so that tasks can be compared
            found.append((reading, k, rows, columns, gains[k], reading.sign * gains[k].mean / reading.margin))
    lines = [
        f"| {reading.task} | {rows:.2f} | {columns:.2f} | {k} | {shown(gain)} | {units:+.2f} |"
        for reading, k, rows, columns, gain, units in found
    ]
    text = (
        "Alignment index of what full fine-tuning changed (rows, columns; mean over the layers), and what DLoR gains "
        "over LoRA at the smallest budget, on test and in margins of equivalence."
    )
    if len(found) >= 3:
        correlation: Any = spearmanr([one[2] for one in found], [one[5] for one in found])
        text += f" Spearman's correlation of rows and gain: {correlation.statistic:+.2f} over {len(found)} tasks."
    return _table(
        "The alignment index as a predictor", text, "| task | rows | columns | k | gain | in margins |", lines
    )
