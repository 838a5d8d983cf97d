"""What two processes check together, each with half of the batch: run by tests/peft_behaviour/test_sharded.py."""

from __future__ import annotations

import json
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from tiny_models import adapted, build, config_of, distance, inputs, layers, logits
from torch import nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from dlor_peft import create_dlor_optimizer, initialize_from_data
from dlor_peft.layers.parts import StackedWeight
from dlor_peft.layers.placement import whole
from dlor_peft.maths import spectral_norm
from dlor_peft.sharding import adapters_sharded_by_rows, shard_placement

NUM_PROCESSES = 2
FORM = "scaled-both"
FORMS = [FORM, "multiplicative-output-3", "additive"]
# shape and names of the meshes that FSDP2 shards over; None is its own
MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...] | None] | None] = {
    "default": None,
    "unnamed": ((2,), None),
    "fsdp": ((2,), ("fsdp",)),
    "dp": ((2,), ("dp",)),
    "hybrid": ((1, 2), ("replicate", "shard")),
    "replicated": ((2, 1), ("replicate", "shard")),
}

Model = Any


def mesh_of(name: str) -> DeviceMesh | None:
    shape = MESHES[name]
    return None if shape is None else init_device_mesh("cpu", shape[0], mesh_dim_names=shape[1])


def shard(model: Model, mesh: DeviceMesh | None, units: str = "block") -> Model:
    """FSDP2 on the blocks of a Llama and the rest; before that on each linear layer, or on each factor."""
    for module in list(model.modules()):
        if units == "linear" and isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
        if units == "factor" and isinstance(module, StackedWeight):
            fully_shard(module, mesh=mesh)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: Model, rows: slice = slice(None)) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        batch = {name: value[rows] for name, value in inputs("llama", rows=4).items()}
        model(**batch).logits.square().mean().backward()
        optimizer.step()


def half() -> slice:
    return slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)


def assert_adapter_is(state: dict[str, torch.Tensor], want: Model) -> None:
    reference = get_peft_model_state_dict(want)
    assert state.keys() == reference.keys()
    for key, value in reference.items():
        assert distance(state[key], value) < 1e-5, key


def refused(function: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        function()


def adapt_what_is_sharded(mesh: str, units: str) -> None:
    for form in FORMS:
        model = shard(build("llama"), mesh_of(mesh), units)
        torch.manual_seed(2)
        with pytest.warns(UserWarning, match="FSDP does not average its gradients"):
            model = get_peft_model(model, config_of("llama", form)).eval()
        want = adapted("llama", form)
        assert distance(logits(model, "llama"), logits(want, "llama")) < 1e-5
        name, layer = next(iter(layers(model).items()))
        assert torch.equal(layer.get_delta_weight("default"), layers(want)[name].get_delta_weight("default"))
        refused(model.merge_adapter, "FSDP shards it")


def shard_what_is_adapted(mesh: str, units: str) -> None:
    model, want = adapted("llama", FORM), adapted("llama", FORM)
    shard(model.base_model.model, mesh_of(mesh), units)
    assert distance(logits(model, "llama"), logits(want, "llama")) < 1e-5
    train(model, half())
    train(want)
    assert distance(logits(model, "llama"), logits(want, "llama")) < 1e-5
    name, layer = next(iter(layers(model).items()))
    assert distance(layer.get_delta_weight("default"), layers(want)[name].get_delta_weight("default")) < 1e-5
    refused(model.merge_adapter, "FSDP shards it")
    refused(model.merge_and_unload, "FSDP shards it")
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        assert_adapter_is(get_peft_model_state_dict(model, state_dict=whole), want)


def sharded_by_accelerate() -> None:
    """The adapter's tensors are split in halves along their rows, not left whole on the first process."""
    model, want = adapted("llama", FORM), adapted("llama", FORM)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = plugin
    with adapters_sharded_by_rows():
        model = fsdp2_prepare_model(accelerator, model)
    for module in model.modules():
        if isinstance(module, StackedWeight):
            assert module.weight.shape[0] == 1
            assert module.weight.to_local().numel() * NUM_PROCESSES == module.weight.numel()
    train(model, half())
    train(want)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        assert_adapter_is(get_peft_model_state_dict(model, state_dict=whole), want)


def save_what_was_sharded(folder: Path) -> None:
    model, want = adapted("llama", FORM), adapted("llama", FORM)
    shard(model.base_model.model, None)
    train(model, half())
    train(want)
    refused(lambda: model.save_pretrained(folder / "none"), "FSDP shards this adapter, no process has it whole")
    assert not (folder / "none").exists()
    # the frozen weights are not gathered
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    whole = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "adapter", state_dict=whole)
        loaded = PeftModel.from_pretrained(build("llama"), folder / "adapter")
        assert distance(logits(loaded, "llama"), logits(want, "llama")) < 1e-5
        want.merge_adapter()
        loaded.merge_adapter()
        assert distance(logits(loaded, "llama"), logits(want, "llama")) < 1e-5


