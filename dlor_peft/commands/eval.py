"""`dlor eval`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .options import add_verb

EPILOG = """\
  dlor eval quickstart                                  the adapter in the recipe's output_dir
  dlor eval runs/quickstart/adapter                     an adapter; the recipe of its run lies beside it
  dlor eval quickstart --adapter some/adapter           a recipe, and an adapter from elsewhere
  dlor eval smol-lm-sft data.max_rows=50                overrides, as in dlor train
  dlor eval smol-lm-sft --lm-eval arc_easy,hellaswag    tasks of the lm-eval library besides (extra 'eval')

Each model is loaded anew. A method that learns a prompt, and a quantised base, have no merged model here.
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_verb(
        verbs,
        "eval",
        help="measure base, adapter and merged model on a recipe's test split",
        description="The recipe's metrics on its test split for the base, the adapter and the merged model.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "words", nargs="+", metavar="RECIPE_OR_ADAPTER, key=value", help="a recipe or an adapter's folder; overrides"
    )
    parser.add_argument("--adapter", metavar="DIR", help="the adapter, where it is not in the recipe's output_dir")
    parser.add_argument("--json", metavar="FILE", help="write the metrics, the recipe and the versions there too")
    parser.add_argument("--lm-eval", metavar="TASKS", help="tasks of lm-eval, by comma; for causal language models")
    parser.add_argument("--lm-eval-include", metavar="DIR", help="folder with task files of your own for lm-eval")
    parser.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    name, *overrides = arguments.words
    if stray := [word for word in overrides if "=" not in word]:
        raise ValueError(f"{stray[0]!r}: one recipe or adapter, then overrides such as data.max_rows=50.")
    tasks = [task for task in (arguments.lm_eval or "").split(",") if task]
    if arguments.lm_eval_include and not tasks:
        raise ValueError("--lm-eval-include belongs to --lm-eval: name the tasks, or drop it.")

    import dlor_peft

    dlor_peft.register()
    try:
        from ..training.evaluate import evaluate, evaluation_table, find_adapter
        from ..training.folder import atomic
    except ModuleNotFoundError as error:
        raise ImportError(f"dlor eval needs {error.name}: install dlor-peft with its extra 'train'") from error
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise FileNotFoundError(f"--json: there is no folder for {arguments.json}. Make it first.")
    recipe, adapter = find_adapter(name, overrides, arguments.adapter)
    results = evaluate(recipe, adapter, tasks, arguments.lm_eval_include)
    print(evaluation_table(results))
    if arguments.json:
        with atomic(Path(arguments.json)) as partial:
            partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"written to {arguments.json}")
    return 0
