"""V <- top right-singular vectors of X, the rows that a layer's low-rank term reads over a few batches.

As EVA (arXiv 2410.07170) does it for LoRA, with the ranks as they are. X is never held: of X^T X, d x d, only its
product with m fixed orthonormal columns is summed up, from which Nystroem's approximation has the leading vectors
(Tropp, Yurtsever, Udell, Cevher, arXiv 1706.05736), exactly where m = d.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from .layers import DLoRLayer, owned_adapters
from .layers.activation import ActivationLayer
from .layers.placement import whole
from .layers.start import fixed_normal, positive, set_directions

Masks = Mapping[str, Tensor]


class _Sketch:
    """Y = X^T X Omega (d, m) of all rows so far, and their number."""

    def __init__(self, Omega: Tensor) -> None:
        self.Omega = Omega
        self.Y = torch.zeros_like(Omega)
        self.num_rows = torch.zeros((), device=Omega.device, dtype=torch.int64)

    def directions(self, count: int) -> Tensor:
        """(d, c), the leading right-singular vectors of X, orthonormal; c < `count` where X has no more."""
        Y, Omega = self.Y.cpu().double(), self.Omega.cpu().double()
        core = Omega.mT @ Y
        sizes, Q = torch.linalg.eigh((core + core.mT) / 2)
        # what is left of directions that no row has is rounding, in the dtype of the sums
        kept = sizes > sizes[-1].clamp_min(0) * len(sizes) * torch.finfo(self.Y.dtype).eps
        vectors, _, _ = torch.linalg.svd(Y @ Q[:, kept] / sizes[kept].sqrt(), full_matrices=False)
        return positive(vectors[:, :count])


def initialize_from_data(
    model: nn.Module,
    dataloader: Iterable[Any],
    adapter_name: str = "default",
    num_batches: int | None = None,
    progress: bool = True,
) -> None:
    """Give V of a fresh adapter the leading directions of what it reads; the adapter stays the exact identity.

    What V reads is the input of the layer, a convolution's patch by patch, or for factors on the output side (mode
    "multiplicative") W x without the bias. A stack of L factors takes L r directions in blocks of r; where the data
    have fewer, the other columns stay as they are. V has the size of its random start, so that a learning rate carries
    over. Tied layers are looked at once. Embeddings whose low-rank term starts with V = 0 stay as they are.

    The model runs in evaluation mode, with the adapters that are active, and without gradients; its modules are then
    in the modes that they were in. Tokens where `attention_mask` is 0 do not count, in the decoder of an
    encoder-decoder those where `decoder_attention_mask` is. Where processes run together (torch.distributed), each may
    have other batches: sums are over all, and so the start is the same. Memory: for each layer one matrix d x m in
    float32, d the length of V's columns and m = min(d, 4 L r + 32). Time: the forward passes, and 4 d m operations for
    each token and layer.

    Args:
        model: with a DLoR adapter of that name that has not been trained.
        dataloader: gives batches; a mapping is passed as keywords, a list or tuple as arguments, a tensor alone. They
            are moved to where the model is.
        adapter_name: the adapter to start.
        num_batches: how many to take; all that come where None. A few thousand tokens are usually enough.
        progress: show a progress bar.

    Raises:
        ValueError: there is no such adapter or nothing to start in it, it has been trained, a layer saw no input, or
            its inputs cannot be seen.
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(
            f"dlor_peft.initialisation: num_batches must be at least 1, but it is {num_batches!r}. Leave it out to "
            "take all batches."
        )
    layers = layers_to_start(model, adapter_name)
    sketches = _empty_sketches(layers, adapter_name)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    total = num_batches if num_batches is not None else _length(dataloader)
    masks: dict[str, Tensor] = {}
    with torch.no_grad(), _observed(model, layers, sketches, adapter_name, masks):
        batches = itertools.islice(dataloader, num_batches)
        for batch in tqdm(batches, total=total, desc="Looking at inputs", unit="batch", disable=not progress):
            moved = send_to_device(batch, device)
            masks.clear()
            masks.update(_masks(moved))
            _call(model, moved)
    _sum_over_processes(sketches.values())
    for name, sketch in sketches.items():
        if not sketch.num_rows:
            raise ValueError(
                f"dlor_peft.initialisation: the layer {name!r} saw no input in these batches. Pass batches that reach "
                "it, or keep it out of the adapter with exclude_modules."
            )
        if not sketch.Y.isfinite().all():
            raise ValueError(
                f"dlor_peft.initialisation: what the layer {name!r} reads is not finite. Look at the batches, and "
                "whether the model runs in a dtype that holds its activations."
            )
    for name, sketch in sketches.items():
        form = layers[name].form[adapter_name]
        set_directions(layers[name], adapter_name, [sketch.directions(form.depth * form.r).to(sketch.Y)])


def layers_to_start(model: nn.Module, adapter_name: str) -> dict[str, ActivationLayer]:
    """The layers to start; ValueError where one cannot be, or there is none."""
    owned = list(owned_adapters(model))
    known = sorted({adapter for _, _, adapter in owned})
    if adapter_name not in known:
        raise ValueError(
            f"dlor_peft.initialisation: the model has no DLoR adapter {adapter_name!r}. It has "
            f"{', '.join(map(repr, known)) or 'none'}."
        )
    started = {}
    for name, layer, adapter in owned:
        if adapter != adapter_name:
            continue
        _check_fresh(name, layer, adapter_name)
        if layer.form[adapter_name].r == 0 or layer.factor_names(adapter_name)[1] != "dlor_V":
            continue
        if not isinstance(layer, ActivationLayer):
            raise ValueError(
                f"dlor_peft.initialisation: {name!r} ({type(layer).__name__}) adapts a weight that others read, so "
                'that the inputs of its update are not seen. Use init_weights="svd" for this adapter, or keep the '
                "layer out with exclude_modules or target_parameters."
            )
        started[name] = layer
    if not started:
        raise ValueError(
            f"dlor_peft.initialisation: the adapter {adapter_name!r} has no V to start: r is 0, or it adapts "
            "embeddings only. Train it as it is."
        )
    return started


