"""`dlor extract`."""

from __future__ import annotations

import argparse

from .options import add_base, add_out, add_verb

EPILOG = """\
  dlor extract --base org/model --tuned org/model-chat --r 8 --out adapter
  dlor extract --base base --tuned tuned --r 16 --mode scaled --modules-to-save score --out adapter

Reads both models tensor by tensor, finds for each linear layer that changed the adapter nearest to W_tuned - W, writes
them as one adapter, and prints a line for each layer:

  changed by     ||W_tuned - W|| / ||W||
  form           mode and side. With --mode auto, of scaled output, input and both, and additive at rank r, the one
                 that leaves least over; parameters count: a diagonal must bring more than LoRA gets for as many. The
                 multiplicative form of the smaller side, which has fewer, where it is as near up to 1% or 0.001
  residual       ||W_tuned - W - adapter|| / ||W_tuned - W||: 0 is all of the update, 1 nothing
  LoRA's         the residual of the best LoRA with as many parameters; between whole ranks the square is interpolated
  rows, columns  alignment index: how much of the update scales rows or columns of W, 1 for an unrelated update

Other weights that changed are listed as not extracted; --modules-to-save keeps them in full. The adapter is the
nearest that was found, a stationary point; training it from there may bring it nearer to what the tuned model does.
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_verb(
        verbs,
        "extract",
        "turn a model that was fine-tuned in full into an adapter",
        "Find the DLoR adapter that brings a model nearest to its fine-tuned version.",
        EPILOG,
    )
    add_base(parser, "the model before the fine-tuning")
    parser.add_argument("--tuned", metavar="MODEL_OR_REPO", required=True, help="the model after it")
    parser.add_argument("--tuned-revision", metavar="REV", help="branch, tag or commit of --tuned on the Hub")
    parser.add_argument("--r", type=int, required=True, help="rank of the adapter; 0 for diagonals alone")
    modes = ("auto", "scaled", "additive", "multiplicative")
    parser.add_argument("--mode", choices=modes, default="auto", help="default: auto, layer by layer the nearest")
    sides = ("auto", "output", "input", "both")
    parser.add_argument("--side", choices=sides, default="auto", help="default: auto, layer by layer the nearest")
    diagonals = ("vector", "scalar", "none")
    parser.add_argument("--diagonal", choices=diagonals, default="vector", help="default: vector")
    parser.add_argument(
        "--modules-to-save", metavar="NAME", nargs="+", default=[], help="modules to keep in full, such as score"
    )
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda (default: cpu)")
    add_out(parser)
    parser.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.base is None:
        raise ValueError("--base is missing: name the model before the fine-tuning.")

    from ..deploy.checkpoint import Checkpoint
    from ..deploy.extract import RECORD, Extraction
    from ..deploy.fitting import Wanted

    wanted = Wanted(arguments.r, arguments.mode, arguments.side, arguments.diagonal)
    base = Checkpoint(arguments.base, arguments.base_revision)
    tuned = Checkpoint(arguments.tuned, arguments.tuned_revision)
    extraction = Extraction(base, tuned, wanted, arguments.modules_to_save, arguments.device)
    report = extraction.write(arguments.out, arguments.overwrite)
    print(report.text())
    print(f"{arguments.out}: the adapter; its numbers are in {RECORD}")
    return 0
