"""The methods that are compared, each at the number of parameters of a LoRA of rank k on the same layers.

I in_features, O out_features of a layer, r its rank, k the budget
    LoRA r (I + O)     budget of a layer k (I + O)
Where no single rank meets the budget, ranks differ by one from layer to layer, spread evenly over the layers of each
kind (all query projections, then all keys, ...); a layer whose share is below the least that the method can be is left
out. Methods that take one rank for all layers leave out layers, spread evenly, at the least rank that exceeds the
budget. A form of DLoR that could have a rank in less than a third of the layers, and is a set of diagonals in the
others, is not run at that budget.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import HRAConfig, IA3Config, LoraConfig, MissConfig, OFTConfig, PeftConfig, VeraConfig

from dlor_peft import DLoRConfig
from dlor_peft.form import Form

Layers = Mapping[str, tuple[int, int]]
"""Name -> (I, O), in the order of the model."""

Ranks = dict[str, int]
"""Name -> r of the layers that are adapted."""

# all layers, at any budget
SINGLE = -1

LEAST_SHARE = 1 / 3
"""Of the layers, that must have a rank of at least 1."""


@dataclass(frozen=True)
class Method:
    """How many parameters it has, and its PEFT config for given ranks."""

    size: Callable[[int, int, int], int]
    """Parameters of a layer, of I, O and r."""

    config: Callable[[Ranks, Layers], PeftConfig]
    ranks: tuple[int, ...] = tuple(range(1, 129))
    """What r may be, ascending."""

    has_rank_pattern: bool = True
    fits: Callable[[int, int], bool] = lambda I, r: True
    """Whether a layer of I in_features can have the rank r."""

    tolerance: float = 0.03
    """How far its number of parameters may be from the budget, as a part of it."""

    lora_plus: float | None = None
    """LoRA+: by how much the learning rate of B exceeds that of A."""

    ratios: Mapping[str, float] = field(default_factory=dict)
    """DLoR: `diag_lr_ratio` and `u_lr_ratio` of `dlor_peft.parameter_groups`."""

    start: float = 1.0
    """DLoR: by what the random start of V is multiplied."""


def allocate(method: Method, layers: Layers, k: int) -> Ranks | None:
    """The rank of each layer, so that all have together what LoRA of rank k has; None where the method can't."""
    budget = {name: k * (I + O) for name, (I, O) in layers.items()}
    if method.ranks == (SINGLE,):
        return dict.fromkeys(layers, SINGLE)
    if not method.has_rank_pattern:
        return _within(method, layers, _subset(method, layers, sum(budget.values())), sum(budget.values()))
    ranks, carry = {}, 0
    for name in _by_kind(layers):
        I, O = layers[name]
        carry += budget[name]
        sizes = {r: method.size(I, O, r) for r in method.ranks}
        # a layer that is left out costs nothing
        options = {None: 0, **sizes}
        r = min(options, key=lambda r: abs(carry - options[r]))
        carry -= options[r]
        if r is not None:
            ranks[name] = r
    if sum(r > 0 for r in ranks.values()) < LEAST_SHARE * len(layers):
        return None
    return _within(method, layers, {name: ranks[name] for name in layers if name in ranks}, sum(budget.values()))


def _by_kind(layers: Layers) -> list[str]:
    """The layers of the same place in all blocks behind each other, so that none of the places is always left out."""
    kinds = dict.fromkeys(re.sub(r"\d+", "", name) for name in layers)
    order = {kind: index for index, kind in enumerate(kinds)}
    return sorted(layers, key=lambda name: order[re.sub(r"\d+", "", name)])


def _within(method: Method, layers: Layers, ranks: Ranks, budget: int) -> Ranks | None:
    return ranks if abs(num_parameters(method, layers, ranks) - budget) <= method.tolerance * budget else None