def _check_fresh(name: str, layer: DLoRLayer, adapter_name: str) -> None:
    at_zero = {*layer.form[adapter_name].shapes} - {layer.factor_names(adapter_name)[1]}
    for part in at_zero:
        value = whole(getattr(layer, part)[adapter_name].weight)
        if tuple(value.shape) != layer.form[adapter_name].shapes[part]:
            raise ValueError(
                f"dlor_peft.initialisation: {part} of {name!r} has the shape {tuple(value.shape)} here, as it is "
                "sharded. Call initialize_from_data before the model is prepared for training."
            )
        if value.any():
            raise ValueError(
                f"dlor_peft.initialisation: the adapter {adapter_name!r} is not the identity in {name!r}: it has been "
                "trained, or was made with init_weights=False, and another V would change what it does. Start from a "
                "fresh adapter."
            )


def _empty_sketches(layers: Mapping[str, ActivationLayer], adapter_name: str) -> dict[str, _Sketch]:
    shared: dict[tuple[int, int, torch.device], Tensor] = {}
    sketches = {}
    for name, layer in layers.items():
        form, d = layer.form[adapter_name], layer.form[adapter_name].widths[1]
        V: Any = layer.dlor_V[adapter_name].weight
        m = min(d, 4 * form.depth * form.r + 32)
        if (d, m, V.device) not in shared:
            shared[d, m, V.device] = torch.linalg.qr(fixed_normal(d, m))[0].to(V.device)
        sketches[name] = _Sketch(shared[d, m, V.device])
    return sketches


@contextmanager
def _observed(
    model: nn.Module,
    layers: Mapping[str, ActivationLayer],
    sketches: Mapping[str, _Sketch],
    adapter_name: str,
    masks: Masks,
) -> Iterator[None]:
    """The model in evaluation mode, each call of a layer added to its sketch; undone in the end, whatever happens."""
    before = {module: module.training for module in model.modules()}
    in_decoder = _is_in_decoder(model)
    handles = []
    try:
        model.eval()
        for name, layer in layers.items():
            mask = "decoder_attention_mask" if layer in in_decoder else "attention_mask"
            hook = partial(_observe, sketches[name], adapter_name, masks, mask)
            handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in before.items():
            module.training = training


def _observe(
    sketch: _Sketch,
    adapter_name: str,
    masks: Masks,
    which: str,
    layer: ActivationLayer,
    args: tuple,
    kwargs: dict[str, Any],
    y: Tensor,
) -> None:
    x = args[0] if args else kwargs["x"]
    rows = zip(x.unbind(), y.unbind(), strict=True) if x.is_nested else [(x, y)]
    for x_row, y_row in rows:
        Omega = sketch.Omega.detach().requires_grad_()
        with torch.enable_grad():
            t = layer.low_rank_response(adapter_name, x_row.detach(), y_row.detach(), Omega)
        # the gradient of |X Omega|^2 / 2 is X^T X Omega, whatever makes X of the input
        counted = _without_padding(t.detach(), masks.get(which))
        sketch.Y += torch.autograd.grad(t, Omega, counted)[0]
        sketch.num_rows += t[..., 0].numel()


def _without_padding(t: Tensor, mask: Tensor | None) -> Tensor:
    """t (..., m), 0 where the mask is: where it has a place for each row, the rows in its order."""
    if mask is None or not (t.shape[:-1] == mask.shape or (t.ndim == 2 and len(t) == mask.numel())):
        return t
    return t * mask.reshape(t.shape[:-1]).unsqueeze(-1).to(t)


def _masks(batch: Any) -> dict[str, Tensor]:
    names = ("attention_mask", "decoder_attention_mask")
    found = {name: batch.get(name) for name in names} if isinstance(batch, Mapping) else {}
    return {name: mask for name, mask in found.items() if isinstance(mask, Tensor) and mask.ndim == 2}


def _is_in_decoder(model: nn.Module) -> set[nn.Module]:
    """The modules outside of the encoder, where the model has one beside a decoder."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return set()
    encoder: Any = getattr(model, "get_encoder", lambda: None)()
    return set(model.modules()) - set(encoder.modules()) if isinstance(encoder, nn.Module) else set()


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, list | tuple):
        model(*batch)
    elif isinstance(batch, Tensor):
        model(batch)
    else:
        raise TypeError(
            f"dlor_peft.initialisation: a batch is a {type(batch).__name__}. Pass mappings (as keywords), lists or "
            "tuples (as arguments) or tensors."
        )


def _length(dataloader: Any) -> int | None:
    try:
        return len(dataloader)
    except TypeError:
        # an iterable data set, or a generator
        return None


def _sum_over_processes(sketches: Iterable[_Sketch]) -> None:
    if dist.is_available() and dist.is_initialized():
        for sketch in sketches:
            dist.all_reduce(sketch.Y)
            dist.all_reduce(sketch.num_rows)
