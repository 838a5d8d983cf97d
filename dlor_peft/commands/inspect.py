"""`dlor inspect`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .options import add_adapter_location, add_base, add_verb

if TYPE_CHECKING:
    from ..deploy.inspect import LayerReport, Report

STDOUT = "-"
WIDTH = 119
# of what is saved in full, by name
MAX_NAMES = 8

EPILOG = """\
  dlor inspect runs/quickstart/adapter
  dlor inspect org/name --base Qwen/Qwen3-0.6B --plot updates.png
  dlor inspect adapter --json | jq '.layers[] | {module, frobenius_norm}'

What the columns say of a layer, with the factors of a stack multiplied out to diag(q) + U V^T:
  side         that the diagonal or the factors act on; auto: the file does not tell, --base does
  |a-1|        ||alpha - 1||, how far the diagonal is from "no change": the 2-norm of q, |q| for a scalar
  |UV'|        ||U V^T|| in the Frobenius norm; --json has the spectral norm as well
  eff.rank     of U V^T: exp of the entropy of its singular values over their sum (Roy & Vetterli, 2007)
  cond         cond(W') <= cond * cond(W); inf: the map has no inverse, or a zero on its diagonal
  inv          whether the map that multiplies W can be inverted
  exact        what the layer can be exported to without any error, by dlor export
cond and inv are of a square map that multiplies W: P of mode "multiplicative", diag(alpha) of mode "scaled" at r = 0.
The other forms add to W, have no such map, and show "-". With --base:
  update       ||W' - W|| / ||W||
  rows, cols   alignment of W' - W with W: about 1 if unrelated, well above 2 where scaling rows (columns) explains it

Only JSON and safetensors files are read, and one weight at a time. Without --base each layer is taken for a linear
one. Of experts: norms over all, means of eff.rank, rows and cols, cond and inv of the worst.
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_verb(
        verbs,
        "inspect",
        "show what a saved adapter does to each layer",
        "Show what a saved DLoR adapter does to each layer, in a table, as JSON, or as a heat map.",
        EPILOG,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="a saved adapter, as a folder or a repository")
    add_base(parser, "the model it was trained on: adds the size of each update relative to its weight")
    add_adapter_location(parser)
    parser.add_argument(
        "--plot",
        nargs="?",
        const="dlor_inspect.png",
        metavar="FILE.png",
        help="write a heat map over layers and modules (default: dlor_inspect.png); needs the extra 'train'",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="write all of it as JSON; without FILE to stdout, in place of the table",
    )
    parser.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.plot is not None and Path(arguments.plot).suffix != ".png":
        raise ValueError(f"--plot {arguments.plot}: the heat map is a PNG; name a file that ends in .png.")

    from ..deploy.adapter import read_adapter
    from ..deploy.checkpoint import Checkpoint
    from ..deploy.inspect import inspect_adapter

    adapter = read_adapter(arguments.adapter, arguments.revision, arguments.subfolder)
    base = None if arguments.base is None else Checkpoint(arguments.base, arguments.base_revision)
    report = inspect_adapter(adapter, base)
    written = []
    if arguments.plot is not None:
        from ..deploy.heatmap import heatmap_png

        written.append(Path(arguments.plot))
        written[-1].write_bytes(heatmap_png(report))
    text = json.dumps(report.to_dict(), indent=2, allow_nan=False)
    if arguments.json == STDOUT:
        print(text)
        return 0
    if arguments.json is not None:
        written.append(Path(arguments.json))
        written[-1].write_text(f"{text}\n", encoding="utf-8")
    print("\n".join([*_facts(report), "", _table(report), "", *_totals(report)]))
    for path in written:
        print(f"wrote {path}")
    return 0


def _facts(report: Report) -> list[str]:
    return [f"{name}: {_printable(str(value))}" for name, value in report.config.items() if value not in (None, {})]


def _table(report: Report) -> str:
    from ..deploy.tables import format_table, without_common_start

    names = [_printable(layer.module) for layer in report.layers]
    header = ["module", "mode", "side", "depth", "r", "params", "|a-1|", "|UV'|", "eff.rank", "cond", "inv", "exact"]
    header += ["update", "rows", "cols"] if report.base is not None else []
    cells = [_cells(layer) for layer in report.layers]
    table = format_table([header, *([name, *row] for name, row in zip(names, cells, strict=True))])
    start, short = without_common_start(names)
    if start and len(names) > 1 and max(map(len, table.splitlines())) > WIDTH:
        rows = ([name, *row] for name, row in zip(short, cells, strict=True))
        table = f"in {start.removesuffix('.')}:\n{format_table([header, *rows])}"
    return table


def _cells(layer: LayerReport) -> list[str]:
    bound = "-" if not layer.multiplies else "inf" if layer.condition_bound is None else f"{layer.condition_bound:.3g}"
    invertible = {None: "-", True: "yes", False: "no"}[layer.invertible]
    cells = [layer.mode, layer.side or "-", str(layer.depth), str(layer.r), f"{layer.num_parameters:,}"]
    cells += [_number(layer.diagonal_deviation), _number(layer.frobenius_norm), f"{layer.effective_rank:.1f}"]
    cells += [bound, invertible, " ".join(layer.exact_exports) or "-"]
    if layer.weight is not None:
        weight = layer.weight
        ratio = "-" if weight.relative_update is None else f"{weight.relative_update:.2%}"
        cells += [ratio, _number(weight.alignment_rows), _number(weight.alignment_columns)]
    return cells


def _number(value: float) -> str:
    return f"{value:.3g}"


def _totals(report: Report) -> list[str]:
    totals = report.totals
    counts = f"{totals['parameters']:,} parameters in DLoR tensors, {totals['bytes']:,} bytes"
    lines = [f"{totals['layers']} layers, {counts}"]
    if report.saved_in_full:
        shapes = {_printable(name): "x".join(map(str, shape)) for name, (shape, _) in report.saved_in_full.items()}
        names = ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:MAX_NAMES])
        more = f" and {len(shapes) - MAX_NAMES} more" if len(shapes) > MAX_NAMES else ""
        parameters, size = totals["parameters_saved_in_full"], totals["bytes_saved_in_full"]
        lines.append(f"{parameters:,} parameters saved in full, {size:,} bytes: {names}{more}")
    return lines


def _printable(text: str) -> str:
    """Without what a terminal would act on."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)
