"""DLoRConfig: what a user chooses of a DLoR adapter, checked when it is constructed."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from peft.utils.other import get_pattern_key
from peft.utils.peft_types import PeftType

from . import __version__
from .card import describe
from .fields import document_fields

MODES = ("additive", "scaled", "multiplicative")
SIDES = ("input", "output", "both", "auto")
DIAGONALS = ("vector", "scalar", "none")
BIASES = ("none", "all", "dlor_only")
PATTERNS = {"mode": "mode_pattern", "side": "side_pattern", "r": "rank_pattern", "depth": "depth_pattern"}


@document_fields
@dataclass
class DLoRConfig(PeftConfig):
    """The configuration of a [`DLoRModel`]: which layers are adapted, and the form of their update.

    With W the frozen weight (out_features, in_features), s the adapter's scale (1 unless changed), delta the stored
    diagonal and U, V the low-rank factors, the adapted weight is

    | mode | side | W' |
    |---|---|---|
    | "additive" | | W + s (delta I + U V^T), I the rectangular identity |
    | "scaled" | "output" | diag(1 + s delta) W + s U V^T |
    | "scaled" | "input" | W diag(1 + s delta) + s U V^T |
    | "scaled" | "both" | W + s (diag(1 + delta) W diag(1 + delta_in) + U V^T - W) |
    | "multiplicative" | "input" | W P, P = I + s (F_depth ... F_1 - I), F_k = diag(1 + delta_k) + U_k V_k^T |
    | "multiplicative" | "output" | P W |

    Every mode starts as the exact identity, in half precision up to one rounding where a bias is added last. The bias
    of an adapted layer is never scaled or rotated.

    Raises:
        ValueError, TypeError: at construction, for any value or combination that could not be honoured.
    """

    r: int = 8
    """Rank of U V^T in each factor. 0 trains the diagonal only."""

    mode: str = "scaled"
    """How the update meets the frozen weight: "additive", "scaled" or "multiplicative"."""

    side: str = "auto"
    """Side of the weight that the diagonal (scaled) or the factors (multiplicative) act on: "input", "output", or, for
    scaled, "both". "auto" takes the smaller of in_features and out_features layer by layer, the input where they are
    equal. At a scale other than 1, "both" calls the frozen layer twice, and so 2^n times for n such adapters."""

    depth: int = 1
    """Number of stacked factors. More than 1 only in mode "multiplicative", where it changes the parametrisation, not
    the function class: a stack equals one factor of rank depth * r."""

    diagonal: str = "vector"
    """Trainable diagonal: "vector" (one value a feature), "scalar" (one value a factor) or "none"."""

    dlor_dropout: float = 0.0
    """Dropout probability on the input of the update; the frozen path sees the undropped input."""

    init_weights: bool | Literal["svd"] = True
    """True starts as the exact identity: delta = 0, U = 0, V Kaiming-uniform. "svd" is the same identity with V from
    the directions in which W is largest, at the size of the random start. False draws all of them at random: for tests
    only. `dlor_peft.initialize_from_data` takes V from the inputs of the layers instead."""

    target_modules: list[str] | str | None = None
    """Modules to adapt: a list of names or suffixes, a regex that matches whole names, or "all-linear" for every
    linear layer but the output layer. None takes PEFT's defaults for the architecture."""

    exclude_modules: list[str] | str | None = None
    """Modules not to adapt: a list of names or suffixes, or a regex that matches whole names."""

    modules_to_save: list[str] | None = None
    """Modules besides the adapters that are trained and saved in full, for example a fresh classification head."""

    layers_to_transform: list[int] | int | None = None
    """Indices of the layers to adapt, where target_modules is a list."""

    layers_pattern: list[str] | str | None = None
    """Name of the ModuleList that layers_to_transform counts in, for example "layers" or "h"."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks that differ from r: module name or regex -> rank."""

    depth_pattern: dict[str, int] = field(default_factory=dict)
    """Depths that differ from depth: module name or regex -> depth."""

    mode_pattern: dict[str, str] = field(default_factory=dict)
    """Modes that differ from mode: module name or regex -> mode."""

    side_pattern: dict[str, str] = field(default_factory=dict)
    """Sides that differ from side: module name or regex -> side. What a layer gets from all patterns together must be
    allowed for one mode: for a layer of mode "additive", for example, "auto"."""

    bias: str = "none"
    """Which biases are trained besides the adapters: "none", "all" or "dlor_only" (those of adapted layers). Trained
    biases belong to the base model: disabling the adapter does not restore them."""

    target_parameters: list[str] | None = None
    """Parameters to adapt, besides or instead of modules, by name or suffix: for the weights of modules that are no
    linear layers, such as "mlp.experts.gate_up_proj". A tensor of three dimensions gets factors for each expert. W' is
    formed anew in every call; dropout and mixed batches are not possible there. All adapters of a model must name the
    same parameters."""

    ensure_weight_tying: bool = False
    """Where the input embedding is tied to other layers and one of them is adapted or trained in full, do the same to
    all of them, with one set of tensors."""

    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Token ids whose embeddings are trained and saved, for the input embedding or by embedding module name."""

    fan_in_fan_out: bool = False
    """Whether targeted weights are stored as (in_features, out_features). The orientation is read off the layer class;
    True for a torch.nn.Linear warns and is overruled, as in PEFT's LoRA."""

    dlor_version: str | None = None
    """Version of dlor-peft that wrote this configuration; filled in when it is left empty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("DLOR")
        self.dlor_version = self.dlor_version or __version__
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # pyright: ignore[reportAttributeAccessIssue]
        for name in PATTERNS.values():
            setattr(self, name, getattr(self, name) or {})
        # PEFT fills them in while it injects the adapter; they are not saved
        self.modules_to_tie: set[str] | None = None
        self.target_modules_to_tie: set[str] | None = None
        self._check_values()
        self._check_form()
        self._check_layers()

    def for_layer(self, name: str) -> DLoRConfig:
        """This configuration for the layer of that name alone, without patterns.

        Mode, side, r and depth are each those of the first key of their pattern that matches, or the general ones.

        Raises:
            ValueError: together they have no meaning, such as a depth of 2 in mode "scaled".
        """
        layer = copy.copy(self)
        for field_name, pattern_name in PATTERNS.items():
            pattern = getattr(self, pattern_name)
            value = pattern.get(get_pattern_key(list(pattern), name), getattr(self, field_name))
            setattr(layer, field_name, value)
            setattr(layer, pattern_name, {})
        try:
            layer._check_form()
        except ValueError as error:
            raise ValueError(
                f"{error} These are the values that the patterns give the layer {name!r}: name it in mode_pattern, "
                "side_pattern, rank_pattern or depth_pattern."
            ) from None
        return layer

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and into the model card what the adapter is and how to load it."""
        super().save_pretrained(save_directory, **kwargs)
        describe(save_directory)

    def _check_values(self) -> None:
        _check_choice("mode", self.mode, MODES)
        _check_choice("side", self.side, SIDES)
        _check_choice("diagonal", self.diagonal, DIAGONALS)
        _check_choice("bias", self.bias, BIASES)
        _check_integer("r", self.r, 0)
        _check_integer("depth", self.depth, 1)
        for name in PATTERNS.values():
            if not isinstance(getattr(self, name), dict):
                raise _error(TypeError, name, getattr(self, name), "a dict", "Map module names or regexes to values.")
        for name, lowest in (("rank_pattern", 0), ("depth_pattern", 1)):
            for key, value in getattr(self, name).items():
                _check_integer(f"{name}[{key!r}]", value, lowest)
        for name, known in (("mode_pattern", MODES), ("side_pattern", SIDES)):
            for key, value in getattr(self, name).items():
                _check_choice(f"{name}[{key!r}]", value, known)
        if isinstance(self.dlor_dropout, bool) or not isinstance(self.dlor_dropout, int | float):
            raise _error(TypeError, "dlor_dropout", self.dlor_dropout, "a number", "Pass a probability such as 0.05.")
        if not 0 <= self.dlor_dropout < 1:
            raise _error(
                ValueError, "dlor_dropout", self.dlor_dropout, "at least 0 and below 1", "Pass 0 for no dropout."
            )
        if isinstance(self.init_weights, str):
            _check_choice("init_weights", self.init_weights, ("svd",))
        elif not isinstance(self.init_weights, bool):
            raise _error(
                TypeError, "init_weights", self.init_weights, 'True, False or "svd"', "Leave it out if in doubt."
            )
        for name in ("fan_in_fan_out", "ensure_weight_tying"):
            if not isinstance(getattr(self, name), bool):
                raise _error(TypeError, name, getattr(self, name), "True or False", "Leave it out if in doubt.")

    def _check_form(self) -> None:
        if self.diagonal == "none" and 0 in (self.r, *self.rank_pattern.values()):
            raise ValueError(
                'dlor_peft.config: r=0 with diagonal="none" leaves nothing to train. Give r >= 1 (in rank_pattern '
                'too), or a diagonal "vector" or "scalar".'
            )
        # which layers the patterns name is not known yet: `for_layer` looks at each
        modes = {self.mode, *self.mode_pattern.values()}
        deepest = max(self.depth, *self.depth_pattern.values(), 1)
        if deepest > 1 and "multiplicative" not in modes:
            raise ValueError(
                f'dlor_peft.config: depth={deepest} needs mode="multiplicative", but mode is {self.mode!r}: a stack '
                f"of additive or scaled terms is one term of rank depth * r. Use r={deepest * max(self.r, 1)} with "
                f'depth=1 for the same number of parameters, or mode="multiplicative".'
            )
        for side in (self.side, *self.side_pattern.values()):
            self._check_side(side, modes)

    def _check_side(self, side: str, modes: set[str]) -> None:
        if side == "both" and "scaled" not in modes:
            raise ValueError(
                f'dlor_peft.config: side="both" needs mode="scaled", but mode is {self.mode!r}. Use side="input", '
                f'"output" or "auto".'
            )
        if side != "auto" and modes == {"additive"}:
            raise ValueError(
                f'dlor_peft.config: side={side!r} has no meaning in mode "additive", whose update is added to '
                f'the weight. Leave side="auto".'
            )
        if side != "auto" and "multiplicative" not in modes and self.diagonal == "none":
            raise ValueError(
                f'dlor_peft.config: side={side!r} has no meaning in mode "scaled" with diagonal="none": only the '
                f'diagonal has a side there. Leave side="auto", or use diagonal="vector" or "scalar".'
            )

    def _check_layers(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            _check_items(name, getattr(self, name), str, "a string", alone=True)
        for name in ("target_modules", "exclude_modules", *PATTERNS.values()):
            value = getattr(self, name)
            for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
                _check_regex(name, pattern)
        if isinstance(self.target_parameters, str):
            raise TypeError(
                "dlor_peft.config: `target_parameters` must be a list of strings or None. It is "
                f"{self.target_parameters!r}: write it as a list."
            )
        for name in ("modules_to_save", "target_parameters"):
            _check_items(name, getattr(self, name), str, "a string", alone=False)
        _check_items("layers_to_transform", self.layers_to_transform, int, "a layer index", alone=True)
        tokens = self.trainable_token_indices
        for indices in tokens.values() if isinstance(tokens, dict) else [tokens]:
            _check_items("trainable_token_indices", indices, int, "a token id", alone=False)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "dlor_peft.config: `layers_to_transform` cannot be used when `target_modules` is a str. Name the "
                "layers in the regex, or pass target_modules as a list."
            )
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError(
                "dlor_peft.config: `layers_pattern` cannot be used when `target_modules` is a str. Name the "
                "layers in the regex, or pass target_modules as a list."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "dlor_peft.config: When `layers_pattern` is specified, `layers_to_transform` must also be specified. "
                "Name the layer indices in layers_to_transform, or drop layers_pattern."
            )


