"""Whole training steps of a small Llama, or the passes through one of its blocks, with DLoR and with PEFT's methods.

    python scripts/bench_model.py                                  # forward, loss, backward, AdamW
    python scripts/bench_model.py --layers 2 --sequence 128 --dtype bfloat16
    python scripts/bench_model.py --block small                    # forward and backward of one decoder block
    python scripts/bench_model.py --block llama-8b --device cuda   # what the goals on a GPU are stated for

The model comes from a configuration, with random weights; all linear layers but the output layer are adapted. The
frozen reference is the forward and backward pass through the frozen model, or block, whose input is differentiated. A
block also runs those contestants that need --only on a model. Below a model's times: what it keeps for the backward
pass, and what one of its blocks does, for every side that DLoR can act on. How times are compared:
benchmark/measuring.py. The exit status is 1 where the run is void.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import torch
from benchmark import goals, options, report
from benchmark.comparison import Result, compare
from benchmark.contestants import CONTESTANTS
from benchmark.lineup import Inputs, Pass, line_up
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding


@dataclass(frozen=True)
class Sizes:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    batch: int
    sequence: int

    def to_config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=self.sequence,
            use_cache=False,
            attn_implementation="sdpa",
        )


SIZES = {
    "small": Sizes(512, 1376, layers=4, heads=8, kv_heads=4, vocab=2048, batch=4, sequence=256),
    # 8192 tokens in sequences whose attention is a small part of the work
    "llama-8b": Sizes(4096, 14336, layers=1, heads=32, kv_heads=8, vocab=128256, batch=4, sequence=2048),
}
ON_MODELS = [
    "DLoR scaled",
    "DLoR multiplicative, depth 1",
    "DLoR multiplicative, depth 4",
    "PEFT LoRA",
    "PEFT LoRA, base dtype",
    "PEFT DoRA",
]
SIDES = ["DLoR scaled, input", "DLoR scaled, output", "DLoR scaled, both"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--block", choices=SIZES, help="one decoder block of these sizes instead of a model")
    for size in fields(Sizes):
        parser.add_argument(
            f"--{size.name.replace('_', '-')}",
            type=int,
            metavar="N",
            help=f"(default: {getattr(SIZES['small'], size.name)}, of a block: what its sizes are)",
        )
    options.add_options(parser, rounds=11)
    arguments = options.settle(parser)
    for name, value in asdict(SIZES[arguments.block or "small"]).items():
        setattr(arguments, name, getattr(arguments, name) or value)
    return arguments


def build_block(arguments: argparse.Namespace, dtype: str) -> tuple[nn.Module, Callable[[nn.Module], Pass]]:
    """A decoder block, and what makes the step of it or of an adapted copy: forward and backward pass."""
    sizes = sizes_of(arguments)
    placement = {"device": arguments.device, "dtype": getattr(torch, dtype)}
    shape = sizes.batch, sizes.sequence, sizes.hidden
    inputs: Inputs = [
        (torch.randn(shape, **placement, requires_grad=True), torch.randn(shape, **placement))
        for _ in range(arguments.inputs)
    ]
    positions = torch.arange(sizes.sequence, device=arguments.device)[None]
    with torch.no_grad():
        angles = LlamaRotaryEmbedding(sizes.to_config()).to(arguments.device)(inputs[0][0], positions)

    def make_step(block: nn.Module) -> Pass:
        return Pass(block, lambda x: block(x, position_embeddings=angles), inputs)

    return LlamaDecoderLayer(sizes.to_config(), layer_idx=0).to(**placement), make_step


def build_model(arguments: argparse.Namespace, dtype: str) -> tuple[nn.Module, Callable[[nn.Module], Pass]]:
    """A model, and what makes the step of it (forward and backward pass) or of an adapted copy (training step)."""
    sizes = sizes_of(arguments)
    placement = {"device": arguments.device, "dtype": getattr(torch, dtype)}
    ids = [
        torch.randint(sizes.vocab, (sizes.batch, sizes.sequence), device=arguments.device)
        for _ in range(arguments.inputs + 1)
    ]
    labels = ids.pop()
    model = LlamaForCausalLM(sizes.to_config()).to(**placement)
    embedded = [model.get_input_embeddings()(row).detach().requires_grad_() for row in ids]

    def make_step(model: nn.Module) -> Pass:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trainable:
            return Pass(model, lambda x: model(inputs_embeds=x, labels=labels).loss, [(x, None) for x in embedded])
        optimizer = torch.optim.AdamW(trainable, lr=1e-4)
        return Pass(model, lambda x: model(input_ids=x, labels=labels).loss, [(x, None) for x in ids], optimizer)

    return model, make_step


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    return Sizes(**{size.name: getattr(arguments, size.name) for size in fields(Sizes)})


def measure_saved(arguments: argparse.Namespace, result: Result, model: nn.Module, make_step: Callable) -> None:
    """Prints what the model and one of its blocks keep for the backward pass, on every side of DLoR."""
    timed = result.lineup
    whole = {**timed.entries, **line_up(model, SIDES, arguments.rank, make_step).entries}
    block, make_block_step = build_block(arguments, result.dtype)
    one = line_up(block, [name for name in whole if name in CONTESTANTS], arguments.rank, make_block_step).entries
    saved = {name: {"model": whole[name].saved_bytes, "block": one[name].saved_bytes} for name in whole if name in one}
    result.more["saved_bytes"] = saved
    over = saved.get("PEFT LoRA", {})
    rows = [
        [name, *(report.mib(count, over.get(what)) for what, count in counts.items())]
        for name, counts in saved.items()
    ]
    print("\nSaved for the backward pass, MiB (/ PEFT LoRA):\n")
    print(report.table(["contestant", "model with its loss", "one block"], rows))


def main() -> int:
    arguments = parse_arguments()
    device, block = arguments.device, arguments.block
    work = f"one block ({block})" if block else f"training step, {arguments.layers} blocks"
    title = (
        f"{work}, hidden {arguments.hidden}, {arguments.batch} x {arguments.sequence} tokens, "
        f"rank {arguments.rank}, {device}"
    )
    remark = "The goal is stated for a whole training step."
    if block:
        is_stated = (device, sizes_of(arguments), arguments.rank) == ("cuda", SIZES["llama-8b"], 16)
        remark = f"The goals are stated for {goals.STATED_FOR[device]}." + " This is another case." * (not is_stated)
    build, limits = (build_block, goals.LAYER) if block else (build_model, goals.TRAINING_STEP)
    # what is compiled layer by layer is measured as a layer
    among = [name for name in CONTESTANTS if not CONTESTANTS[name].is_compiled] if block else ON_MODELS
    results = []
    for dtype in arguments.dtype:
        module, make_step = build(arguments, dtype)
        result = compare(arguments, dtype, module, options.choose(arguments, dtype, among), make_step, limits)
        report.show(result, device, title, remark)
        if not block:
            measure_saved(arguments, result, module, make_step)
        results.append(result)
    return report.finish(arguments, results, title)


if __name__ == "__main__":
    sys.exit(main())
