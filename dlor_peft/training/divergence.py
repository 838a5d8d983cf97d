"""A run that has diverged is stopped at once: with the step, the layer, and what to change."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import extract_model_from_parallel, gather_object, reduce
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from .report import module_of
from .watching import DivergenceError, WatchLayers, worst_bound

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class StopDivergence(TrainerCallback):
    """DivergenceError before a step whose gradients are not finite, and at a logging step whose loss or gradient norm
    is not, or where the condition bound of a layer is above `max_condition`.

    All processes raise it at the same step. Gradients in float16 overflow in healthy runs, whose steps accelerate then
    skips, and DeepSpeed keeps its own: there only what is logged is looked at.
    """

    def __init__(self, model: nn.Module, layers: WatchLayers | None, max_condition: float | None) -> None:
        self._layers = layers
        self._max_condition = max_condition
        self._inputs: tuple[Any, ...] = ()
        self._batch: dict[str, Any] = {}
        model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, model: nn.Module, inputs: tuple[Any, ...], batch: dict[str, Any]) -> None:
        if model.training:
            self._inputs, self._batch = inputs, batch

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gradients = [p.grad for _, p in _trained(kwargs["model"]) if p.grad is not None]
        if not args.fp16 and not _are_finite(gradients, args.device):
            # the Trainer has clipped them: what one of them had is in all
            raise self._error(args, state.global_step + 1, "the gradients are not finite", kwargs["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)) and not (args.fp16 and name == "grad_norm"):
                raise self._error(args, state.global_step, f"the logged {name} is {logs[name]}", kwargs["model"])
        worst = worst_bound(self._layers.facts) if self._layers and "loss" in logs else None
        if worst and self._max_condition and worst[1] > self._max_condition:
            raise DivergenceError(
                f"training diverged at step {state.global_step}: what multiplies the weight of {worst[0]} has a "
                f"condition number of up to {worst[1]:.2g}, above watch.max_condition = {self._max_condition:.2g}. "
                f"{_remedy(args)} If the run is meant to go there, raise watch.max_condition."
            )

    def _error(self, args: TrainingArguments, step: int, finding: str, model: nn.Module) -> DivergenceError:
        sizes = _sizes(dict(_trained(model)), args.device)
        name = next((name for name, size in sizes.items() if not math.isfinite(size)), None)
        if name is not None:
            layer = f"the first layer with a parameter that is not finite is {_module(model, name)}"
        elif (name := first_overflow(model, *self._inputs, **self._batch)) is not None:
            layer = f"the first layer with an output that is not finite is {_module(model, name)}"
        else:
            name = max(sizes, key=lambda name: sizes[name])
            layer = f"the largest trained parameter, {sizes[name]:.2g}, is one of {_module(model, name)}"
        return DivergenceError(f"training diverged at step {step}: {finding}; {layer}. {_remedy(args)}")


def first_overflow(model: nn.Module, *inputs: Any, **batch: Any) -> str | None:
    """The first module, of any process, whose output for these inputs is not finite; None where all are.

    All processes must ask: where parameters are sharded, they run the model together.
    """
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            if not found and not all(leaf.isfinite().all() for leaf in leaves):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(*inputs, **batch)
    finally:
        for handle in handles:
            handle.remove()
    of_all: list[str] = gather_object(found)
    return of_all[0] if of_all else None


def _remedy(args: TrainingArguments) -> str:
    return (
        "Nothing was saved but the checkpoints before. Lower training.learning_rate "
        f"({args.learning_rate:g} now), raise training.warmup_steps, or lower training.max_grad_norm "
        f"({args.max_grad_norm:g} now)."
    )


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    unwrapped: Any = extract_model_from_parallel(model)
    return [(name, parameter) for name, parameter in unwrapped.named_parameters() if parameter.requires_grad]


def _module(model: nn.Module, name: str) -> str:
    """The layer, by its name in the base model, of a parameter or module of the adapted one."""
    tuner = getattr(extract_model_from_parallel(model), "base_model", None)
    return module_of(name, getattr(tuner, "prefix", "modules_to_save.")).replace(".base_layer", "")


def _are_finite(tensors: list[Tensor], device: torch.device) -> bool:
    """On all processes, which all ask where tensors are sharded."""
    total = get_total_norm(_local(tensors), math.inf)
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        total = _largest(total, device)
    return math.isfinite(total.item())


@torch.no_grad()
def _sizes(tensors: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    """max|.| of each on all processes, inf of what is no number."""
    sizes = torch.stack([get_total_norm(_local([tensor]), math.inf).to(device) for tensor in tensors.values()])
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        sizes = _largest(sizes, device)
    return dict(zip(tensors, sizes.tolist(), strict=True))


def _local(tensors: list[Tensor]) -> list[Tensor]:
    tensors = [tensor.detach() for tensor in tensors]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    # the shard of a small tensor may be empty, which has no largest value
    return [tensor for tensor in local if tensor.numel()]


def _largest(sizes: Tensor, device: torch.device) -> Tensor:
    # what the maximum with nan is, the backends do not say
    reduced: Any = reduce(sizes.to(device).float().nan_to_num(nan=math.inf, posinf=math.inf), "max")
    return reduced
