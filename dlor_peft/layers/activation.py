"""Adapters that act on the activations of a layer: the frozen weight is never written out anew."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ..form import Map
from ..kernels import update
from .base import DLoRLayer


class ActivationLayer(DLoRLayer):
    """A layer whose input and output are adapted, around one call of the base layer.

    Subclasses whose activations are not (..., features) override `_mix`, `_term` and `_along_features`.
    """

    # what calling such a base layer does is known: apply the weight, add the bias
    plain_types: tuple[type[nn.Module], ...] = ()

    def _adapted_forward(self, x: Tensor, adapter_names: list[str], args: tuple, kwargs: dict[str, Any]) -> Tensor:
        # adding the bias last keeps it out of what the adapters multiply
        bias = self._bias(x) if any(self.form[name].acts_on_output for name in adapter_names) else None
        base: Map = partial(self._base, bias=bias, args=args, kwargs=kwargs)
        for name in adapter_names:
            base = partial(
                self.form[name].forward,
                self.residual(name),
                base=base,
                scale=self.scaling[name],
                dropout=partial(self._dropped, self.dlor_dropout[name]),
                mix=self._mix,
                term=self._term,
            )
        y = base(x)
        return y if bias is None else y + self._along_features(bias).to(y.dtype)

    def _base(self, x: Tensor, bias: Tensor | None, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """x W^T where a bias is given, else what the base layer returns."""
        if bias is not None and self._is_plain() and not args and not kwargs:
            # subtracting the bias again would cost the digits that it covers in half precision
            return self._without_bias(x)
        y = self.base_layer(x, *args, **kwargs)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"dlor_peft.layers: a {type(self.get_base_layer()).__name__} returns a {type(y).__name__}, where a "
                "layer that can be adapted returns one tensor. Keep it out with exclude_modules."
            )
        return y if bias is None else y - self._along_features(bias).to(y.dtype)

    def _is_plain(self) -> bool:
        """Whether calling the base layer is its weight and bias and nothing else: no hook, no sharded weight."""
        layer = self.base_layer
        return (
            type(layer) in self.plain_types
            and type(layer.weight) is nn.Parameter
            and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)
        )

    def _without_bias(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _bias(self, x: Tensor) -> Tensor | None:
        bias = getattr(self.get_base_layer(), "bias", None)
        if bias is None or not bias.is_meta or x.is_meta:
            return bias
        # offloaded: the bias exists only while the base layer runs
        return self._response_to_zero(x)

    def _response_to_zero(self, x: Tensor) -> Tensor:
        """The bias, (out_features,), as the base layer adds it."""
        return self.base_layer(x.new_zeros(1, self.in_features))[0]

    def _along_features(self, bias: Tensor) -> Tensor:
        """(out_features,) -> a shape that broadcasts with the output."""
        return bias

    def _dropped(self, dropout: nn.Module, x: Tensor) -> Any:
        return dropout(x)

    # between the features of one activation, and from the input of the layer to its output
    _mix = staticmethod(update)
    _term = staticmethod(update)
