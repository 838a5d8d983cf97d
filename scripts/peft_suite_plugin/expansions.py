"""Tests that the package parameterized has expanded, one function a row."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import peft

from .cases import DEFAULT, Row
from .plan import Plan
from .stand_in import ONLY_LORA


def plan_expanded(test: Any) -> Plan | None:
    """The plan for a function that holds a row with LoRA, in whose place it puts DLoR; None for any other function."""
    for cell in (isinstance(test, FunctionType) and test.__closure__) or ():
        held = cell.cell_contents
        if type(held).__module__.partition(".")[0] != "parameterized":
            continue
        row = Row({str(number): value for number, value in enumerate(held.args)}, (), None, peft.LoraConfig)
        if not row.is_template():
            return None
        # there two adapters must commute, which only those that do not read the weight do
        new = row.as_dlor("additive" if test.__name__.startswith("test_target_last_layer") else DEFAULT)
        if new is None:
            return Plan(left_out=ONLY_LORA)
        cell.cell_contents = held._replace(args=new.values)
        return Plan()
    return None
