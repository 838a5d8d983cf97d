"""The pytest hooks: only tests that take DLoR are collected, with DLoR's rows, and their outcomes are written down."""

from __future__ import annotations

import copy
import json
import unittest
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
from torch import cuda

from . import data, lifts, rates, stand_in
from .exceptions import otherwise
from .expansions import plan_expanded
from .plan import Plan, plan, rewrite
from .renaming import rename_in


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--dlor-report", type=Path, default=None, help="write outcomes and what was left out, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    # the suite makes errors of them: names that transformers changed after this PEFT, which calls them for any method
    config.addinivalue_line("filterwarnings", r"ignore:`\w*gradient_checkpointing\w*` is deprecated:FutureWarning")
    # before the suite's modules import the name
    datasets.load_dataset = data.load_dataset
    rates.install()
    # of several processes the one that started the others reports
    report = None if hasattr(config, "workerinput") else config.getoption("dlor_report")
    config.pluginmanager.register(Suite(report), "dlor-suite")


class Suite:
    """What was collected, left out and found."""

    def __init__(self, report: Path | None) -> None:
        self.report = report
        self.prepared: set[ModuleType] = set()
        self.plans: dict[tuple[ModuleType, type | None, str], Plan] = {}
        self.left_out: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        self.outcomes: dict[str, dict[str, str]] = {}
        self.at_collection: dict[str, dict[str, list[str]]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(self, collector: Any, name: str, obj: Any) -> list | None:
        module = collector.getparent(pytest.Module).obj
        if module not in self.prepared:
            self.prepared.add(module)
            lifts.apply(module)
        if isinstance(obj, type) and issubclass(obj, unittest.TestCase):
            # pytest makes the items of such a class without asking
            tests = {test: getattr(obj, test) for test in dir(obj) if test.startswith("test")}
            for test, function in tests.items():
                if function is not None and not self._takes_dlor(function, test, obj, module):
                    setattr(obj, test, None)
        elif collector.istestfunction(obj, name):
            owner = collector.getparent(pytest.Class)
            return None if self._takes_dlor(obj, name, owner and owner.obj, module) else []
        return None

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        rewrite(metafunc, self.plans[metafunc.module, metafunc.cls, metafunc.definition.originalname])

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in list(items):
            if (why := otherwise(item.path.name, item.name)) is not None:
                items.remove(item)
                self.left_out[item.path.name][why].append(item.name)
            # the CPU kernels of bitsandbytes want layers that are larger than those of the tiny models
            if item.get_closest_marker("single_gpu_tests") and self._plan(item).quantises and not cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="quantises a tiny model, which needs a GPU"))

    def pytest_collection_finish(self) -> None:
        self.at_collection = copy.deepcopy(self.left_out)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        plan = self._plan(item)
        converting = lifts.conversion(item.module) if plan.converts else nullcontext()
        with stand_in.running(plan.form, plan.reads_scale), converting, rates.running(item.name):
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        file, _, test = report.nodeid.partition("::")
        detail = _detail(report)
        if report.skipped and detail.startswith(stand_in.ONLY_LORA):
            self.left_out[Path(file).name][stand_in.ONLY_LORA].append(test)
        elif self.outcomes.get(report.nodeid, {}).get("outcome") != "failed":
            self.outcomes[report.nodeid] = {"outcome": report.outcome, "detail": detail}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed or report.skipped:
            self.outcomes[report.nodeid] = {"outcome": report.outcome, "detail": _detail(report)}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        # of several processes each collects all, but the one that reports
        self.at_collection = getattr(node, "workeroutput", {}).get("left_out", self.at_collection)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["left_out"] = {file: dict(why) for file, why in self.at_collection.items()}
        elif not self.plans:
            for file, reasons in self.at_collection.items():
                for why, tests in reasons.items():
                    self.left_out[file][why] += tests
        if self.report is not None:
            self.report.write_text(json.dumps({"outcomes": self.outcomes, "left_out": self.left_out}, indent=1))

    def _plan(self, item: Any) -> Plan:
        return self.plans[item.module, item.cls, getattr(item, "originalname", item.name)]

    def _takes_dlor(self, test: Any, name: str, owner: type | None, module: ModuleType) -> bool:
        made = plan_expanded(test) or plan(test, owner, module)
        self.plans[module, owner, name] = made
        if made.left_out is not None:
            self.left_out[module.__name__.rpartition(".")[2] + ".py"][made.left_out].append(name)
        elif made.renames:
            rename_in(test)
        return made.left_out is None


def _detail(report: Any) -> str:
    if hasattr(report, "wasxfail"):
        return f"expected to fail: {report.wasxfail}"
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash is not None else str(report.longrepr or "")
