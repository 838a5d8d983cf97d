"""`dlor train`."""

from __future__ import annotations

import argparse

from ..training.packaged import list_recipes
from .reporting import report

DEFAULT_RECIPE = "quickstart"

EPILOG = """\
A recipe is a YAML file with the keys model, task, data, adapter, training, optimizer, start_batches, watch, verify,
output_dir and seed. Any of its values can be overridden, nested ones by dotted keys; the values are YAML:

  dlor train                                            the quickstart: BANKING77, a few CPU minutes
  dlor train quickstart adapter.r=4 output_dir=runs/r4   other values
  dlor train quickstart adapter.peft_type=LORA          another PEFT method
  dlor train my.yaml adapter.mode=                      an empty value drops a key: its default applies
  dlor train my.yaml training.learning_rate=1e-3 'adapter.target_modules=[q_proj, v_proj]'
  dlor train my.yaml --explain                          every resolved value and where it is from; trains nothing
  dlor train my.yaml --dry-run                          all checks, a sample, the memory; no weights, trains nothing

A relative path in a recipe is relative to the recipe, on the command line to the current folder; output_dir always to
the current folder. A finished run is not repeated: its results are printed. Exit code 2: an error in what was given;
DLOR_TRACEBACK=1 shows where.

Packaged recipes:
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "train",
        help="train an adapter from a recipe, and check that it reloads and merges",
        usage="dlor train [RECIPE] [key=value ...] [--explain | --dry-run] [--overwrite | --resume]\n"
        "                  [--launch NAME [--processes N]]",
        description="Train an adapter, save it, reload it into a fresh model, merge it, and compare the three.",
        epilog=EPILOG + list_recipes(width=117),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE, key=value",
        help=f"a recipe's path, or the name of a packaged one (default: {DEFAULT_RECIPE}); then overrides",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--explain", action="store_true", help="print the resolved recipe with origins, and stop")
    instead.add_argument(
        "--dry-run",
        action="store_true",
        help="check all of it without weights, print what would be trained on what and its memory, and stop",
    )
    before = parser.add_mutually_exclusive_group()
    before.add_argument("--overwrite", action="store_true", help="replace the run in output_dir")
    before.add_argument(
        "--resume", action="store_true", help="continue the unfinished run in output_dir from its last checkpoint"
    )
    parser.add_argument(
        "--launch",
        metavar="ddp | fsdp2 | zero3 | FILE",
        help="train in several processes, by a packaged configuration of Accelerate or a file of your own",
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="with --launch: how many; one a device by default",
    )
    parser.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    words = list(arguments.words)
    name = words.pop(0) if words and "=" not in words[0] else DEFAULT_RECIPE
    if stray := [word for word in words if "=" not in word]:
        raise ValueError(f"{stray[0]!r}: one recipe, then overrides such as adapter.r=4. See dlor train --help.")
    if arguments.processes is not None and (arguments.launch is None or arguments.processes < 1):
        raise ValueError("--processes: a number from 1 on, with --launch ddp, fsdp2, zero3 or a file.")

    runs_here = not (arguments.explain or arguments.dry_run)
    try:
        from ..training.launch import launch, read_configuration

        if arguments.launch is not None and runs_here:
            # PEFT and the trainers load in the processes
            from ..training.recipe import parse_recipe

            flags = [flag for flag in ("--overwrite", "--resume") if getattr(arguments, flag.removeprefix("--"))]
            command = ["train", name, *words, *flags]
            return launch(arguments.launch, arguments.processes, parse_recipe(name, words)[0], command)
        configuration = read_configuration(arguments.launch)[1] if arguments.launch is not None else {}
        num_processes = arguments.processes or configuration.get("num_processes")
        import dlor_peft

        dlor_peft.register()
        from ..training import processes
        from ..training.dry_run import dry_run
        from ..training.recipe import explain, load_recipe
        from ..training.run import train
    except ModuleNotFoundError as error:
        raise ImportError(f"dlor train needs {error.name}: install dlor-peft with its extra 'train'") from error

    def run_here() -> int:
        recipe, sources = load_recipe(name, words, runs_here)
        if arguments.explain:
            print(explain(recipe, sources))
        elif arguments.dry_run:
            dry_run(recipe, arguments.overwrite, arguments.resume, num_processes)
        else:
            train(recipe, overwrite=arguments.overwrite, resume=arguments.resume)
        return 0

    return processes.run_one(run_here, report) if processes.num_processes() > 1 else run_here()