def _error(kind: type[Exception], name: str, value: Any, allowed: str, remedy: str) -> Exception:
    return kind(f"dlor_peft.config: {name} must be {allowed}, but it is {value!r}. {remedy}")


def _check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    known = tuple(known)
    if value in known:
        return
    close = difflib.get_close_matches(str(value), known, n=1)
    remedy = f"Did you mean {close[0]!r}?" if close else f"Use {known[0]!r} if in doubt."
    raise _error(ValueError, name, value, f"one of {', '.join(map(repr, known))}", remedy)


def _check_items(name: str, value: Any, kind: type, what: str, alone: bool) -> None:
    if value is None:
        return
    if alone and isinstance(value, kind):
        value = [value]
    if not isinstance(value, list | set | tuple) or not all(isinstance(item, kind) for item in value):
        allowed = f"a list, each item {what}" + (f", or {what} alone" if alone else "")
        raise _error(TypeError, name, value, allowed, "Write it as a list.")
    for number in value if kind is int else ():
        _check_integer(name, number, 0)


def _check_regex(name: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise _error(TypeError, name, pattern, "a module name or a regex", "Write it as a string.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise _error(ValueError, name, pattern, f"a regex ({error})", "Escape what is meant literally.") from error


def _check_integer(name: str, value: Any, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _error(TypeError, name, value, "an integer", f"Pass a whole number of at least {lowest}.")
    if value < lowest:
        raise _error(ValueError, name, value, f"an integer of at least {lowest}", f"Pass {lowest} or more.")
