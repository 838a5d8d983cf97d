"""The limits that DLoR is held to, and whether a run kept them."""

from __future__ import annotations

from dataclasses import dataclass

from .lineup import Lineup
from .measuring import FROZEN, Rounds

STATED_FOR = {
    "cpu": "one layer of width 1024, 1024 tokens, rank 16",
    "cuda": "one block of Llama-3-8B, 8192 tokens, rank 16",
}


@dataclass(frozen=True)
class Goal:
    """A limit of the quotient of two contestants' times, or of the bytes that they save for the backward pass."""

    quantity: str  # "time" or "saved"
    name: str
    over: str
    limits: dict[tuple[str, str], float]  # (device, dtype) -> limit
    is_floor: bool = False

    def __str__(self) -> str:
        return f"{self.quantity}: {self.name} / {self.over}"

    def row(self, device: str, dtype: str, rounds: Rounds, lineup: Lineup) -> list[str] | None:
        """What it says, limit, measured, met; None where it has no limit for that device and dtype, or was not run."""
        limit = self.limits.get((device, dtype))
        if limit is None or not {self.name, self.over} <= {*lineup.entries, *lineup.failed}:
            return None
        sign = ">=" if self.is_floor else "<="
        if self.name not in rounds.ratios or self.over not in rounds.ratios:
            return [str(self), f"{sign} {limit:.2f}", "", "not measured"]
        if self.quantity == "time":
            measured = rounds.ratio(self.name, self.over)
            value, text = measured.median, str(measured)
        else:
            value = lineup.entries[self.name].saved_bytes / lineup.entries[self.over].saved_bytes
            text = f"{value:.3f}"
        met = "yes" if (value >= limit if self.is_floor else value <= limit) else "NO"
        # what is saved does not depend on how fast the machine was
        met = "void" if rounds.is_void and self.quantity == "time" else met
        return [str(self), f"{sign} {limit:.2f}", text, met]


def _limits(float32: float | None, bfloat16: float, cuda: float) -> dict[tuple[str, str], float]:
    limits = {("cpu", "bfloat16"): bfloat16, ("cuda", "bfloat16"): cuda}
    return limits if float32 is None else {("cpu", "float32"): float32, **limits}


def _at_equal(method: str, cpu: float, cuda: float) -> list[Goal]:
    return [
        Goal("time", f"PEFT {method}, equal {what}", "DLoR scaled", _limits(cpu, cpu, cuda), is_floor=True)
        for what in ("rank", "parameters")
    ]


LAYER = [
    Goal("time", "DLoR scaled", FROZEN, _limits(1.10, 1.20, 1.15)),
    Goal("time", "DLoR additive", FROZEN, _limits(1.10, 1.20, 1.15)),
    Goal("time", "DLoR multiplicative, depth 4", FROZEN, _limits(1.25, 1.40, 1.18)),
    Goal("time", "DLoR multiplicative, depth 4", "DLoR multiplicative, depth 1", _limits(1.15, 1.15, 1.05)),
    Goal("time", "DLoR scaled", "PEFT LoRA", _limits(None, 0.80, 0.75)),
    Goal("time", "DLoR scaled", "addmm_ LoRA", _limits(1.00, 1.00, 0.95)),
    *_at_equal("HRA", 15, 8),
    *_at_equal("BOFT", 4, 3),
    *_at_equal("OFT", 1.1, 1.1),
    Goal("time", "PEFT DoRA", "DLoR scaled", _limits(2, 2, 1.3), is_floor=True),
    Goal("saved", "DLoR multiplicative, depth 4", "DLoR multiplicative, depth 1", _limits(1.10, 1.10, 1.05)),
    Goal("saved", "DLoR scaled", "PEFT LoRA", _limits(1.00, 0.50, 0.50)),
]
"""For one layer or block, see STATED_FOR."""

TRAINING_STEP = [Goal("time", "DLoR scaled", "PEFT LoRA", _limits(0.95, 0.95, 0.92))]
"""For whole training steps of a model."""