def merged_before_it_was_sharded() -> None:
    model, want = adapted("llama", FORM), adapted("llama", FORM)
    for one in (model, want):
        one.merge_adapter()
    shard(model.base_model.model, None)
    assert distance(logits(model, "llama"), logits(want, "llama")) < 1e-5
    refused(model.unmerge_adapter, "FSDP shards it")


def adapters_of_parameters() -> None:
    """Their weight is read outside of the call that gathers it."""
    changes = {"target_modules": [], "target_parameters": ["mlp.up_proj.weight", "self_attn.q_proj.weight"]}
    for units in ("block", "linear"):
        model, want = adapted("llama", FORM, **changes), adapted("llama", FORM, **changes)
        shard(model.base_model.model, None, units)
        assert distance(logits(model, "llama"), logits(want, "llama")) < 1e-5
        train(model, half())
        train(want)
        assert distance(logits(model, "llama"), logits(want, "llama")) < 1e-5


def half_precision() -> None:
    for units in ("block", "linear"):
        model = adapted("llama", "scaled-output").to(torch.bfloat16)
        want = adapted("llama", "scaled-output").to(torch.bfloat16)
        shard(model.base_model.model, None, units)
        # each is about one percent from float32
        assert distance(logits(model, "llama"), logits(want, "llama")) < 4e-2


def frozen_in_half_precision() -> None:
    """FSDP asks only those parameters of a unit to be of one dtype that are trained."""
    model, want = adapted("llama", FORM), adapted("llama", FORM)
    for one in (model, want):
        for parameter in one.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    shard(model.base_model.model, None)
    train(model, half())
    train(want)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        state, reference = get_peft_model_state_dict(model, state_dict=whole), get_peft_model_state_dict(want)
        for key, value in reference.items():
            assert state[key].dtype == torch.float32
            assert distance(state[key], value) < 2e-2, key


def what_is_within_a_unit_is_left_to_it() -> None:
    """As Accelerate shards BERT: its embeddings, then the words in them, then the rest."""
    model = nn.Sequential(nn.Sequential(nn.Embedding(4, 2), nn.LayerNorm(2)), nn.Linear(2, 2))
    with adapters_sharded_by_rows():
        fsdp.fully_shard(model[0])
        assert fsdp.fully_shard(model[0][0]) is model[0][0]
        assert fsdp.fully_shard([model[0][1], model[1]]) == [model[0][1], model[1]]
        fsdp.fully_shard(model)
    assert [isinstance(part, fsdp.FSDPModule) for part in (model, model[0], model[0][0], model[1])] == [
        True,
        True,
        False,
        True,
    ]
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, 2)


def tensor_parallel(named: str | None) -> None:
    message = "(tensor parallelism)"
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=None if named is None else (named,))
    plan = {"mlp.up_proj": ColwiseParallel(), "mlp.gate_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for target in ("up_proj", "down_proj"):
        model = build("llama")
        for block in model.model.layers:
            parallelize_module(block, mesh, plan)
        refused(lambda: get_peft_model(model, config_of("llama", target_modules=[target])), message)  # noqa: B023
    # what is not split
    get_peft_model(model, config_of("llama", target_modules=["q_proj"]))


def tensor_parallel_and_sharded() -> None:
    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        model = build("llama")
        for block in model.model.layers:
            parallelize_module(block, mesh["tp"], {"mlp.up_proj": ColwiseParallel()})
            fully_shard(block, mesh=mesh["dp"])
        refused(lambda: get_peft_model(model, config_of("llama", target_modules=["up_proj"])), "tensor")  # noqa: B023


def tensor_parallel_by_transformers(folder: Path) -> None:
    if dist.get_rank() == 0:
        build("llama").save_pretrained(folder / "base")
    dist.barrier()
    plan = DistributedConfig(tp_size=NUM_PROCESSES, tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=plan)
    refused(lambda: get_peft_model(model, config_of("llama")), "(tensor parallelism)")


def distributed_data_parallel() -> None:
    model, want = adapted("llama", FORM), adapted("llama", FORM)
    train(DistributedDataParallel(model), half())
    train(want)
    assert_adapter_is(get_peft_model_state_dict(model), want)
    model.merge_adapter()
    want.merge_adapter()
    assert distance(logits(model, "llama"), logits(want, "llama")) < 1e-5


def fsdp1(policy: str) -> None:
    model, want = adapted("llama", FORM), adapted("llama", FORM)
    # PEFT's policy wraps each factor by itself
    wrap = fsdp_auto_wrap_policy(model) if policy == "peft" else None
    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=wrap, device_id=torch.device("cpu"), use_orig_params=wrap is None
    )
    assert distance(logits(sharded, "llama"), logits(want, "llama")) < 1e-6
    train(sharded, half())
    train(want)
    refused(model.merge_adapter, "FSDP shards it")
    with FullyShardedDataParallel.summon_full_params(sharded, writeback=False):
        # state_dict() of such a model reads freed memory on a CPU
        whole = {
            f"{name}.weight".replace("_fsdp_wrapped_module.", ""): module.weight.detach().clone()
            for name, module in model.named_modules()
            if isinstance(module, StackedWeight)
        }
    assert_adapter_is(get_peft_model_state_dict(model, state_dict=whole), want)