def _subset(method: Method, layers: Layers, budget: int) -> Ranks:
    totals = {
        r: sum(method.size(I, O, r) for I, O in layers.values())
        for r in method.ranks
        if all(method.fits(I, r) for I, _ in layers.values())
    }
    nearest = min(totals, key=lambda r: abs(totals[r] - budget))
    if abs(totals[nearest] - budget) <= method.tolerance * budget:
        return dict.fromkeys(layers, nearest)
    larger = [r for r in totals if totals[r] > budget][:3]
    if not larger:
        return dict.fromkeys(layers, nearest)
    subsets = [_spread(method, layers, budget, r, totals[r]) for r in larger]
    return min(subsets, key=lambda ranks: abs(num_parameters(method, layers, ranks) - budget))


def _spread(method: Method, layers: Layers, budget: int, r: int, total: int) -> Ranks:
    chosen, carry = {}, 0.0
    for name in _by_kind(layers):
        I, O = layers[name]
        carry += method.size(I, O, r) * budget / total
        if carry >= method.size(I, O, r) / 2:
            chosen[name] = r
            carry -= method.size(I, O, r)
    return {name: r for name in layers if name in chosen}


def num_parameters(method: Method, layers: Layers, ranks: Ranks) -> int:
    return sum(method.size(*layers[name], r) for name, r in ranks.items())


def rank_counts(ranks: Ranks) -> dict[str, int]:
    """Rank -> how many layers have it; a layer that is left out is in none."""
    return {str(r): list(ranks.values()).count(r) for r in sorted(set(ranks.values()))}


def _pattern(ranks: Ranks) -> dict[str, Any]:
    base = max(set(ranks.values()), key=list(ranks.values()).count)
    return {"r": base, "rank_pattern": {name: r for name, r in ranks.items() if r != base}}


def _dlor(ratios: Mapping[str, float] | None = None, start: float = 1.0, **options: Any) -> Method:
    def form(I: int, O: int, r: int) -> Form:
        config = DLoRConfig(r=r, **options)
        return Form.resolve(config, r, config.depth, I, O)

    def size(I: int, O: int, r: int) -> int:
        total = 0
        for shape in form(I, O, r).shapes.values():
            product = 1
            for length in shape:
                product *= length
            total += product
        return total

    least = 1 if options.get("diagonal") == "none" else 0
    return Method(
        size,
        lambda ranks, layers: DLoRConfig(**_pattern(ranks), **options, target_modules=list(ranks)),
        ranks=tuple(range(least, 129)),
        ratios=ratios or {},
        start=start,
    )


def _lora(
    size: Callable[[int, int, int], int] | None = None, lora_plus: float | None = None, **options: Any
) -> Method:
    def config(ranks: Ranks, layers: Layers) -> LoraConfig:
        pattern = _pattern(ranks)
        scale = {"lora_alpha": 8}
        if not options.get("use_rslora"):
            # 2, whatever the rank
            scale = {
                "lora_alpha": 2 * pattern["r"],
                "alpha_pattern": {name: 2 * r for name, r in pattern["rank_pattern"].items()},
            }
        return LoraConfig(**pattern, **scale, **options, target_modules=list(ranks))

    return Method(size or (lambda I, O, r: r * (I + O)), config, lora_plus=lora_plus)


def _one_rank(
    config_class: Any,
    size: Callable[[int, int, int], int],
    ranks: tuple[int, ...],
    field: str = "r",
    fits: Callable[[int, int], bool] = lambda I, r: True,
    tolerance: float = 0.03,
    **options: Any,
) -> Method:
    def config(chosen: Ranks, layers: Layers) -> PeftConfig:
        rank = {} if ranks == (SINGLE,) else {field: next(iter(chosen.values()))}
        return config_class(**rank, **options, target_modules=list(chosen))

    return Method(size, config, ranks, has_rank_pattern=False, fits=fits, tolerance=tolerance)


