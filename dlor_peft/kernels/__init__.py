"""The operations under all modes: `update` by itself, `linear` with the frozen product; `report` says what runs."""

from .autograd import is_autocast, is_transformed, linear, update, without_autocast
from .choice import report
from .stack import collapse_stack

__all__ = ["collapse_stack", "is_autocast", "is_transformed", "linear", "report", "update", "without_autocast"]
