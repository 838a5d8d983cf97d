"""What a command says of an error, and the exit code that goes with it."""

from __future__ import annotations

import os
import sys

TRACEBACK = "DLOR_TRACEBACK"


def report(error: BaseException) -> int:
    """One line for what a user can put right, and its exit code: 2, or 130 when interrupted. Any other is raised."""
    if isinstance(error, KeyboardInterrupt):
        print(f"dlor: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    if not isinstance(error, (ValueError, ImportError, OSError)) or os.environ.get(TRACEBACK) == "1":
        raise error
    print(f"dlor: error: {one_line(str(error))}", file=sys.stderr)
    return 2


def one_line(message: str) -> str:
    """Without line breaks, and without what a terminal would act on: names in damaged files may hold anything."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(message.split()))
