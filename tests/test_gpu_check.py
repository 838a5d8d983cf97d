"""scripts/gpu_check.py as far as no GPU is needed: what it visits, counts and concludes."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import re
import runpy
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dlor_peft.kernels import autograd, choice, launch, reference
from dlor_peft.kernels.launch import Config, Key

pytest.importorskip("triton")

SIZES = ((7, 20, 33), (130, 16, 48))


@pytest.fixture
def gpu_check():
    return importlib.import_module("gpu_check")


@pytest.fixture
def stage():
    return lambda name: importlib.import_module(f"benchmark.{name}")


def operations(**replaced):
    """Implementations of the five, which the check takes for Triton's."""
    names = ("down", "expand", "mul", "bwd_rows", "bwd_cols")
    of_reference = {name: getattr(reference, name) for name in names}
    return SimpleNamespace(**{**of_reference, **replaced}, _new=lambda *args, **options: torch.empty(*args, **options))


def test_every_entry_of_the_table_is_checked_in_all_dtypes_and_up_to_its_rank(stage, monkeypatch):
    correctness = stage("correctness")
    assert correctness.entries((9, 0)) == list(launch.configurations())
    assert {key.capability for _, key, _ in correctness.entries((8, 6))} == {None}
    assert {kernel for kernel, _, _ in correctness.entries(None)} == set(launch.TABLE)
    seen = set()

    def errors(ops, kernel, operands):
        tensors = [one for one in operands if isinstance(one, torch.Tensor)]
        assert launch.choose(kernel, None, 2, 16, 64) in {config for _, _, config in launch.configurations()}
        seen.add((kernel, tensors[0].dtype, torch.get_float32_matmul_precision(), tensors[1].shape[-1]))
        return []

    monkeypatch.setattr(correctness, "errors", errors)
    for entry in correctness.entries((9, 0)):
        assert not correctness.check(None, entry, "cpu", SIZES)["failures"]
    for kernel in launch.TABLE:
        assert {what[1:3] for what in seen if what[0] == kernel} == {
            (torch.bfloat16, "highest"),
            (torch.float16, "highest"),
            (torch.float32, "highest"),
            (torch.float32, "high"),
        }
    for kernel, key, _ in correctness.entries((9, 0)):
        assert max(correctness.ranks(kernel, key)) == key.rank
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("kernel", launch.TABLE)
def test_what_is_right_passes_and_one_wrong_entry_does_not(stage, kernel):
    correctness = stage("correctness")
    entry = next(entry for entry in correctness.entries(None) if entry[0] == kernel)
    right = correctness.check(operations(), entry, "cpu", SIZES)
    assert right["failures"] == []
    assert 0 < right["worst"] < 1

    def wrong(*operands, value):
        results = getattr(reference, kernel)(*operands)
        first = next(one for one in (results if isinstance(results, tuple) else (results,)) if one is not None)
        first.view(-1)[-1:] = value
        return results

    for value in (1e4, torch.nan):
        found = correctness.check(operations(**{kernel: partial(wrong, value=value)}), entry, "cpu", SIZES)
        assert len(found["failures"]) >= found["runs"] - 2 * 2 * len(SIZES)
        assert "tolerance" in found["failures"][0]

    def raising(*operands):
        raise RuntimeError("an illegal memory access")

    found = correctness.check(operations(**{kernel: raising}), entry, "cpu", SIZES)
    assert len(found["failures"]) == found["runs"]
    assert "illegal memory access" in found["failures"][0]


def test_outputs_are_nan_until_they_are_written(stage):
    cases = stage("kernel_cases")
    ops = SimpleNamespace(_new=torch.empty)
    with cases.unwritten_is_nan(ops):
        assert ops._new(3).isnan().all()
    assert ops._new is torch.empty
    with pytest.raises(ValueError, match="no operands for 'other'"):
        next(cases.cases("other", torch.randn, *SIZES[0], 3))


