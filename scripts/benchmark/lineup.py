"""Contestants that are built, checked and warmed up: what the measurement starts from."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .addmm_lora import AddmmLoRA
from .contestants import CONTESTANTS
from .measuring import FROZEN, Step, saved_bytes

Inputs = list[tuple[Tensor, Tensor | None]]  # x, and the gradient of the result, None where that is a loss

WARM_UP = 3


class Pass:
    """call(x) and its backward pass, then the optimizer's step if there is one; the inputs take turns."""

    def __init__(
        self,
        module: nn.Module,
        call: Callable[[Tensor], Tensor],
        inputs: Inputs,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.call = call
        self.inputs = itertools.cycle(inputs)
        self.optimizer = optimizer

    def prepare(self) -> None:
        self.x, self.gradient = next(self.inputs)
        for tensor in (self.x, *self.trainable):
            tensor.grad = None

    def forward(self) -> Tensor:
        return self.call(self.x)

    def run(self) -> None:
        self.forward().backward(self.gradient)
        if self.optimizer is not None:
            self.optimizer.step()


@dataclass(frozen=True)
class Entry:
    parameters: int
    saved_bytes: int


@dataclass
class Lineup:
    frozen: Step
    steps: dict[str, Step] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # contestant -> reason


def line_up(module: nn.Module, names: list[str], r: int, make_step: Callable[[nn.Module], Step]) -> Lineup:
    """The frozen `module` and each contestant on it; those that cannot be built or run are told of, and left out."""
    module.requires_grad_(False)
    lineup = Lineup(make_step(module))
    lineup.entries[FROZEN] = _warm_up(module, lineup.frozen)
    for name in names:
        try:
            adapted = CONTESTANTS[name].adapt(module, r)
            check_addmm(adapted)
            step = make_step(adapted)
            lineup.entries[name] = _warm_up(adapted, step)
            lineup.steps[name] = step
        except (RuntimeError, ValueError) as error:
            lineup.failed[name] = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
            print(f"{name} is left out: {lineup.failed[name]}", file=sys.stderr)
    return lineup


def _warm_up(module: nn.Module, step: Step) -> Entry:
    """Runs the step, so that whatever is compiled or allocated once is; what it trains must get a gradient."""
    step.prepare()
    # before anything else: torch.compile guards on the hooks of saved tensors
    saved = saved_bytes(module, step.forward)
    for _ in range(WARM_UP):
        step.prepare()
        step.run()
    trainable = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
    for name, tensor in trainable.items():
        if tensor.grad is None or not tensor.grad.isfinite().all() or not tensor.grad.any():
            raise RuntimeError(f"the gradient of {name} is missing, zero or not finite")
    return Entry(sum(tensor.numel() for tensor in trainable.values()), saved)


def check_addmm(module: nn.Module) -> None:
    """RuntimeError where an AddmmLoRA of `module` differs from PEFT's layer that it stands for, up to rounding."""
    for layer in module.modules():
        if not isinstance(layer, AddmmLoRA):
            continue
        weight = layer.lora.get_base_layer().weight
        x = torch.randn(2, 8, weight.shape[1], device=weight.device, dtype=weight.dtype)
        g = torch.randn(2, 8, weight.shape[0], device=weight.device, dtype=weight.dtype)
        wanted, got = (_results(call, x, g, layer.lora) for call in (layer.lora, layer))
        tolerance = 1e-4 if weight.dtype == torch.float32 else 3e-2
        for ours, theirs in zip(got, wanted, strict=True):
            if (ours - theirs).norm() > tolerance * theirs.norm():
                raise RuntimeError("addmm_ LoRA differs from PEFT's LoRA")


def _results(call: nn.Module, x: Tensor, g: Tensor, adapter: nn.Module) -> list[Tensor]:
    x = x.clone().requires_grad_()
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    y = call(x)
    return [tensor.float() for tensor in (y.detach(), *torch.autograd.grad(y, [x, *trained], g))]
