"""Arguments that several verbs take."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def add_verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    return verbs.add_parser(
        name,
        help=help,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_base(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--base", metavar="MODEL_OR_REPO", help=help)
    parser.add_argument("--base-revision", metavar="REV", help="branch, tag or commit of --base on the Hub")


def add_adapter_location(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of an adapter on the Hub")
    parser.add_argument("--subfolder", metavar="NAME", help="folder in which an adapter lies in its repository")


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write; it appears when it is complete")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")


def base_of(arguments: argparse.Namespace, recorded: Sequence[str | None]) -> str:
    """--base, or the base that all adapters were trained on by their own record."""
    if arguments.base is not None:
        return arguments.base
    names = set(recorded)
    (name,) = names if len(names) == 1 else (None,)
    if not name:
        told = ", ".join(sorted(map(str, names)))
        raise ValueError(f"the adapter does not say which one base it was trained on ({told}): pass --base.")
    return name
