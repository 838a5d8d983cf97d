"""What a training step needs in memory: one is run on tensors without data, and what would be alive is counted."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from . import checkpointing

if TYPE_CHECKING:
    from transformers import Trainer


@dataclass(frozen=True)
class StepMemory:
    """Bytes. `activations` is the peak of a step over all the others, gradients included; of a batch of `shape`."""

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    activations_checkpointed: int | None
    """The same with activation checkpointing; None where the model has none."""

    gathered: int
    """Of what is sharded, what a device has whole at a time."""

    shape: tuple[int, ...]

    def total(self, checkpointed: bool) -> int:
        activations = self.activations_checkpointed if checkpointed else self.activations
        return self.weights + self.trained + self.gradients + self.optimizer + (activations or 0)

    def sharded(self, num_devices: int, checkpointed: bool) -> int:
        """Of each device, where FSDP2 or ZeRO-3 shards all but the activations."""
        kept = self.weights + self.trained + self.gradients + self.optimizer
        return kept // num_devices + self.gathered + self.total(checkpointed) - kept


class CountLive(TorchDispatchMode):
    """Bytes of the storages that operations make while this is on and that are alive: now, and at most."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # no data, no value: True for "is nothing masked", and a number that can be divided by, and by 1 less it
            dtype = args[0].dtype
            return True if dtype == torch.bool else 0.5 if dtype.is_floating_point else 1
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _without_masks(args[1]))
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, made)
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _without_masks(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Each mask as the indices of all its elements: the most that it could select."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            found += [index.new_empty(index.numel(), dtype=torch.int64)] * index.ndim
        else:
            found.append(index)
    return found


def step_memory(trainer: Trainer, batch: Mapping[str, Any], quantization: Any = None) -> StepMemory:
    """The memory of one step of this trainer, whose model is on the meta device; that has no weights afterwards.

    Counted for the CPU: an allocator that rounds up, kernels that work in place, and what a library keeps for itself
    make the difference on a device; and so does the memory in which quantised weights are unpacked. `quantization`
    is their BitsAndBytesConfig. RuntimeError where the model needs values to go on.
    """
    model: Any = trainer.model
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # what depends on values is no number that could be counted: FakeTensorMode says so by a RuntimeError
    with mode:
        model.to_empty(device="cpu").train()
        fake = {name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in batch.items()}
        inner: Any = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
        if inner.supports_gradient_checkpointing:
            checkpointing.switch_off(inner)
        activations = _peak(trainer, model, fake)
        optimizer = trainer.create_optimizer()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        with CountLive(()):
            # for what looks at values after a step, as a limit does
            optimizer.step()
        states = sum(leaf.nbytes for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor))
        checkpointed = None
        if inner.supports_gradient_checkpointing:
            checkpointing.switch_on(inner, trainer.args)
            checkpointed = max(_peak(trainer, model, fake) - gradients, 0)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    output = inner.get_output_embeddings()
    # as Accelerate wraps a model for FSDP2: a block is fetched while another one computes; the output layer stays
    blocks = [part for part in inner.modules() if type(part).__name__ in (inner._no_split_modules or ())]
    largest = sorted(_bytes(block, output, quantization) for block in blocks)[-2:]
    return StepMemory(
        weights=_bytes(model, output, quantization) - trained,
        trained=trained,
        gradients=gradients,
        optimizer=states,
        activations=max(activations - gradients, 0),
        activations_checkpointed=checkpointed,
        gathered=sum(largest) + (0 if output is None else output.weight.nbytes),
        shape=max((tuple(v.shape) for v in batch.values() if isinstance(v, Tensor)), key=len),
    )


def _bytes(module: nn.Module, output: nn.Module | None, quantization: Any) -> int:
    """Of its parameters and buffers; where the base is quantised, of its linear layers but `output` in that form."""
    size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    if quantization is None:
        return size
    # 4 bits and a float32 for 64 of them, or, quantised twice, a byte for 64 and a float32 for 256 of those; 8 bits
    constants = 1 / 64 + 4 / (64 * 256) if quantization.bnb_4bit_use_double_quant else 4 / 64
    each = 0.5 + constants if quantization.load_in_4bit else 1.0
    # PEFT's own layers are linear ones too, but trained
    linear = (part for part in module.modules() if isinstance(part, nn.Linear) and part is not output)
    frozen = [layer.weight for layer in linear if not layer.weight.requires_grad]
    return int(size - sum(weight.nbytes - each * weight.numel() for weight in frozen))


def _peak(trainer: Trainer, model: nn.Module, batch: Mapping[str, Any]) -> int:
    model.zero_grad()
    count = CountLive([*model.parameters(), *model.buffers(), *(v for v in batch.values() if isinstance(v, Tensor))])
    half = torch.bfloat16 if trainer.args.bf16 else torch.float16
    with count, torch.autocast("cpu", half, enabled=trainer.args.bf16 or trainer.args.fp16):
        # the loss takes some of the batch out
        loss: Any = trainer.compute_loss(model, dict(batch))
        loss.backward()
    return count.peak