def limited_and_started(kind: str) -> None:
    """The limit after each step, and a start from each process's own batches, of what FSDP2 or DDP trains."""
    form = "multiplicative-output-3"
    model, want = adapted("llama", form, init_weights=True), adapted("llama", form, init_weights=True)
    own = {name: value[half()] for name, value in inputs("llama", rows=4).items()}
    initialize_from_data(want, [inputs("llama", rows=4)], progress=False)
    initialize_from_data(model, [own], progress=False)
    for name, layer in layers(model).items():
        assert distance(layer.dlor_V["default"].weight, layers(want)[name].dlor_V["default"].weight) < 1e-3, name
    model.load_state_dict(want.state_dict())
    base = model.base_model.model
    if kind == "ddp":
        trained = DistributedDataParallel(model)
    elif kind == "fsdp2":
        trained = shard(base, None)
    else:
        trained = fully_shard(base, shard_placement_fn=shard_placement(NUM_PROCESSES))
    for one, rows in ((trained, half()), (want, slice(None))):
        optimizer = create_dlor_optimizer(one, 2.0, max_ratio=0.01, optimizer_class=torch.optim.SGD)
        for _ in range(3):
            optimizer.zero_grad()
            batch = {name: value[rows] for name, value in inputs("llama", rows=4).items()}
            one(**batch).logits.square().mean().backward()
            optimizer.step()
    reached = 0.0
    for name, layer in layers(model).items():
        for part in ("dlor_diag", "dlor_U", "dlor_V"):
            got, expected = (whole(getattr(one, part)["default"].weight) for one in (layer, layers(want)[name]))
            assert distance(got, expected) < 1e-4, (name, part)
        diag, U, V = (
            whole(getattr(layer, part)["default"].weight).double() for part in ("dlor_diag", "dlor_U", "dlor_V")
        )
        ratio = spectral_norm(U, V) / (1 + diag).abs().amin(-1)
        assert (ratio <= 0.01 * (1 + 1e-12)).all(), name
        reached = max(reached, ratio.max().item())
    assert reached > 0.0099


def cases(folder: Path) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for mesh in MESHES:
        found[f"adapt-{mesh}"] = lambda mesh=mesh: adapt_what_is_sharded(mesh, "block")
    for mesh in ("default", "hybrid"):
        found[f"adapt-{mesh}-linear"] = lambda mesh=mesh: adapt_what_is_sharded(mesh, "linear")
        for units in ("block", "linear", "factor"):
            found[f"shard-{mesh}-{units}"] = lambda mesh=mesh, units=units: shard_what_is_adapted(mesh, units)
    found["save"] = lambda: save_what_was_sharded(folder)
    found["accelerate"] = sharded_by_accelerate
    found["merged"] = merged_before_it_was_sharded
    found["parameters"] = adapters_of_parameters
    found["bfloat16"] = half_precision
    found["within"] = what_is_within_a_unit_is_left_to_it
    found["bfloat16-frozen"] = frozen_in_half_precision
    for name in ("tp", None, "fsdp"):
        found[f"tp-{name}"] = lambda name=name: tensor_parallel(name)
    found["tp-and-fsdp"] = tensor_parallel_and_sharded
    found["tp-transformers"] = lambda: tensor_parallel_by_transformers(folder)
    for kind in ("ddp", "fsdp2", "fsdp2-rows"):
        found[f"limit-{kind}"] = lambda kind=kind: limited_and_started(kind)
    found["ddp"] = distributed_data_parallel
    for policy in ("whole", "peft"):
        found[f"fsdp1-{policy}"] = lambda policy=policy: fsdp1(policy)
    return found


def main(rank: int, folder: Path) -> None:
    """Run every case; what failed, by case, goes to a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=NUM_PROCESSES,
        timeout=timedelta(seconds=20),
    )
    failures = {}
    for name, case in cases(folder).items():
        try:
            case()
        except Exception:
            failures[name] = traceback.format_exc()
    (folder / f"failures-{rank}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
