"""The signals by which a run is asked to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StoppedError(KeyboardInterrupt):
    """Training was stopped from outside after a step, and a checkpoint was saved: by all processes of the run."""


@contextmanager
def stop_signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While the block runs, `handler` gets SIGINT and SIGTERM."""
    former = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handling in former.items():
            signal.signal(number, handling)