@pytest.mark.parametrize("with_all", [False, True])
@pytest.mark.parametrize(("kernel", "width", "r"), [*itertools.product(launch.TABLE, (48, 256), (4, 16))])
def test_the_bytes_are_those_of_all_that_is_read_and_written(stage, kernel, width, r, with_all):
    times = stage("kernel_times")
    T, config = 300, Config(32, 16, 4, 2)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.bfloat16)

    operands = times.operands_of(kernel, draw, T, width, r, with_all)
    results = getattr(reference, kernel)(*operands)
    of_tokens = {id(one): one for one in (*operands, *(results if isinstance(results, tuple) else (results,)))
                 if isinstance(one, torch.Tensor) and one.shape[0] == T}  # fmt: skip
    expected = sum(one.numel() * one.element_size() for one in of_tokens.values())
    if kernel.startswith("bwd"):
        # float32, written and read
        expected += 8 * launch.chunks(T, width)[1] * width * (r + with_all)
    if kernel == "bwd_rows":
        expected += 8 * T * r * (width // config.columns)
    assert times.bytes_moved(kernel, T, width, r, 2, with_all, config) == expected


def test_without_an_entry_the_bytes_are_those_of_two_passes(stage):
    moved = stage("kernel_times").bytes_moved
    one = Config(32, 64, 4, 2)
    assert moved("mul", 300, 64, 4, 2, False, None) == sum(
        moved(kernel, 300, 64, 4, 2, False, one) for kernel in ("down", "expand")
    )
    without_dx = moved("bwd_cols", 300, 64, 4, 2, False, one) - 2 * 300 * 64
    assert moved("bwd_rows", 300, 64, 4, 2, False, None) == moved("down", 300, 64, 4, 2, False, one) + without_dx


def test_every_operation_is_timed_beside_torch(stage):
    times, called = stage("kernel_times"), []

    def timer(call, turns):
        called.append(call.__module__.rpartition(".")[2])
        return 2.0 if called[-1] == "eager" else 1.0

    rows = times.measure(reference, 8, (16, 32), (4,), "cpu", timer, 1e3)
    assert {row["kernel"] for row in rows} == set(launch.TABLE)
    assert called == ["reference", "eager"] * len(rows)
    assert rows[0]["share_of_copy"] == rows[0]["bytes"] / 1e3
    assert "torch  2.00 x as long" in times.line(rows[0])


def test_a_call_takes_its_share_of_the_median_batch(stage, monkeypatch):
    times, done = stage("kernel_times"), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def elapsed_time(self, end):
            # milliseconds
            return 8.0

    for name, replaced in {"Event": Event, "_sleep": lambda cycles: None, "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, replaced)
    turns = [(torch.zeros(1),), (torch.ones(1),)]
    assert times.cuda_timer(lambda x: done.append("call"), turns) == 0.004
    assert done == ["event", "call", "call", "event"] * (len(done) // 4)


@pytest.mark.parametrize(
    ("prefill", "frozen", "go"),
    [
        ([0.9, 0.91, 0.92], [0.99, 1.0, 1.01], True),
        # within the spread of the same order
        ([0.97, 0.98, 0.99], [0.9, 1.0, 1.1], False),
        ([0.99, 1.0, 1.2], [1.0, 1.0, 1.0], False),
        # void
        ([0.5, 0.5, 0.5], [1.2, 1.2, 1.2], False),
    ],
)
def test_prefill_needs_to_be_faster_by_more_than_the_spread(stage, prefill, frozen, go):
    rounds = stage("measuring").Rounds([1.0], {"frozen": frozen, "prefill": prefill})
    assert stage("orders").is_go(rounds) is go


def test_both_orders_give_the_same(stage):
    orders = stage("orders")
    drawn = orders.draw(32, 24, 40, "cpu")
    for pair in (orders.forward_orders(reference), orders.backward_orders(reference)):
        first, second = (order(drawn) for order in pair)
        assert (first - second).norm() < 1e-2 * first.norm()


def test_the_verdict_needs_everything_to_have_run(stage):
    verdict = stage("correctness").verdict
    entry, tests = {"failures": []}, {"cut_off": False, "failed": []}
    assert verdict({"entries": [entry], "tests": tests}) == "usable"
    assert verdict({"entries": [entry]}).startswith("undecided")
    assert verdict({}).startswith("undecided")
    assert verdict({"entries": [entry, {"failures": [], "cut_off": True}], "tests": tests}).startswith("undecided")
    assert verdict({"entries": [entry], "tests": {**tests, "cut_off": True}}).startswith("undecided")
    assert verdict({"entries": [{"failures": ["x"]}], "tests": tests}).startswith("not usable: 1 entries and 0")
    assert verdict({"entries": [entry], "tests": {**tests, "failed": ["x"]}}).startswith("not usable")


def test_the_lines_for_the_choice_of_kernels(gpu_check, monkeypatch):
    text = Path(choice.__file__).read_text(encoding="utf-8")
    for name in ("MEASURED", "PREFILLS"):
        assert gpu_check._source(name, getattr(choice, name)) in text
    monkeypatch.setattr(choice, "MEASURED", frozenset({(8, 0)}))
    monkeypatch.setattr(choice, "PREFILLS", frozenset({(8, 0)}))

    def sets(is_go):
        found = {"Capability": tuple}
        for line in gpu_check.source_lines((9, 0), True, is_go):
            exec(line, found)
        return found["MEASURED"], found["PREFILLS"]

    assert sets(True) == (frozenset({(8, 0), (9, 0)}), frozenset({(8, 0), (9, 0)}))
    assert sets(False) == sets(None) == (frozenset({(8, 0), (9, 0)}), frozenset({(8, 0)}))
    monkeypatch.setattr(choice, "PREFILLS", frozenset({(9, 0)}))
    assert sets(False)[1] == frozenset()
    assert sets(None)[1] == frozenset({(9, 0)})
    (line,) = gpu_check.source_lines((9, 0), False, True)
    assert "stays as it is" in line


@pytest.mark.parametrize("what", ["ends", "fails", "hangs"])
def test_what_a_stage_found_is_there_however_it_ends(gpu_check, monkeypatch, tmp_path, what):
    script = tmp_path / "stage.py"
    script.write_text(
        "import json, pathlib, sys, time\n"
        "path = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "path.write_text(json.dumps({'go': True}))\n"
        f"{ {'ends': '', 'fails': 'sys.exit(3)', 'hangs': 'time.sleep(60)'}[what] }\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    arguments = argparse.Namespace(device="cpu", quick=True)
    found = gpu_check.stage_process("gemm", arguments, 1.0 if what == "hangs" else 60.0, False)
    assert found["go"] is True
    assert {"ends": "ended", "fails": "exit status 3", "hangs": "cut off after 1 s"}[what] in found["ended"]


def test_the_stages_follow_each_other_and_a_summary_comes_last(gpu_check, monkeypatch, tmp_path, capsys):
    hardware = {"capability": [9, 0], "gpu": "a GPU", "versions": {"torch": "2"}}
    row = {"kernel": "down", "width": 8, "rank": 4, "operands": "all"}
    goal = {"goal": "time: A / B", "limit": "<= 1.00", "measured": "0.5", "met": "yes"}
    results = {
        "gemm": {"products": {"block": {"ratio": [0.9, 0.9, 0.9]}}, "go": True},
        "correctness": {"entries": [{"failures": []}], "tests": {"cut_off": False, "failed": []}},
        "times": {"copy": 4e12, "kernels": [{**row, "share_of_copy": 0.8, "torch_seconds": 2.0, "seconds": 1.0}]},
        "table": {"runs": {"triton": {"results": [{"goals": [goal]}]}, "HRA": {"failed": "cut off after 9 s"}}},
    }
    asked = []

    def stage_process(name, arguments, limit, is_go):
        asked.append((name, is_go))
        return {"hardware": hardware, "ended": "ended", **results[name]}

    monkeypatch.setattr(gpu_check, "stage_process", stage_process)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    assert gpu_check.main() == 0
    assert asked == [("gemm", False), ("correctness", True), ("times", True), ("table", True)]
    assert list(json.loads((tmp_path / "gpu_check.json").read_text())) == list(results)
    said = capsys.readouterr().out
    summary = said[said.index("## Summary") :]
    for part in ("prefill: go, 0.900", "kernels: usable", "8/4: 80 %, 2.00", "time: A / B", "HRA: cut off after 9 s"):
        assert part in summary
    assert summary.strip().endswith("PREFILLS: frozenset[Capability] = frozenset({(9, 0)})")
    # nothing is left of the time
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--budget", "0"])
    assert gpu_check.main() == 1
    assert "gemm: no time left" in capsys.readouterr().out


def test_goals_of_all_runs_stand_in_one_table(stage):
    goals = {name: {"goal": name, "limit": "<= 1", "measured": name, "met": "yes"} for name in "ab"}
    runs = {
        "triton": {"results": [{"goals": [goals["a"]]}]},
        "torch": {"results": [{"goals": [{**goals["a"], "measured": "2", "met": "NO"}]}]},
        "HRA": {"results": [{"goals": [goals["b"]]}]},
        "BOFT": {"failed": "no time left"},
    }
    assert stage("block_runs").goal_rows(runs) == [
        ["a", "<= 1", "a", "yes", "2", "NO"],
        ["b", "<= 1", "b", "yes", "", ""],
    ]


def test_every_contestant_of_a_block_is_in_a_group_and_those_of_a_goal_meet(stage):
    runs, goals, contestants = (stage(name) for name in ("block_runs", "goals", "contestants"))
    names = [name for name, one in contestants.CONTESTANTS.items() if not one.is_compiled]

    def members(group):
        return {name for name in contestants.CONTESTANTS if re.search(group.only, name)}

    assert set().union(*map(members, runs.GROUPS)) == set(names)
    assert members(runs.GROUPS[0]) == members(runs.GROUPS[1])
    for goal in goals.LAYER:
        assert any({goal.name, goal.over} <= members(group) | {"frozen"} for group in runs.GROUPS)


def test_a_run_takes_the_order_that_was_decided(stage, monkeypatch):
    seen = []
    monkeypatch.setattr(runpy, "run_path", lambda path, run_name: seen.append((path, list(sys.argv))))
    monkeypatch.setattr(autograd, "prefills", None)
    for order in ("prefill", "product first"):
        monkeypatch.setattr(sys, "argv", ["-c", order, "--block", "small"])
        exec(stage("block_runs").AS_SHIPPED, {})
        assert autograd.prefills(None) is (order == "prefill")
    assert seen == [("scripts/bench_model.py", ["scripts/bench_model.py", "--block", "small"])] * 2


def test_without_a_gpu_it_says_so(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, said in ([], "no CUDA device"), (["--device", "cpu"], "needs --quick"):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *options])
        with pytest.raises(SystemExit):
            gpu_check.parse_arguments()
        assert said in capsys.readouterr().err


def test_the_environment_is_told_where_the_package_is_not_installed(stage, monkeypatch):
    report = stage("report")
    assert report._version("dlor-peft-of-another-name") is None

    def missing(*args, **options):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert report.environment("cpu")["commit"] == "unknown"


def test_an_entry_that_takes_its_process_with_it_is_a_failure(stage, monkeypatch):
    correctness = stage("correctness")
    entry = ("down", Key(None, 2, 16, None), Config(16, 16, 4, 2))
    arguments = argparse.Namespace(device="cpu", quick=True, deadline=time.monotonic() + 60)
    monkeypatch.setattr(correctness.sys, "executable", "/bin/false")
    found = correctness.check_apart(0, entry, arguments)
    assert found["failures"] == ["exit status 1: "]

    def late(*args, **options):
        raise subprocess.TimeoutExpired(args, 1)

    monkeypatch.setattr(subprocess, "run", late)
    found = correctness.check_apart(0, entry, arguments)
    assert found["cut_off"]
    assert found["failures"] == []
