"""Forward and backward pass of one adapted linear layer, beside the frozen layer and PEFT's other methods.

    python scripts/bench_layer.py                                           # width 1024, 1024 tokens, two dtypes
    python scripts/bench_layer.py --only 'DLoR scaled$|PEFT LoRA$'          # some contestants
    python scripts/bench_layer.py --device cuda --width 4096 --tokens 8192
    python scripts/bench_layer.py --json layer.json --plot layer.png

The layer itself is called, not the model around it; the input is differentiated too, as in any layer but the first,
and the gradient of the output is random. How times are compared: benchmark/measuring.py; what "equal rank" and "equal
parameters" mean: benchmark/contestants.py. The exit status is 1 where the run is void.
"""

from __future__ import annotations

import argparse
import sys

import torch
from benchmark import goals, options, report
from benchmark.comparison import Result, compare
from benchmark.contestants import CONTESTANTS
from benchmark.lineup import Pass
from torch import nn


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--width", type=int, default=1024, help="in_features and out_features (default: %(default)s)")
    parser.add_argument("--in", type=int, metavar="WIDTH", dest="in_features", help="in_features, if different")
    parser.add_argument("--out", type=int, metavar="WIDTH", dest="out_features", help="out_features, if different")
    parser.add_argument("--tokens", type=int, default=1024, help="rows of the input (default: %(default)s)")
    parser.add_argument("--bias", action="store_true", help="give the layer a bias, which Llama has none of")
    options.add_options(parser, rounds=25)
    arguments = options.settle(parser)
    arguments.in_features = arguments.in_features or arguments.width
    arguments.out_features = arguments.out_features or arguments.width
    return arguments


def compare_on_layer(arguments: argparse.Namespace, dtype: str) -> Result:
    I, O, T = arguments.in_features, arguments.out_features, arguments.tokens
    placement = {"device": arguments.device, "dtype": getattr(torch, dtype)}
    # get_peft_model needs a module around the layer
    holder = nn.Sequential(nn.Linear(I, O, bias=arguments.bias, **placement))
    inputs = [
        (torch.randn(T, I, **placement, requires_grad=True), torch.randn(T, O, **placement))
        for _ in range(arguments.inputs)
    ]

    def make_step(adapted: nn.Module) -> Pass:
        return Pass(adapted, adapted.get_submodule("0"), inputs)

    names = options.choose(arguments, dtype, list(CONTESTANTS))
    return compare(arguments, dtype, holder, names, make_step, goals.LAYER)


def main() -> int:
    arguments = parse_arguments()
    I, O, T = arguments.in_features, arguments.out_features, arguments.tokens
    title = f"one layer {I} -> {O}, {T} tokens, rank {arguments.rank}, {arguments.device}"
    is_stated = (arguments.device, I, O, T, arguments.rank) == ("cpu", 1024, 1024, 1024, 16)
    remark = f"The goals are stated for {goals.STATED_FOR[arguments.device]}." + " This is another case." * (
        not is_stated
    )
    results = []
    for dtype in arguments.dtype:
        results.append(compare_on_layer(arguments, dtype))
        report.show(results[-1], arguments.device, title, remark)
    return report.finish(arguments, results, title)


if __name__ == "__main__":
    sys.exit(main())
