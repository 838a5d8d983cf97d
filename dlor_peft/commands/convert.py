"""`dlor convert`."""

from __future__ import annotations

import argparse

from .options import add_adapter_location, add_base, add_out, add_verb

EPILOG = """\
  dlor convert --from lora org/name --out adapter
  dlor convert --from lora runs/lora/adapter --mode additive --diagonal none --out adapter
  dlor convert --from lora runs/dora/adapter --base Qwen/Qwen3-0.6B --out adapter

The outputs stay the same: U = s B and V = A^T, s = lora_alpha / r (lora_alpha / sqrt(r) with use_rslora), and the
diagonal, at zero, is there to be trained. A DoRA becomes mode scaled, side output, with its magnitudes in the
diagonal, for which the weights of --base are read. With --base the names and shapes are checked as well.
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_verb(
        verbs,
        "convert",
        "import a LoRA or DoRA adapter",
        "Write a LoRA or DoRA adapter as a DLoR adapter with the same outputs, to go on training.",
        EPILOG,
    )
    parser.add_argument(
        "--from", dest="method", choices=("lora",), default="lora", help="LoRA, and DoRA, which is one"
    )
    parser.add_argument("adapter", metavar="DIR_OR_REPO", help="a saved LoRA adapter")
    add_adapter_location(parser)
    add_base(parser, "the model it is for; needed for DoRA, convolutions, target_parameters and tied weights")
    add_out(parser)
    parser.add_argument("--mode", choices=("scaled", "additive"), help="default: scaled")
    parser.add_argument("--side", choices=("input", "output", "both", "auto"), help="of the diagonal (default: auto)")
    parser.add_argument("--diagonal", choices=("vector", "scalar", "none"), help="default: vector")
    parser.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    from ..deploy.checkpoint import Checkpoint
    from ..deploy.convert import Target, convert, write_converted
    from ..deploy.lora import read_lora

    lora = read_lora(arguments.adapter, arguments.revision, arguments.subfolder)
    base = arguments.base and Checkpoint(arguments.base, arguments.base_revision, with_weights=False)
    adapter = convert(lora, Target(arguments.mode, arguments.side, arguments.diagonal), base)
    write_converted(adapter, arguments.out, arguments.overwrite, base)
    config, kind = adapter.config, "DoRA" if lora.config.use_dora else "LoRA"
    what = f"mode {config.mode}, side {config.side}, diagonal {config.diagonal}"
    print(
        f"{arguments.out}: the {kind} {lora.source} on {len(adapter.layers)} layers, as {what}, with the same outputs"
    )
    return 0
