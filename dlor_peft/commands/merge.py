"""`dlor merge`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_adapter_location, add_base, add_out, add_verb, base_of

EPILOG = """\
  dlor merge --adapter runs/smol-lm-sft/adapter --out merged
  dlor merge --base Qwen/Qwen3-0.6B --adapter org/name --out merged --verify
  dlor merge --base model --adapter first --adapter second --out merged    first, then second into what that gave

The model is never in memory: its safetensors files are read, adapted and written tensor by tensor, each weight in
float32 with one rounding. The result is what merge_and_unload makes of it, loads with transformers alone, and appears
under its name when it is complete. dlor_merge.json in it says what was merged, and how much of each update is left
after rounding. --verify loads both, one after the other.
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_verb(
        verbs,
        "merge",
        "merge adapters into a saved model, file by file",
        "Merge DLoR adapters into the safetensors files of a model, without loading the model.",
        EPILOG,
    )
    add_base(parser, "the unquantised model; without it, the one that the adapter was trained on")
    parser.add_argument(
        "--adapter", metavar="DIR_OR_REPO", action="append", required=True, help="a saved adapter; several in order"
    )
    add_adapter_location(parser)
    add_out(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the merged model; as the base")
    parser.add_argument("--rounding", choices=("nearest", "stochastic"), default="nearest", help="default: nearest")
    parser.add_argument("--seed", type=int, default=0, help="of stochastic rounding (default: 0)")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="of a file at most (default: 5GB)")
    parser.add_argument(
        "--untie", action="store_true", help="store tied weights apart that the adapter makes different"
    )
    parser.add_argument("--verify", action="store_true", help="compare with the base and its adapters on a prompt")
    parser.add_argument("--prompt", help="for --verify")
    parser.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from ..deploy.adapter import read_adapter
    from ..deploy.checkpoint import Checkpoint
    from ..deploy.merge import Merge, MergeOptions
    from ..deploy.surroundings import RECORD

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    options = MergeOptions(
        dtype, arguments.rounding, arguments.seed, arguments.shard_size, arguments.untie, arguments.overwrite
    )
    adapters = [read_adapter(source, arguments.revision, arguments.subfolder) for source in arguments.adapter]
    base = Checkpoint(
        base_of(arguments, [adapter.config.base_model_name_or_path for adapter in adapters]), arguments.base_revision
    )
    merge = Merge(base, adapters, options)
    record = merge.write(arguments.out)
    survived = [layer["survived"] for layer in record["layers"].values()]
    left = f", of each update at least {min(survived):.1%} is left after rounding" if survived else ""
    print(f"{arguments.out}: {len(survived)} weights of {merge.class_name} adapted{left}; see {RECORD}")
    if record["dropped"]:
        names = ", ".join(record["dropped"][:5])
        print(f"left out, being nothing in {merge.class_name}: {len(record['dropped'])} tensors ({names})")
    if arguments.verify:
        from ..deploy.verify import PROMPT, verify

        found = verify(base.folder.path, adapters, Path(arguments.out), merge.model_class, arguments.prompt or PROMPT)
        print(f"verified: {found}")
    return 0
