"""`dlor`: parses the command line; torch, PEFT and transformers are loaded only by the verb that needs them."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .commands import convert, eval, export, extract, inspect, merge, train
from .commands.reporting import one_line, report


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of one `dlor` command: 0, 2 for an error in what was given, 130 when interrupted."""
    arguments = _parse(sys.argv[1:] if argv is None else list(argv))
    with _warnings_inone_line():
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    try:
        return arguments.verb(arguments)
    except BrokenPipeError:
        # the reader has gone, as `| head` does; nothing may be flushed into the pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, ValueError, ImportError, OSError) as error:
        return report(error)


@contextmanager
def _warnings_inone_line() -> Iterator[None]:
    """Without the source lines that they come from, and, unless -W is given, without those for programmers."""
    former = warnings.formatwarning
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore", FutureWarning)
        warnings.formatwarning = lambda message, *_, **__: f"dlor: warning: {one_line(str(message))}\n"
        try:
            yield
        finally:
            warnings.formatwarning = former


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dlor",
        description="Train, look at, merge and export DLoR adapters: a trainable diagonal plus low rank.",
        epilog="dlor VERB --help says more. The shortest way to see it work: dlor train",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for command in (train, eval, inspect, merge, export, convert, extract):
        command.add(verbs)
    if argv and argv[0] in verbs.choices:
        # intermixed: "dlor train my.yaml --explain adapter.r=4" has positionals on both sides of an option
        return verbs.choices[argv[0]].parse_intermixed_args(argv[1:])
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
