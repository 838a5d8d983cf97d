"""Whether and how a test of the suite is run with DLoR."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import peft
import pytest

from . import cases
from .exceptions import otherwise
from .lifts import CONVERTED
from .reach import words_of
from .renaming import names_factors
from .repos import ADAPTERS
from .stand_in import ONLY_LORA, ONLY_LORAS

NO_METHOD = "no method can be put in"
INSIDE_LORA = "looks into LoRA's layers"
OF_LORA = "is about a variant of LoRA, or an optimiser for it"

_FILES_OF_LORA = re.compile(
    r"test_(arrow|bdlora|lora_(ga|intruders|megatron|variants)|lorafa|loraplus|randlora|riemannian_lora|unilora|velora"
    r"|xlora)"
)
# the method whose rows become DLoR's, where LoRA has none
_PLACES = {"test_quantization": peft.OFTConfig}
# where not those of most parametrisations: what is compiled takes long, and OFT adapts embeddings in this one only
_FORMS = {"test_torch_compile": (cases.DEFAULT, "multiplicative"), "test_quantization": (*cases.FEW, "multiplicative")}
_INSIDE_LORA = re.compile(r"lora_(magnitude_vector|alpha)|_LoraFactorsProxy|_register_custom_module|_restore_weights")
# tables in which every registered method has its row
_WALKS = re.compile(r"PEFT_TYPE_TO_\w+_MAPPING")
_CONVERSION = {"convert_to_lora", "save_as_lora", "supports_lora_conversion"}
# the form with the same two tensors as LoRA, for tests that name them, or count parameters
_TWO: dict[str, Any] = {"forms": ("no diagonal",), "form": cases.FORMS["no diagonal"]}
_COUNTS = {"trainable_params", "total_params"}


@dataclass
class Plan:
    """What is done with a test."""

    left_out: str | None = None
    """Why the test is not run; None where it is."""

    place: type = peft.LoraConfig
    """The method whose rows in a parametrisation become DLoR's."""

    forms: tuple[str, ...] = cases.FEW
    """The forms that such a row becomes."""

    form: Mapping[str, Any] = field(default_factory=dict)
    """The form of the configs that the test makes itself."""

    renames: bool = False
    """Whether LoRA's names in the test's strings and attributes become DLoR's."""

    reads_scale: bool = False
    """Whether the test looks at the scale of a layer, which for LoRA is lora_alpha / r."""

    quantises: bool = False
    """Whether the test quantises a model itself."""

    converts: bool = False
    """Whether DLoR takes the place of what is converted to LoRA."""


def plan(test: Any, owner: type | None, module: ModuleType) -> Plan:
    """Decide from the parametrisation and the code of a test."""
    file = module.__name__.rpartition(".")[2]
    place = _PLACES.get(file, peft.LoraConfig)
    marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    shares = [cases.share(mark, place) for mark in marks]
    names, strings = words_of(test, owner, module)
    in_cells = {text for mark in marks for text in cases.strings(mark)}
    walks = any(map(_WALKS.fullmatch, names))
    by_name = walks or "LoraConfig" in names or not ADAPTERS.keys().isdisjoint(strings | in_cells)
    if _CONVERSION & names and "some" not in shares:
        by_name = not names.isdisjoint(CONVERTED)
    if set(shares) <= {"none"} and not by_name:
        return Plan(left_out=NO_METHOD)
    if _FILES_OF_LORA.fullmatch(file):
        return Plan(left_out=OF_LORA)
    if (why := otherwise(f"{file}.py", test.__name__)) is not None:
        return Plan(left_out=why)
    forms = cases.SUMMABLE if "weighted_combination" in test.__name__ else _FORMS.get(file, cases.FEW)
    if "some" in shares:
        return Plan(place=place, forms=forms)
    if _CONVERSION & names:
        return Plan(converts=True)
    if in_cells & ONLY_LORAS or any(cases.asks_only_lora(mark) for mark in marks):
        return Plan(left_out=ONLY_LORA)
    names_them = any(map(names_factors, strings | names))
    if any(map(_INSIDE_LORA.fullmatch, names)):
        return Plan(left_out=INSIDE_LORA)
    made = Plan(forms=forms, renames=True, reads_scale="scaling" in names, quantises="BitsAndBytesConfig" in names)
    return replace(made, **_TWO) if names_them or _COUNTS & names else made


def rewrite(metafunc: pytest.Metafunc, plan: Plan) -> None:
    """Put DLoR's rows into the parametrisations of a test that is being collected."""
    marks = metafunc.definition.own_markers
    for number, mark in enumerate(marks):
        if mark.name == "parametrize" and cases.share(mark, plan.place) != "none":
            marks[number] = cases.rewrite(mark, plan.place, plan.forms)
