"""What an adapter does to each layer, in numbers: from its own tensors, and beside the weights of its base.

O, I features of the layer; p, q rows of U and of V; L depth; r rank. The residual diag(q) + U V^T is that of
`form.Residual`, a stack collapsed. All in float64. Where a layer has factors for each of E experts, norms are over all
of them, effective ranks and alignment indices are means, and bounds and answers are those of the worst.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..blocks import Part, update_blocks
from ..config import DLoRConfig
from ..facts import invertible, layer_facts, multiplies, residuals
from ..form import Form, Residual
from ..layers import DLoRLayer
from ..layers.linear import Linear
from ..maths import alignment_of_sums
from . import low_rank
from .adapter import PREFIX, SavedAdapter, layer_config
from .checkpoint import Checkpoint
from .skeleton import Skeleton
from .weights import BaseWeights


@dataclass(frozen=True)
class WeightReport:
    """The update of one weight of the base, in Frobenius norms.

    relative_update     ||W' - W|| / ||W||; None where W is 0
    alignment_rows      `maths.alignment_index` of W' - W: what a diagonal on the output explains of it
    alignment_columns   the same of the transposes: a diagonal on the input
    """

    name: str
    shape: tuple[int, ...]
    norm: float
    update_norm: float
    relative_update: float | None
    alignment_rows: float
    alignment_columns: float


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer.

    side                None where the form has none; "auto" where the shapes do not tell
    diagonal_deviation  ||alpha - 1||: the 2-norm of q, of both diagonals on side "both"; |q| of a scalar
    frobenius_norm      ||U V^T||_F
    spectral_norm       ||U V^T||_2
    effective_rank      of U V^T: `maths.effective_rank`
    multiplies          whether all of the update is a square map that multiplies the weight
    condition_bound     of that map: `facts.LayerFacts`. None where there is none, or no bound
    invertible          whether that map is; None where there is none
    exact_exports       of LoRA and DoRA, those that are the same function
    """

    module: str
    mode: str
    side: str | None
    diagonal: str
    depth: int
    r: int
    experts: int | None
    shapes: dict[str, tuple[int, ...]]
    dtype: str
    num_parameters: int
    num_bytes: int
    diagonal_deviation: float
    frobenius_norm: float
    spectral_norm: float
    effective_rank: float
    multiplies: bool
    condition_bound: float | None
    invertible: bool | None
    exact_exports: tuple[str, ...]
    weight: WeightReport | None = None


