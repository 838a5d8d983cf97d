"""DLoR beside other PEFT methods and full fine-tuning, at equal parameters, on real data.

    python scripts/study.py --shared DIR --minutes 60                 # go on with the runs that are missing
    python scripts/study.py --shared DIR --tasks "stsb" --budgets 1 8 --methods lora "dlor scaled"
    python scripts/study.py --shared DIR --times --budgets 8          # how long a step takes, on a quiet machine
    python scripts/study.py --shared DIR --pretrained BASES --pretrain 3   # a wider language model, for a GPU machine
    python scripts/study.py --shared DIR --pretrained BASES --tasks "shakespeare llama" --workers 16
    python scripts/study.py --report                                  # tables and figures of what is there

DIR holds data/ and models/, see study_parts/sources.py. Rows are appended to study_parts/results (or
--results), one file for each kind of hardware, as runs finish; a run that is there is never repeated. Runs go side by
side, one thread each; one that fails is told, and tried again at the next start.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

CORE_METHODS = (
    "lora",
    "dlor scaled",
    "dlor scaled U x4",
    "dlor scaled both",
    "dora",
    "dlor additive",
    "dlor multiplicative",
    "rslora",
    "lora+",
    "pissa",
    "hra",
    "miss",
    "oft",
    "vera",
    "ia3",
    "head",
    "full",
    "probe",
)
ROUNDS = 9
RESULTS = Path(__file__).parent / "study_parts" / "results"
CORE_TASKS = ("banking77 10 a class", "stsb 500 pairs", "shakespeare stories260K")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=folder_with("data", "models"), help="the folder of data and models")
    parser.add_argument(
        "--encoder",
        type=folder_with("config.json"),
        help="a folder with MiniLM, where its package is not installed",
    )
    parser.add_argument("--pretrained", type=Path, help="a folder of further language models, each a task")
    parser.add_argument("--pretrain", type=above_0, metavar="MINUTES", help="make --pretrained's `llama`; run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of rows, times and report")
    parser.add_argument("--minutes", type=above_0, default=60, help="no run is started later")
    parser.add_argument("--workers", type=count, default=os.cpu_count() or 1)
    parser.add_argument("--tasks", nargs="+", default=CORE_TASKS)
    parser.add_argument("--methods", nargs="+", default=CORE_METHODS)
    parser.add_argument("--budgets", nargs="+", type=count, default=(1, 2, 4, 8))
    parser.add_argument(
        "--seeds", type=int, choices=range(6), default=5, help="how many are run on test; with 0 the grid alone"
    )
    parser.add_argument(
        "--times",
        action="store_true",
        help="time a step of each method, in turn, in the place of what was timed; run nothing else",
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    if arguments.results.exists() and not arguments.results.is_dir():
        parser.error(f"--results: {arguments.results} is a file; give a folder")
    if arguments.report:
        from study_parts.report import write_report

        if not any(arguments.results.glob("*.jsonl")):
            parser.error(f"--results: {arguments.results} has no rows (*.jsonl) to report; run the study first")
        print(write_report(arguments.results))
        return 0
    if arguments.shared is None:
        parser.error("--shared: the folder of data and models is needed to run")
    if arguments.pretrain is not None and arguments.pretrained is None:
        parser.error("--pretrain: give --pretrained, the folder that the model is written to")
    if arguments.pretrain is None and arguments.pretrained is not None and not arguments.pretrained.is_dir():
        parser.error(f"--pretrained: {arguments.pretrained} is no folder; make it with --pretrain MINUTES")
    # before torch loads: a run has one core
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments.sources = sources_of(arguments)
    if arguments.pretrain is not None:
        pretrain_llama(arguments)
        return 0
    if arguments.times:
        return 0 if time_steps(arguments) else 1
    return 0 if run_missing(arguments) else 1


def folder_with(*names: str) -> Callable[[str], Path]:
    """The type of an argument."""

    def folder(text: str) -> Path:
        if missing := [name for name in names if not (Path(text) / name).exists()]:
            raise argparse.ArgumentTypeError(f"{text} has no {' and no '.join(missing)}")
        return Path(text)

    return folder


def above_0(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def sources_of(arguments: argparse.Namespace) -> Any:
    from study_parts.sources import Sources

    if arguments.pretrain is not None:
        return Sources(arguments.shared)
    given = {"encoder": arguments.encoder and str(arguments.encoder), "pretrained": arguments.pretrained}
    return Sources(arguments.shared, **{name: value for name, value in given.items() if value is not None})


def pretrain_llama(arguments: argparse.Namespace) -> None:
    from study_parts.pretraining import pretrain

    arguments.pretrained.mkdir(parents=True, exist_ok=True)
    pretrain(arguments.sources, arguments.pretrained / "llama", arguments.pretrain)


def time_steps(arguments: argparse.Namespace) -> bool:
    """Whether the machine was quiet enough for all of them."""
    from study_parts.methods import PROBE
    from study_parts.times import add_times, measure_times

    check_names(arguments)
    methods: dict[tuple[str, int], list[str]] = {(task, k): [] for task in arguments.tasks for k in arguments.budgets}
    for cell in possible_cells(arguments):
        for place in [(cell.task, cell.k)] if cell.k else [place for place in methods if place[0] == cell.task]:
            if cell.method != PROBE:
                methods[place].append(cell.method)
    is_quiet = True
    for (task, k), names in methods.items():
        times = measure_times(arguments.sources, task, names, k, ROUNDS)
        if times["is_void"]:
            is_quiet = False
            print(f"{task}, k {k}: not written, LoRA took {times['itself']:.3f} of its own time: quiet the machine")
        else:
            add_times({**times, "versions": versions(), "commit": commit()}, arguments.results)
    return is_quiet


def check_names(arguments: argparse.Namespace) -> None:
    from study_parts.methods import METHODS, PROBE, UNMATCHED
    from study_parts.tasks import tasks

    for name, words, allowed in (
        ("--tasks", arguments.tasks, tasks(arguments.sources)),
        ("--methods", arguments.methods, (*METHODS, *UNMATCHED, PROBE)),
    ):
        if wrong := [word for word in words if word not in allowed]:
            sys.exit(f"study: {name}: {wrong[0]!r} is none of {', '.join(allowed)}")


def possible_cells(arguments: argparse.Namespace) -> list[Any]:
    from study_parts.results import Results
    from study_parts.schedule import cells, is_possible, of_another_setting
    from study_parts.tasks import tasks

    known = tasks(arguments.sources)
    layers = {name: known[name].targets(known[name].build(0)) for name in arguments.tasks}
    plan = []
    for cell in cells(arguments.tasks, arguments.methods, arguments.budgets):
        if is_possible(cell, known[cell.task], layers[cell.task]):
            plan.append(cell)
        else:
            print(f"left out: {cell.method} has no form for {cell.task} with the parameters of LoRA r {cell.k}")
    results = Results(arguments.results)
    if stale := [run for cell in plan for run in of_another_setting(cell, known[cell.task], layers, results.rows)]:
        sys.exit(
            f"study: {len(stale)} rows of {results.path.name} were run with other steps, batches, rates of the head "
            f"or ranks than now, the first is {stale[0]}: remove them, or go back to the code that they are of"
        )
    return plan


def run_missing(arguments: argparse.Namespace) -> bool:
    """Whether every run that was started came to its end."""
    from study_parts.reading import Reading, read
    from study_parts.results import Results, Run
    from study_parts.schedule import missing

    check_names(arguments)
    results = Results(arguments.results)
    plan = possible_cells(arguments)
    facts = {"versions": versions(), "commit": commit()}
    end = time.monotonic() + 60 * arguments.minutes
    pending: dict[Future[dict[str, Any]], Run] = {}
    failed: set[Run] = set()

    def next_runs() -> Iterator[Run]:
        readings = read(results.rows)
        for cell in plan:
            for run in missing(cell, readings.get(cell.task) or Reading(cell.task, {}), arguments.seeds):
                if run not in pending.values() and run not in failed:
                    yield run

    with ProcessPoolExecutor(arguments.workers, get_context("spawn"), initializer=end_with_parent) as pool:
        while True:
            if time.monotonic() < end:
                for run in next_runs():
                    if len(pending) >= arguments.workers:
                        break
                    pending[pool.submit(run_in_process, run, arguments.sources)] = run
            if not pending:
                return not failed
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                run = pending.pop(future)
                name = f"{run.task} | {run.method} | k {run.k} | lr {run.lr} | seed {run.seed}"
                if isinstance(error := future.exception(), BrokenExecutor):
                    print(
                        f"{name} | its process was killed, for its memory perhaps: start again, with fewer --workers"
                    )
                    return False
                if error:
                    failed.add(run)
                    print(f"{name} | failed, left out until the next start: {error!r}", flush=True)
                    continue
                results.add(run, {**future.result(), **facts})
                print(f"{name} | {told(future.result())}", flush=True)


def run_in_process(run: Any, sources: Any) -> dict[str, Any]:
    from study_parts.training import run_one

    return run_one(run, sources)


def end_with_parent() -> None:
    """Of a worker: a study that is killed leaves none behind."""

    def watch(parent: BaseProcess) -> None:
        parent.join()
        os._exit(1)

    if (parent := parent_process()) is not None:
        Thread(target=watch, args=(parent,), daemon=True).start()


def told(row: dict[str, Any]) -> str:
    if "diverged" in row:
        return f"diverged at step {row['diverged']}"
    split = "dev" if "dev" in row else "test"
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in row[split].items())
    size = f", {row['parameters']:,} parameters, {row['seconds_per_step']:.2f} s a step" if "parameters" in row else ""
    return f"{split} {metrics}{size}"


def versions() -> dict[str, str | None]:
    from dlor_peft.training.report import installed_versions

    return installed_versions()


def commit() -> str:
    """Of the code: rows that are not committed yet are no change of it."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False).stdout.strip()

    code = (".", "../dlor_peft", ":(exclude)study_parts/results")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return (git("describe", "--always") or "unknown") + ("-dirty" if changed else "")


if __name__ == "__main__":
    sys.exit(main())
