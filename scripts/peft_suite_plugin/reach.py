"""What the code of a test uses, itself or through helpers and fixtures of its own module."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from _pytest.fixtures import FixtureFunctionDefinition


def words_of(test: Any, owner: type | None, module: ModuleType) -> tuple[set[str], set[str]]:
    """The identifiers, and the string constants, in a test and in what it reaches inside its module."""
    names: set[str] = set()
    strings: set[str] = set()
    waiting, seen = [test], set()
    while waiting:
        function = _function(waiting.pop())
        if function is None or function in seen or function.__module__ != module.__name__:
            continue
        seen.add(function)
        used = set(_names(function.__code__)) | set(inspect.signature(function).parameters)
        names |= used
        strings |= set(_strings(function.__code__.co_consts))
        for name in used:
            waiting += [vars(module).get(name), inspect.getattr_static(owner, name, None) if owner else None]
    return names, strings


def written(function: FunctionType) -> FunctionType:
    """The function as it stands in the module, below its decorators and the rows of the package parameterized."""
    function = inspect.unwrap(function)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    inner = cells["func"].cell_contents if {"func", "p"} <= cells.keys() else function
    return inner if isinstance(inner, FunctionType) else function


def _function(candidate: Any) -> FunctionType | None:
    if isinstance(candidate, staticmethod | classmethod):
        candidate = candidate.__func__
    elif isinstance(candidate, FixtureFunctionDefinition):
        candidate = candidate._fixture_function
    return written(candidate) if isinstance(candidate, FunctionType) else None


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    yield from code.co_freevars
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _strings(constants: Any) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple | frozenset):
            yield from _strings(constant)
        elif isinstance(constant, CodeType):
            yield from _strings(constant.co_consts)
