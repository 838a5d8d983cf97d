"""`dlor export`."""

from __future__ import annotations

import argparse
import shlex

from .options import add_adapter_location, add_base, add_out, add_verb, base_of

EPILOG = """\
  dlor export --to lora --adapter runs/smol-lm-sft/adapter --out lora
  dlor export --to lora --adapter org/name --base Qwen/Qwen3-0.6B --out lora --r 64 --max-error 0.05
  dlor export --to dora --adapter runs/dora-like/adapter --out dora

The result loads with PEFT alone. A LoRA has the layout that vLLM, SGLang and llama.cpp read. It is the same update
where no diagonal was trained. A trained one makes the update of full rank, so that a LoRA is an approximation, whose
error ||W' - W - B A|| / ||W' - W|| is printed, and refused above --max-error: dlor merge keeps all of the update. A
DoRA is the same update where the diagonal is on the outputs (mode scaled or multiplicative, side output).
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_verb(
        verbs,
        "export",
        "write an adapter as a LoRA or a DoRA",
        "Write a DLoR adapter as one that PEFT itself, and serving engines, know.",
        EPILOG,
    )
    parser.add_argument("--to", choices=("lora", "dora"), required=True, help="the method to write")
    parser.add_argument("--adapter", metavar="DIR_OR_REPO", required=True, help="a saved adapter")
    add_adapter_location(parser)
    add_base(parser, "the model it is for; without it, the one that the adapter was trained on")
    add_out(parser)
    parser.add_argument(
        "--r",
        type=int,
        help="rank of a LoRA: 8, 16, 32, 64, 128, 256, 320 or 512 (default: what it needs)",
    )
    parser.add_argument("--max-error", type=float, help="largest error of a LoRA, of all layers (default: 0.1)")
    parser.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    from ..deploy.adapter import read_adapter
    from ..deploy.checkpoint import Checkpoint

    if arguments.to == "dora" and (arguments.r is not None or arguments.max_error is not None):
        raise ValueError("--r and --max-error are for --to lora: a DoRA is the same update, or it is refused.")
    adapter = read_adapter(arguments.adapter, arguments.revision, arguments.subfolder)
    base = Checkpoint(
        base_of(arguments, [adapter.config.base_model_name_or_path]), arguments.base_revision, with_weights=False
    )
    if arguments.to == "dora":
        from ..deploy.export_dora import DoraExport

        dora = DoraExport(base, adapter)
        dora.write(arguments.out, arguments.overwrite)
        print(f"{arguments.out}: a DoRA of rank {dora.rank} on {dora.num_layers} layers, the same update")
        return 0

    from ..deploy.export_lora import MAX_ERROR, LoraExport

    lora = LoraExport(base, adapter, arguments.r, MAX_ERROR if arguments.max_error is None else arguments.max_error)
    lora.write(arguments.out, arguments.overwrite)
    print(lora.table())
    print(f"\n{arguments.out}: a LoRA of rank {lora.rank} on {len(lora.fits)} layers")
    for caveat in lora.caveats():
        print(caveat)
    name = shlex.quote(f"adapter={arguments.out}")
    print(f"vllm serve {base.folder.source} --enable-lora --max-lora-rank {lora.rank} --lora-modules {name}")
    return 0
