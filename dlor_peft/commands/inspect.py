"""`dlor inspect`."""

from __future__ import annotations

import argparse

EPILOG = """\
  dlor inspect runs/quickstart/adapter

Reads adapter_config.json and adapter_model.safetensors only. max |delta| is the largest entry of the diagonals, ||U||
and ||V|| are Frobenius norms: where they are 0, nothing was learned.
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "inspect",
        help="list the layers of a saved adapter",
        description="List the layers of a saved DLoR adapter: rank, depth, shapes, parameters and norms.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="ADAPTER_DIR", help="the folder that save_pretrained wrote")
    parser.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    from ..inspect_adapter import inspect_adapter

    print(inspect_adapter(arguments.folder))
    return 0
