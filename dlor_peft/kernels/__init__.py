"""The operations under all modes: `update` by itself, `linear` with the frozen product; `report` says what runs."""

from .autograd import is_autocast, linear, update, without_autocast
from .choice import report
from .stack import collapse_stack

__all__ = ["collapse_stack", "is_autocast", "linear", "report", "update", "without_autocast"]
