"""The one operation under all modes. Which implementation runs is decided here and nowhere else."""

from .autograd import update

__all__ = ["update"]
