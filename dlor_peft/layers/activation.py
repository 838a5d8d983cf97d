"""Adapters that act on the activations of a layer: the frozen weight is never written out anew."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..form import Map
from ..kernels import is_autocast, update
from .base import DLoRLayer
from .placement import fetch, is_fsdp_managed


class ActivationLayer(DLoRLayer):
    """A layer whose input and output are adapted, around one call of the base layer.

    Subclasses whose activations are not (..., features) override `_mix`, `_term` and `_along_features`.
    """

    # what such a forward does is known: apply the weight, add the bias
    plain_forwards: ClassVar[dict[type[nn.Module], Any]] = {}

    def _explain_adapted(self) -> str:
        return "the base layer is called, and updated around that"

    def _adapted_forward(self, x: Tensor, adapter_names: list[str], args: tuple, kwargs: dict[str, Any]) -> Tensor:
        if x.is_nested:
            # nn.TransformerEncoder makes one of a padded batch
            rows = [self._adapted_forward(row, adapter_names, args, kwargs) for row in x.unbind()]
            return torch.nested.as_nested_tensor(rows, layout=x.layout)
        inner, last = self._biases(x, adapter_names, plain_call=not (args or kwargs))
        base: Map = partial(self._base, without_bias=last is not None, args=args, kwargs=kwargs)
        for name in adapter_names:
            forward, residual = self.form[name].forward, self._residual_to_apply(name)
            base = partial(forward, residual, base=base, term=self._term, bias=inner, **self._means(name))
        y = base(x)
        return y if last is None else y + last.to(y.dtype)

    def _mixed_batch_forward(self, x: Tensor, adapter_names: list[str], args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Each row through its adapter, and all rows through the base layer at once."""
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            rows.setdefault(name if name in self.form else "__base__", []).append(row)
        apart = [name for name in rows if name in self.form and self.form[name].calls_twice(self.scaling[name])]
        together = [name for name in rows if name not in apart]
        names = [name for name in together if name in self.form]
        inner, last = self._biases(x, names, plain_call=not (args or kwargs))
        means = {name: {"residual": self._residual_to_apply(name), **self._means(name)} for name in names}
        inputs: dict[str, tuple[Any, Any]] = {
            name: self.form[name].enter(x=x[rows[name]], **means[name]) if name in names else (x[rows[name]], None)
            for name in together
        }
        parts = {name: self._adapted_forward(x[rows[name]], [name], args, kwargs) for name in apart}
        if together:
            y = self._base(torch.cat([entered for entered, _ in inputs.values()]), last is not None, args, kwargs)
            for name, part in zip(together, y.split([len(rows[name]) for name in together]), strict=True):
                if name in names:
                    leave = self.form[name].leave
                    part = leave(y=part, dropped=inputs[name][1], term=self._term, bias=inner, **means[name])
                parts[name] = part if last is None else part + last.to(part.dtype)
        order = torch.tensor([row for name in parts for row in rows[name]], device=x.device)
        return torch.cat(list(parts.values()))[order.argsort()]

    def _means(self, name: str) -> dict[str, Any]:
        return {
            "scale": self.scaling[name],
            "dropout": partial(self._dropped, self.dlor_dropout[name]),
            "mix": self._mix,
        }

    def _base(self, x: Tensor, without_bias: bool, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        if without_bias:
            return self._without_bias(x)
        y = self.base_layer(x, *args, **kwargs)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"dlor_peft.layers: a {type(self.get_base_layer()).__name__} returns a {type(y).__name__}, where a "
                "layer that can be adapted returns one tensor. Keep it out with exclude_modules."
            )
        if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
            warnings.warn(
                f"dlor_peft.layers: a {type(self.get_base_layer()).__name__} passes no gradient to its input: nothing "
                "before it is trained.",
                stacklevel=2,
            )
        return y

    def _biases(self, x: Tensor, adapter_names: list[str], plain_call: bool) -> tuple[Tensor | None, Tensor | None]:
        """The bias in the base layer's output, which adapters of the output leave out, and that to add in the end.

        Subtracting the bias keeps the untrained adapter the exact identity, but in half precision it costs the digits
        that the bias covers. There the base layer is applied without it, where that can be done.
        """
        bias = self._bias(x) if any(self.form[name].acts_on_output for name in adapter_names) else None
        if bias is None:
            return None, None
        autocast = is_autocast(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if dtype.itemsize < 4 and plain_call and self._is_plain():
            return None, self._along_features(bias)
        return self._along_features(bias), None

    def _is_plain(self) -> bool:
        """Whether calling the base layer is its weight and bias and nothing else: no hook, no sharded weight."""
        layer = self.base_layer
        return (
            type(layer) in self.plain_forwards
            and type(layer).forward is self.plain_forwards[type(layer)]
            and type(layer.weight) is nn.Parameter
            and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)
            and not (layer._backward_hooks or layer._backward_pre_hooks or _has_any_global_hook())
            and not is_fsdp_managed(layer)
        )

    def _without_bias(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _bias(self, x: Tensor) -> Tensor | None:
        layer = self.get_base_layer()
        if getattr(layer, "bias", None) is None:
            return None
        # a layer of another method in between may add to it
        return fetch(layer, "bias") if self.base_layer is layer else self._response_to_zero(x)

    def _response_to_zero(self, x: Tensor) -> Tensor:
        """The bias, (out_features,), as the base layer adds it."""
        return self.base_layer(x.new_zeros(1, self.in_features))[0]

    def _along_features(self, bias: Tensor) -> Tensor:
        """(out_features,) -> a shape that broadcasts with the output."""
        return bias

    def low_rank_response(self, adapter_name: str, x: Tensor, y: Tensor, V: Tensor) -> Tensor:
        """t = z V (..., columns of V), z what the low-rank term of a fresh adapter reads when x becomes y.

        Differentiable in V, which may have any number of columns.
        """
        form = self.form[adapter_name]
        if form.mode == "multiplicative":
            bias = self._bias(x) if form.acts_on_output else None
            z = (y if bias is None else y - self._along_features(bias).to(y.dtype)) if form.acts_on_output else x
            return self._read_features(z, V)
        return self._read_input(x, V)

    def _read_features(self, z: Tensor, V: Tensor) -> Tensor:
        return z.to(V) @ V

    def _read_input(self, x: Tensor, V: Tensor) -> Tensor:
        return x.to(V) @ V

    def _dropped(self, dropout: nn.Module, x: Tensor) -> Any:
        return dropout(x)

    # between the features of one activation, and from the input of the layer to its output
    _mix = staticmethod(update)
    _term = staticmethod(update)
