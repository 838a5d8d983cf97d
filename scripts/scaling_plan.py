"""Memory and traffic of each device when an adapter is trained on many: from parameter counts, and measured.

    python scripts/scaling_plan.py            # Llama 3 of 8, 70 and 405 billion parameters on 8 to 1024 GPUs
    python scripts/scaling_plan.py --check    # the same formulas beside the bytes that two processes hold and move

N frozen parameters in bfloat16, A of the adapter in float32, n devices in groups of s that shard (FSDP2; DDP: s = 1).
Bytes a device holds all the time, 2 N / s of weights and 16 A / s of adapter, gradient and the two moments of AdamW;
for a while, two blocks and the output layer as gathered for computing; of each block one hidden state a token, as
gradient checkpointing keeps them; one block's activations; and the logits. Bytes it receives in a step: the other
shares of all parameters in bfloat16, for the forward and, but for the output layer, for the backward pass; of the
gradients the s - 1 other parts of its share, in bfloat16; and its share again from the n / s - 1 other groups, as
2 (n / s - 1) / (n / s) of it by a ring. DDP reduces gradients in float32.
The exit status of --check is 1 where a measured number is more than 2 percent away.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from accelerate import Accelerator, PartialState
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from dlor_peft import DLoRConfig
from dlor_peft.sharding import adapters_sharded_by_rows
from dlor_peft.training.launch import PACKAGED
from dlor_peft.training.sharding import shard_on_cpu

RANK = 16
TOKENS = 4096
NODE = 8
DEVICES = (8, 64, 256, 1024)
# no device holds weights of more bytes
LARGEST = 120e9


def llama(hidden: int, layers: int, heads: int, intermediate: int, vocab: int = 128256) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        intermediate_size=intermediate,
        vocab_size=vocab,
        use_cache=False,
    )


MODELS = {
    "8B": llama(4096, 32, 32, 14336),
    "70B": llama(8192, 80, 64, 28672),
    "405B": llama(16384, 126, 128, 53248),
}
SMALL = llama(512, 4, 8, 1376, vocab=2048)


@dataclass(frozen=True)
class Counts:
    """Parameters: frozen ones and the adapter's, of them those of one block, and the output layer's."""

    frozen: int
    adapter: int
    frozen_block: int
    adapter_block: int
    output: int


@dataclass(frozen=True)
class Device:
    """Bytes of one device: held, of gathered blocks, of activations, and received in a step."""

    weights: float
    adapter: float
    gathered: float
    activations: float
    gathers: float
    gradients: float

    @property
    def memory(self) -> float:
        return self.weights + self.adapter + self.gathered + self.activations


def build(config: LlamaConfig, device: str) -> Any:
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        return get_peft_model(model, DLoRConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))


def count(config: LlamaConfig) -> Counts:
    model = build(config, "meta")
    block = model.base_model.model.model.layers[0]

    def numbers(module: Any) -> tuple[int, int]:
        parameters = list(module.parameters())
        adapter = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        return sum(parameter.numel() for parameter in parameters) - adapter, adapter

    (frozen, adapter), (frozen_block, adapter_block) = numbers(model), numbers(block)
    return Counts(frozen, adapter, frozen_block, adapter_block, model.get_output_embeddings().weight.numel())


def plan(config: LlamaConfig, counts: Counts, devices: int, shards: int, tokens: int) -> Device:
    """What the head of this file says, for groups of `shards` devices."""
    others, groups = (shards - 1) / shards, devices // shards
    is_sharded = shards > 1
    gradient = 2 if is_sharded else 4
    kv = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    # bytes a token that one block keeps: norms in float32, inputs of the layers, what attention and the gate keep,
    # and outputs where "auto" chose that side
    block = 20 * config.hidden_size + 8 * kv + 8 * config.intermediate_size
    borders = 2 * config.hidden_size * config.num_hidden_layers
    # in bfloat16, in float32 and as float32 log-probabilities and gradient
    logits = 14 * config.vocab_size
    return Device(
        weights=2 * counts.frozen / shards,
        adapter=16 * counts.adapter / shards,
        gathered=2 * (2 * (counts.frozen_block + counts.adapter_block) + counts.output) * is_sharded,
        activations=tokens * (block + borders + logits),
        gathers=2 * (2 * (counts.frozen + counts.adapter) - counts.output) * others,
        gradients=gradient * counts.adapter * (others + 2 / shards * (groups - 1) / groups),
    )


def print_plans() -> None:
    print(
        f"DLoR r {RANK} on all linear layers, {TOKENS} tokens a device and step, gradient checkpointing; GB a device\n"
    )
    columns = ("weights", "adapter, optimizer", "gathered", "activations", "in all")
    head = ["model", "devices", "sharded over", *columns, "received: weights", "received: gradients"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    sums = []
    for name, config in MODELS.items():
        counts = count(config)
        for devices in DEVICES:
            for shards in dict.fromkeys((1, NODE, devices)):
                device = plan(config, counts, devices, shards, TOKENS)
                if device.weights > LARGEST:
                    continue
                held = (device.weights, device.adapter, device.gathered, device.activations, device.memory)
                figures = " | ".join(f"{value / 1e9:,.2f}" for value in (*held, device.gathers, device.gradients))
                label = {1: "1 (DDP)"}.get(shards, str(shards))
                print(f"| {name} | {devices:,} | {label} | {figures} |")
        adapted, full = 2 * counts.frozen + 16 * counts.adapter, 16 * counts.frozen
        sums.append(
            f"{name}: {counts.frozen:,} parameters, {counts.adapter:,} of the adapter "
            f"({counts.adapter / counts.frozen:.2%}). Weights and optimizer, over all devices that shard: "
            f"{adapted / 1e9:,.0f} GB; fine-tuned in full, with float32 masters: {full / 1e9:,.0f} GB."
        )
    print("", *sums, sep="\n")


class Traffic(TorchDispatchMode):
    """Bytes that collectives of this process give out, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.received: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            target = args[0]
            tensors = target if isinstance(target, list | tuple) else [target]
            size = sum(
                tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor)
            )
            self.received[name] = self.received.get(name, 0) + size
        return func(*args, **(kwargs or {}))


