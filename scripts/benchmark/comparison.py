"""A measurement of contestants on one frozen module, in one dtype."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .goals import Goal
from .lineup import Lineup, line_up
from .measuring import Rounds, Step, measure


@dataclass
class Result:
    dtype: str
    lineup: Lineup
    rounds: Rounds
    goals: list[Goal]
    more: dict[str, Any] = field(default_factory=dict)  # what else the JSON file gets


def compare(
    arguments: argparse.Namespace,
    dtype: str,
    module: nn.Module,
    names: list[str],
    make_step: Callable[[nn.Module], Step],
    goals: list[Goal],
) -> Result:
    print(f"{dtype}: building and warming up", file=sys.stderr)
    lineup = line_up(module, names, arguments.rank, make_step)
    print(f"{dtype}: measuring {arguments.rounds} rounds", file=sys.stderr)
    settings = {name: getattr(arguments, name) for name in ("device", "rounds", "iterations", "seed")}
    return Result(dtype, lineup, measure(lineup.frozen, lineup.steps, **settings), goals)
