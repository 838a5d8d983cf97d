"""The learning rates of tests that choose theirs by method, and what a step of any optimiser must leave behind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

# a product of factors takes steps of the gradient of all others, and at the rates for one factor it ends in nan; but
# little of the gradient reaches an embedding
_PRODUCTS = r"^(?!Embedding).*multiplicative (input 2|output 3)"
_SAFE = 1e-3

RATES: dict[str, tuple[tuple[str, float], ...]] = {
    "test_only_params_are_updated": (
        (_PRODUCTS, _SAFE),
        # this model is slow to learn, as the suite says of DoRA: V starts at random, and must move by more than 1e-4
        (r"^Embedding \+ transformers Conv1D 2 DLoR, scaled$", 5.0),
        # the one for attention is too small for the diagonal of an identity that is added
        (r"^MHA 2 DLoR, additive$", 1e-2),
    ),
    "test_parameters_after_loading_model": ((_PRODUCTS, _SAFE),),
    "test_disable_adapters": ((_PRODUCTS, _SAFE),),
}
"""Test -> patterns of rows, with the learning rate of the first that is found in the row."""

_rate: ContextVar[float | None] = ContextVar("_rate", default=None)


def install() -> None:
    """Every optimiser steps at the rate of the running test, and an error is raised where a step ends in nan."""
    register_optimizer_step_pre_hook(_set_rate)
    register_optimizer_step_post_hook(_check_finite)


@contextmanager
def running(test: str) -> Iterator[None]:
    """While it lasts, the optimisers step at the rate of this item, if it is given one."""
    name, _, row = test.removesuffix("]").partition("[")
    token = _rate.set(next((rate for rows, rate in RATES.get(name, ()) if re.search(rows, row)), None))
    try:
        yield
    finally:
        _rate.reset(token)


def _set_rate(optimizer: Optimizer, *_: Any) -> None:
    if (rate := _rate.get()) is not None:
        for group in optimizer.param_groups:
            group["lr"] = rate


def _check_finite(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # nan differs from everything, so that a test for a change would pass
            if parameter.grad is not None and not parameter.isfinite().all():
                raise AssertionError(f"a step at the learning rate {group['lr']} made parameters infinite or nan")
