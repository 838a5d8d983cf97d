"""The one operation under all modes. Which implementation runs is decided here and nowhere else."""

from .autograd import update, without_autocast

__all__ = ["update", "without_autocast"]
