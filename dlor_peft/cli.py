"""`dlor`: parses the command line; torch, PEFT and transformers are loaded only by the verb that needs them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

TRACEBACK = "DLOR_TRACEBACK"
DEFAULT_RECIPE = "quickstart"

TRAIN_EPILOG = """\
A recipe is a YAML file with the keys model, task, data, adapter, training, output_dir and seed. Any of its values can
be overridden, nested ones by dotted keys; the values are YAML:

  dlor train                                            the quickstart: BANKING77, a few CPU minutes
  dlor train quickstart adapter.r=4 output_dir=runs/r4   other values
  dlor train quickstart adapter.peft_type=LORA          another PEFT method
  dlor train my.yaml adapter.mode=                      an empty value drops a key: its default applies
  dlor train my.yaml training.learning_rate=1e-3 'adapter.target_modules=[q_proj, v_proj]'
  dlor train my.yaml --explain                          every resolved value and where it is from; trains nothing

A relative path in a recipe is relative to the recipe, on the command line to the current folder; output_dir always to
the current folder. A finished run is not repeated: its results are printed. Exit code 2: an error in what was given;
DLOR_TRACEBACK=1 shows where.
"""

INSPECT_EPILOG = """\
  dlor inspect runs/quickstart/adapter

Reads adapter_config.json and adapter_model.safetensors only. max |delta| is the largest entry of the diagonals, ||U||
and ||V|| are Frobenius norms: where they are 0, nothing was learned.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of one `dlor` command: 0, 2 for an error in what was given, 130 when interrupted."""
    arguments = _parse(sys.argv[1:] if argv is None else list(argv))
    try:
        return arguments.verb(arguments)
    except KeyboardInterrupt:
        print("dlor: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader has gone, as `| head` does; nothing may be flushed into the pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, ImportError, OSError) as error:
        if os.environ.get(TRACEBACK) == "1":
            raise
        print(f"dlor: error: {error}", file=sys.stderr)
        return 2


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dlor",
        description="Train and look at DLoR adapters: a trainable diagonal plus low rank on a frozen model.",
        epilog="dlor VERB --help says more. The shortest way to see it work: dlor train",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_train(verbs)
    _add_inspect(verbs)
    if argv and argv[0] in verbs.choices:
        # intermixed: "dlor train my.yaml --explain adapter.r=4" has positionals on both sides of an option
        return verbs.choices[argv[0]].parse_intermixed_args(argv[1:])
    return parser.parse_args(argv)


def _add_train(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "train",
        help="train an adapter from a recipe, and check that it reloads and merges",
        usage="dlor train [RECIPE] [key=value ...] [--explain] [--overwrite]",
        description="Train an adapter, save it, reload it into a fresh model, merge it, and compare the three.",
        epilog=TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE, key=value",
        help="a recipe's path, or the name of a packaged one: quickstart (the default), smol-lm-sft; then overrides",
    )
    parser.add_argument("--explain", action="store_true", help="print the resolved recipe with origins, and stop")
    parser.add_argument("--overwrite", action="store_true", help="replace the finished run in output_dir")
    parser.set_defaults(verb=_train)


def _add_inspect(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "inspect",
        help="list the layers of a saved adapter",
        description="List the layers of a saved DLoR adapter: rank, depth, shapes, parameters and norms.",
        epilog=INSPECT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="ADAPTER_DIR", help="the folder that save_pretrained wrote")
    parser.set_defaults(verb=_inspect)


def _train(arguments: argparse.Namespace) -> int:
    words = list(arguments.words)
    name = words.pop(0) if words and "=" not in words[0] else DEFAULT_RECIPE
    if stray := [word for word in words if "=" not in word]:
        raise ValueError(f"{stray[0]!r}: one recipe, then overrides such as adapter.r=4. See dlor train --help.")

    import dlor_peft

    dlor_peft.register()
    try:
        from .training.recipe import explain, load_recipe
        from .training.run import train

        recipe, sources = load_recipe(name, words)
    except ModuleNotFoundError as error:
        raise ImportError(f"dlor train needs {error.name}: install dlor-peft with its extra 'train'") from error
    if arguments.explain:
        print(explain(recipe, sources))
        return 0
    train(recipe, overwrite=arguments.overwrite)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from .inspect_adapter import inspect_adapter

    print(inspect_adapter(arguments.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