@dataclass(frozen=True)
class Report:
    """All layers of an adapter, and what is saved in full besides (name -> shape, bytes)."""

    source: str
    revision: str | None
    sha256: str
    config: dict[str, Any]
    base: str | None
    layers: tuple[LayerReport, ...]
    saved_in_full: dict[str, tuple[tuple[int, ...], int]]

    @property
    def totals(self) -> dict[str, int]:
        return {
            "layers": len(self.layers),
            "parameters": sum(layer.num_parameters for layer in self.layers),
            "bytes": sum(layer.num_bytes for layer in self.layers),
            "tensors_saved_in_full": len(self.saved_in_full),
            "parameters_saved_in_full": sum(math.prod(shape) for shape, _ in self.saved_in_full.values()),
            "bytes_saved_in_full": sum(size for _, size in self.saved_in_full.values()),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, with keys that stay, for JSON: no infinity, no NaN."""
        in_full = [{"name": name, "shape": shape, "bytes": size} for name, (shape, size) in self.saved_in_full.items()]
        return {
            "adapter": {"source": self.source, "revision": self.revision, "sha256": self.sha256},
            "base": self.base,
            "config": self.config,
            "layers": [asdict(layer) for layer in self.layers],
            "saved_in_full": in_full,
            "totals": self.totals,
        }


FACTS = (
    "mode", "mode_pattern", "side", "side_pattern", "diagonal", "r", "rank_pattern", "depth", "depth_pattern",
    "base_model_name_or_path", "revision", "task_type", "dlor_version",
)  # fmt: skip
"""Of the configuration, what a report tells."""


def inspect_adapter(adapter: SavedAdapter, base: Checkpoint | None = None) -> Report:
    """The report on a saved adapter; with its base, also on what becomes of the weights.

    Raises:
        ValueError: the adapter does not fit the base, or its factors multiply to more than float64 holds.
        OSError: a file of the base cannot be read.
    """
    skeleton = None if base is None else Skeleton(base, [adapter])
    adapted = {} if skeleton is None else _adapted_layers(skeleton)
    reports = []
    for module, tensors in adapter.layers.items():
        if skeleton is None:
            form, side = guessed_form(module, tensors, adapter.config)
        else:
            form = adapted[module].form[skeleton.names[0]]
            side = form.side
        try:
            layer = inspect_layer(module, tensors, form)
            if side == "auto":
                # what holds on either side
                other = inspect_layer(module, tensors, replace(form, side="output"))
                exports = tuple(name for name in layer.exact_exports if name in other.exact_exports)
                layer = replace(layer, exact_exports=exports)
            if layer.experts is not None or (skeleton is not None and type(adapted[module]) is not Linear):
                # which `export.Source` refuses
                layer = replace(layer, exact_exports=())
            reports.append(replace(layer, side=side))
        except OverflowError as error:
            raise ValueError(f"{adapter.source}: {module} is broken: {error}.") from None
    if base is not None and skeleton is not None:
        weights = _Weights(base, skeleton)
        reports = [
            replace(layer, weight=weights.inspect(adapted[layer.module], adapter.layers[layer.module]))
            for layer in reports
        ]
        base.close()
    facts = {name: getattr(adapter.config, name) for name in FACTS}
    in_full = {name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in adapter.others.items()}
    source = None if base is None else base.folder.source
    return Report(adapter.source, adapter.revision, adapter.sha256, facts, source, tuple(reports), in_full)


def guessed_form(module: str, tensors: Mapping[str, Tensor], config: DLoRConfig) -> tuple[Form, str | None]:
    """The form that these tensors are of, and its side, "auto" where the shapes do not tell.

    Without the base model every layer is taken for a linear one, which has the smaller side by "auto".
    """
    config = layer_config(module, tensors, config)
    widths = {name: tensor.shape[-1 if "diag" in name else -2] for name, tensor in tensors.items()}
    some, tensor = next(iter(tensors.items()))
    experts = tensor.shape[1] if tensor.ndim == (3 if "diag" in some else 4) else None
    n = widths.get("dlor_diag", 1)
    p, q = widths.get("dlor_U", n), widths.get("dlor_V", widths.get("dlor_diag_in", n))
    sides = ("input", "output", "both")
    if config.side == "auto" and config.mode == "scaled" and config.diagonal == "vector" and (n == p) != (n == q):
        sides = ("output",) if n == p else ("input",)
    form = Form.resolve(config, config.r, config.depth, q, p, sides, experts=experts)
    is_known = config.side != "auto" or form.side is None or (config.mode == "scaled" and config.r > 0)
    return form, form.side if is_known else "auto"


def inspect_layer(module: str, tensors: Mapping[str, Tensor], form: Form) -> LayerReport:
    """The report on one layer from its own tensors. OverflowError where their product is not finite."""
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    residual = form.residual(exact)
    facts = asdict(layer_facts(form, residual))
    bound = facts.pop("condition_bound")
    some = next(iter(tensors.values()))
    return LayerReport(
        module=module,
        mode=form.mode,
        side=form.side,
        diagonal=form.diagonal,
        depth=form.depth,
        r=form.r,
        experts=form.experts,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtype=str(some.dtype).removeprefix("torch."),
        num_parameters=sum(tensor.numel() for tensor in tensors.values()),
        num_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        **facts,
        multiplies=multiplies(form),
        condition_bound=None if bound is None or math.isinf(bound) else bound,
        invertible=invertible(form, residual),
        exact_exports=_exact_exports(form, residuals(form, residual), facts["frobenius_norm"]),
    )


def _exact_exports(form: Form, each: list[Residual], norm: float) -> tuple[str, ...]:
    """What `low_rank.gain` says of all of them."""
    gains = [low_rank.gain(form, residual) for residual in each]
    # the factors of an input-side map act on each tap of a convolution: of higher rank as one matrix
    is_of_rank = norm == 0 or not (form.mode == "multiplicative" and form.side == "input" and form.taps > 1)
    exact = {
        "LoRA": is_of_rank and all(gain is not None and not gain.any() for gain in gains),
        "DoRA": is_of_rank and all(gain is not None and (gain > -1).all() for gain in gains),
    }
    return tuple(name for name, holds in exact.items() if holds)


def _adapted_layers(skeleton: Skeleton) -> dict[str, DLoRLayer]:
    """By the names that their tensors are stored under."""
    modules = skeleton.peft_model.named_modules()
    return {name.removeprefix(PREFIX): module for name, module in modules if isinstance(module, DLoRLayer)}


class _Weights:
    """The weights of a base, one in memory at a time."""

    def __init__(self, base: Checkpoint, skeleton: Skeleton) -> None:
        self._base, self._source, self._skeleton = BaseWeights(base, skeleton), base.folder.source, skeleton
        self._names = {
            id(layer): [name for name, change in skeleton.changes.items() if change.layer is layer]
            for layer in _adapted_layers(skeleton).values()
        }

    def inspect(self, layer: DLoRLayer, tensors: Mapping[str, Tensor]) -> WeightReport:
        (name, *_) = self._names[id(layer)]
        W = self._read(name)
        form = layer.form[self._skeleton.names[0]]
        residual = form.residual(dict(tensors))
        matrix = layer._as_matrix(W)
        if matrix.ndim == 2:
            return inspect_update(name, tuple(W.shape), [(matrix, Part("", form, residual))])
        parts = [(matrix[e], Part("", form, residual.of_expert(e))) for e in range(len(matrix))]
        return inspect_update(name, tuple(W.shape), parts)

    def _read(self, name: str) -> Tensor:
        change = self._skeleton.changes[name]
        W = self._base.stored(name) if change.replacement is None else change.replacement
        if not W.is_floating_point():
            raise ValueError(f"{self._source}: {name} is stored as {W.dtype}, which cannot be adapted.")
        return W


def inspect_update(name: str, shape: tuple[int, ...], parts: list[tuple[Tensor, Part]]) -> WeightReport:
    """The report on the weights (O, I K) and their adapters; several are the experts of one weight."""
    W_W = D_D = 0.0
    indices = []
    for W, part in parts:
        # of rows, of columns
        products, squares = ([torch.zeros(n, dtype=torch.float64) for n in W.shape] for _ in range(2))
        total = torch.zeros((), dtype=torch.float64)
        for rows, columns, before, delta in update_blocks(W, part):
            before = before.double()
            for axis, at in enumerate((rows, columns)):
                products[axis][at] += (before * delta).sum(1 - axis)
                squares[axis][at] += before.square().sum(1 - axis)
            total += delta.double().square().sum()
        indices.append(
            [alignment_of_sums(products[axis], squares[axis], total, W.shape[1 - axis]).item() for axis in (0, 1)]
        )
        W_W, D_D = W_W + squares[0].sum().item(), D_D + total.item()
        if not math.isfinite(W_W + D_D):
            raise ValueError(f"{name}, or its update, is not finite in {torch.promote_types(W.dtype, torch.float32)}.")
    rows, columns = (sum(values) / len(values) for values in zip(*indices, strict=True))
    ratio = math.sqrt(D_D / W_W) if W_W else None
    return WeightReport(name, shape, math.sqrt(W_W), math.sqrt(D_D), ratio, rows, columns)