def _ia3() -> Method:
    def config(chosen: Ranks, layers: Layers) -> PeftConfig:
        narrowing = [name for name, (I, O) in layers.items() if I > O]
        return IA3Config(target_modules=list(chosen), feedforward_modules=narrowing)

    # the vector is on the input of a feed-forward layer, and on the output of any other
    return Method(lambda I, O, r: I if I > O else O, config, (SINGLE,), has_rank_pattern=False)


METHODS: dict[str, Method] = {
    "dlor scaled": _dlor(mode="scaled", side="auto"),
    "dlor scaled both": _dlor(mode="scaled", side="both"),
    "dlor scaled input": _dlor(mode="scaled", side="input"),
    "dlor scaled output": _dlor(mode="scaled", side="output"),
    "dlor scaled scalar": _dlor(mode="scaled", side="auto", diagonal="scalar"),
    "dlor scaled U x4": _dlor({"u_lr_ratio": 4}, mode="scaled", side="auto"),
    "dlor scaled scalar U x4": _dlor({"u_lr_ratio": 4}, mode="scaled", side="auto", diagonal="scalar"),
    "dlor scaled none U x4": _dlor({"u_lr_ratio": 4}, mode="scaled", side="auto", diagonal="none"),
    "dlor scaled diagonal x4": _dlor({"diag_lr_ratio": 4, "u_lr_ratio": 1}, mode="scaled", side="auto"),
    "dlor scaled diagonal x0.25": _dlor({"diag_lr_ratio": 0.25, "u_lr_ratio": 1}, mode="scaled", side="auto"),
    "dlor scaled V x4": _dlor(start=4, mode="scaled", side="auto"),
    "dlor scaled V x8": _dlor(start=8, mode="scaled", side="auto"),
    "dlor scaled svd": _dlor(mode="scaled", side="auto", init_weights="svd"),
    "dlor additive": _dlor(mode="additive"),
    "dlor additive scalar": _dlor(mode="additive", diagonal="scalar"),
    "dlor multiplicative": _dlor(mode="multiplicative", side="auto"),
    "dlor multiplicative U x4": _dlor({"u_lr_ratio": 4}, mode="multiplicative", side="auto"),
    "dlor multiplicative input": _dlor(mode="multiplicative", side="input"),
    "dlor multiplicative output": _dlor(mode="multiplicative", side="output"),
    "dlor multiplicative scalar": _dlor(mode="multiplicative", side="auto", diagonal="scalar"),
    "dlor multiplicative none": _dlor(mode="multiplicative", side="auto", diagonal="none"),
    "dlor multiplicative depth 2": _dlor(mode="multiplicative", side="auto", depth=2),
    "dlor multiplicative depth 4": _dlor(mode="multiplicative", side="auto", depth=4),
    "lora": _lora(),
    "rslora": _lora(use_rslora=True),
    "lora+": _lora(lora_plus=16.0),
    "dora": _lora(lambda I, O, r: r * (I + O) + O, use_dora=True),
    "pissa": _lora(init_lora_weights="pissa"),
    "oft": _one_rank(
        OFTConfig,
        lambda I, O, b: I * (b - 1) // 2,
        (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128),
        "oft_block_size",
        fits=lambda I, b: I % b == 0,
        # its blocks divide the width, so that there are few sizes
        tolerance=0.04,
        r=0,
    ),
    "hra": _one_rank(HRAConfig, lambda I, O, r: r * I, tuple(range(2, 129, 2))),
    "miss": _one_rank(MissConfig, lambda I, O, r: r * O, tuple(range(1, 129))),
    "vera": _one_rank(VeraConfig, lambda I, O, r: r + O, tuple(range(1, 16385))),
    "ia3": _ia3(),
}

UNMATCHED = ("full", "head")
"""Fine-tuning of every weight, and of the head alone: they have no budget."""

PROBE = "probe"
"""Logistic regression on the frozen model's embeddings: no budget, no learning rate."""


def has_budget(method: str) -> bool:
    """Whether its parameters can be those of LoRA of any rank."""
    return method in METHODS and METHODS[method].ranks != (SINGLE,)