def bytes_of(tensors: Any) -> int:
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def measure(rank: int, folder: str, shards: int, by_rows: bool) -> None:
    """One training step of the small model on this process, and what it held and received."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = build(SMALL, "cpu")
    optimizer: Any = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    runner: Any
    if shards == 2:
        accelerator = sharding_accelerator()
        with adapters_sharded_by_rows() if by_rows else nullcontext():
            runner, optimizer = accelerator.prepare(model, optimizer)
        model = runner
    else:
        runner = DistributedDataParallel(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.randint(SMALL.vocab_size or 0, (1, 64), generator=torch.Generator().manual_seed(rank))
    with Traffic() as traffic:
        runner(input_ids=ids, labels=ids).loss.backward()
    gradients = bytes_of(parameter.grad for parameter in trained)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    held = {
        "frozen": bytes_of(parameter for parameter in model.parameters() if not parameter.requires_grad),
        "adapter": bytes_of(trained) + gradients + bytes_of(moments),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps({"held": held, "received": traffic.received}))
    dist.destroy_process_group()


def sharding_accelerator() -> Accelerator:
    """As `dlor train --launch fsdp2` makes it from its packaged configuration, for processes of the CPU."""
    settings = yaml.safe_load(PACKAGED["fsdp2"].read_text())["fsdp_config"]
    os.environ |= {"ACCELERATE_USE_FSDP": "true", **{name.upper(): str(value) for name, value in settings.items()}}
    PartialState(cpu=True)
    shard_on_cpu("bf16")
    return Accelerator()


def run_two(shards: int, by_rows: bool = True) -> list[dict[str, dict[str, int]]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, args=(folder, shards, by_rows), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]


def check() -> bool:
    counts = count(SMALL)
    is_right = True
    print("| two processes | predicted, bytes | measured, bytes of rank 0 and 1 |\n|---|---|---|")
    runs = {"FSDP2": (2, run_two(2)), "DDP": (1, run_two(1))}
    for label, (shards, measured) in runs.items():
        device = plan(SMALL, counts, devices=2, shards=shards, tokens=64)
        predicted = (device.weights, device.adapter, device.gathers, device.gradients)
        for (name, values), value in zip(quantities(measured).items(), predicted, strict=True):
            is_right &= all(abs(found - value) <= 0.02 * max(value, 1) for found in values)
            print(f"| {label}: {name} | {value:,.0f} | {', '.join(f'{found:,.0f}' for found in values)} |")
    for name, values in quantities(run_two(2, by_rows=False)).items():
        print(f"| FSDP2, split along the depth: {name} | | {', '.join(f'{found:,.0f}' for found in values)} |")
    return is_right


def quantities(runs: list[dict[str, dict[str, int]]]) -> dict[str, list[float]]:
    """Of each process. Of what a gather gives out, one half is the process's own."""
    return {
        "weights held": [run["held"]["frozen"] for run in runs],
        "adapter, gradients, moments held": [run["held"]["adapter"] for run in runs],
        "received for weights": [total(run, "allgather") / 2 for run in runs],
        "received for gradients": [total(run, "reduce") for run in runs],
    }


def total(run: dict[str, dict[str, int]], operation: str) -> int:
    return sum(size for name, size in run["received"].items() if operation in name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure two processes beside the formulas")
    if parser.parse_args().check:
        return 0 if check() else 1
    print_plans()
    return 0


if __name__ == "__main__":
    sys.exit(main())
