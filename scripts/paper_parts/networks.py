"""f(x) = w^T s(M_L ... s(M_1 x + b_1) ... + b_L) + b, M = alpha I + U V^T: built and trained, several at once.

Nets of one shape are stacked and trained in one pass, each from its own seed. All in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from dlor_peft.nn import DLoRLinear

ALPHAS = ("zero", "from zero", "trained")
"""alpha = 0, frozen: U V^T alone; alpha trained from 0; alpha trained from where DLoRLinear starts it."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU": torch.relu,
    "tanh": torch.tanh,
    "GELU": nn.functional.gelu,
    "sin": torch.sin,
    "softplus": nn.functional.softplus,
}


class Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)


def dlor_layer(I: int, O: int, r: int = 1, alpha: str = "trained", depth: int = 1) -> DLoRLinear:
    """alpha I + U V^T with one alpha for each factor, I -> O."""
    layer = DLoRLinear(I, O, r, depth, "scalar", dtype=torch.float64)
    if alpha != "trained":
        for name, value in layer.named_parameters():
            if name.endswith("delta"):
                nn.init.constant_(value.requires_grad_(alpha != "zero"), -1)
            elif name.endswith("U"):
                # alpha carries none of the mean square, so U carries all of it
                nn.init.normal_(value, 0, 1 / math.sqrt(r))
    return layer


def chain(matrices: Sequence[nn.Module], width: int, activation: str) -> nn.Sequential:
    """Each matrix followed by the activation, and a linear map to a scalar at the end."""
    parts = [part for matrix in matrices for part in (matrix, Activation(activation))]
    return nn.Sequential(*parts, nn.Linear(width, 1, dtype=torch.float64))


def dlor_net(
    inputs: int, width: int, num_layers: int, activation: str, alpha: str = "trained", r: int = 1
) -> nn.Sequential:
    """Layers of rank r, the first, of rank r or `inputs` at most, from the inputs to the width."""
    sizes = [inputs, *[width] * num_layers]
    matrices = [dlor_layer(I, O, min(r, I), alpha) for I, O in itertools.pairwise(sizes)]
    return chain(matrices, width, activation)


def count(net: nn.Module) -> int:
    """Trained parameters."""
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


class Ensemble:
    """E nets of one shape, net e made by `make` after torch.manual_seed(e). A call maps (T, I) to (E, T, 1)."""

    def __init__(self, make: Callable[[], nn.Module], num_seeds: int) -> None:
        nets = []
        for seed in range(num_seeds):
            torch.manual_seed(seed)
            nets.append(make())
        self.net, self.num_parameters = nets[0], count(nets[0])
        self.parameters, _ = stack_module_state(nets)
        self._outputs = vmap(lambda parameters, x: functional_call(self.net, parameters, (x,)), (0, None))

    def __call__(self, x: Tensor) -> Tensor:
        return self._outputs(self.parameters, x)

    def train(self, sample: Callable[[], tuple[Tensor, Tensor]], steps: int, lr: float) -> Ensemble:
        """Adam on the mean square error, the rate falling linearly to 0; every net sees the same batches."""
        trained = [value for value in self.parameters.values() if value.requires_grad]
        optimiser = torch.optim.Adam(trained, lr, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
        for _ in range(steps):
            x, y = sample()
            optimiser.zero_grad()
            # Adam acts on each entry by itself, so the nets of the sum do not see each other
            (self(x) - y).square().mean((1, 2)).sum().backward()
            optimiser.step()
            schedule.step()
        return self

    @torch.no_grad()
    def error(self, x: Tensor, y: Tensor) -> list[float]:
        """Mean square error of each net over the variance of y: 1 is the best constant's; inf where it is nan."""
        parts = zip(x.split(4096), y.split(4096), strict=True)
        errors = (
            sum((self(inputs) - part).square().sum((1, 2)) for inputs, part in parts) / y.var(correction=0) / len(y)
        )
        return errors.nan_to_num(nan=math.inf).tolist()


def best_rate(
    make: Callable[[], nn.Module],
    num_seeds: int,
    rates: Sequence[float],
    fit: Callable[[Ensemble, float], Ensemble],
    judge: Callable[[Ensemble], list[float]],
) -> tuple[float, Ensemble]:
    """The rate with the lowest median of `judge` over the seeds, and the nets that it trained."""
    runs = {rate: fit(Ensemble(make, num_seeds), rate) for rate in rates}
    rate = min(runs, key=lambda rate: median(judge(runs[rate])))
    return rate, runs[rate]
