"""DLoR's rows in the suite's parametrisations, made from the rows that the suite has for LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import peft
import pytest

from dlor_peft import DLoRConfig

from .renaming import rename
from .stand_in import OnlyLora, translate, translate_config

Form = Mapping[str, Any]

FORMS: dict[str, Form] = {
    "scaled": {},
    "scaled output": {"side": "output"},
    "scaled input": {"side": "input"},
    "scaled both": {"side": "both"},
    "additive": {"mode": "additive"},
    "multiplicative": {"mode": "multiplicative"},
    "multiplicative input 2": {"mode": "multiplicative", "side": "input", "depth": 2},
    "multiplicative output 3": {"mode": "multiplicative", "side": "output", "depth": 3},
    "scalar": {"diagonal": "scalar"},
    "no diagonal": {"mode": "additive", "diagonal": "none"},
    "diagonal only": {"r": 0},
}
DEFAULT = "scaled"
FEW = (DEFAULT, "scaled both", "additive", "multiplicative input 2")
"""The forms of every parametrisation but that of the small custom models, which has all."""
SUMMABLE = (DEFAULT, "additive", "multiplicative")
"""The forms whose weighted sum has that form again, and the sum of their ranks."""

# what a row of another method says about the model rather than about the method
_OF_THE_MODEL = {
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
}
_CUSTOM_MODEL_ROW = ["test_name", "model_id", "config_cls", "config_kwargs"]
# adapts LayerNorm, which DLoR does not
_OTHER_LAYERS = (peft.LNTuningConfig,)


class Row:
    """One value of a parametrisation: its cells by name, its marks and its id."""

    def __init__(self, cells: dict[str, Any], marks: Any, label: str | None, place: type) -> None:
        self.cells, self.marks, self.label, self.place = cells, marks, label, place

    def is_template(self) -> bool:
        """Whether it is a row of the method whose place DLoR takes."""
        return any(self._mentions_place(cell) for cell in self.cells.values())

    def as_dlor(self, form_name: str) -> Any:
        """The row with DLoRConfig of one form; None if it asks for what only LoRA has."""
        try:
            cells = {name: self._convert(cell, FORMS[form_name]) for name, cell in self.cells.items()}
        except OnlyLora:
            return None
        # where it is "lora" the test adds two adapters up, which only an update that does not read the weight allows
        if cells.get("tuner_method") == "lora" and FORMS[form_name].get("mode") != "additive":
            cells["tuner_method"] = "dlor"
        if isinstance(cells.get("test_name"), str):
            cells["test_name"] = f"{cells['test_name'].replace('LoRA', 'DLoR')}, {form_name}"
        label = self.label if self.label is None else f"{self.label}-{form_name}"
        label = label or cells.get("test_name")
        return pytest.param(*cells.values(), marks=self.marks, id=label)

    def suits(self, form_name: str) -> bool:
        """Whether DLoR in this form can do what the row asks."""
        form = FORMS[form_name]
        if self._parameters_differ():
            return False
        if form_name == DEFAULT and self.place is peft.LoraConfig:
            return True
        # a bare class is called by the test, which knows no forms
        if not any(self._arguments_or_configs_in(cell) for cell in self.cells.values()):
            return False
        model_id = str(self.cells.get("model_id", ""))
        additive = form.get("mode") == "additive" and form.get("diagonal") != "none"
        # no identity to add to between the groups, and mixing their outputs is no grouped convolution: DLoR refuses
        if "Groups" in model_id and (additive or (form.get("mode"), form.get("side")) == ("multiplicative", "output")):
            return False
        if any("emb" in target for target in self.targets()):
            # a head that is tied to the embedding changes with it, and bears no more than OFT's rotation
            if self.place is peft.OFTConfig:
                return form_name == "multiplicative"
            # an embedding has no input to scale or rotate
            return form.get("side") not in ("input", "both")
        return True

    def targets(self) -> list[str]:
        """The target_modules of all configs in the row."""
        targets: list[str] = []
        for cell in self.cells.values():
            for named in (made.get("target_modules") for made in self._arguments_or_configs_in(cell)):
                targets += [named] if isinstance(named, str) else named or []
        return targets

    def _parameters_differ(self) -> bool:
        """Whether its adapters target different parameters, which PEFT refuses for LoRA as for DLoR."""
        named = [cell.get("target_parameters") for cell in self.cells.values() if isinstance(cell, dict)]
        return any(parameters != named[0] for parameters in named)

    def _arguments_or_configs_in(self, cell: Any) -> list[dict[str, Any]]:
        """What a config is made with, or the fields of one that is made."""
        if isinstance(cell, list | tuple):
            return [found for item in cell for found in self._arguments_or_configs_in(item)]
        if isinstance(cell, dict):
            return [cell] if self._holds_arguments() else []
        return [vars(cell)] if type(cell) is self.place else []

    def _mentions_place(self, cell: Any) -> bool:
        if isinstance(cell, list | tuple):
            return any(map(self._mentions_place, cell))
        return cell is self.place or type(cell) is self.place

    def _convert(self, cell: Any, form: Form) -> Any:
        if cell is self.place:
            return DLoRConfig
        if type(cell) is self.place:
            return translate_config(cell, form)
        if isinstance(cell, list | tuple):
            return type(cell)(rename(item) if isinstance(item, str) else self._convert(item, form) for item in cell)
        if not isinstance(cell, dict) or not self._holds_arguments():
            return cell
        if cell and all(isinstance(value, dict) for value in cell.values()):
            # for the configs of several models
            return {name: self._convert(value, form) for name, value in cell.items()}
        return {**translate(cell, self.place), **form}

    def _holds_arguments(self) -> bool:
        """Whether it has the class, so that its dicts are arguments; beside a config they are something else."""
        return any(cell is self.place for cell in self.cells.values())


def share(mark: pytest.Mark, place: type) -> str:
    """How much of a parametrisation is of the method `place`: "all", "some" or "none"."""
    rows = [row.is_template() for row in _rows(mark, place)]
    return "all" if rows and all(rows) else "some" if any(rows) else "none"


def strings(mark: pytest.Mark) -> Iterator[str]:
    """The strings in the cells of a parametrisation."""
    for row in _rows(mark, peft.LoraConfig):
        yield from (cell for cell in row.cells.values() if isinstance(cell, str))


def asks_only_lora(mark: pytest.Mark) -> bool:
    """Whether every row is of LoRA, and asks for what only LoRA has."""
    rows = [row for row in _rows(mark, peft.LoraConfig) if row.is_template()]
    return bool(rows) and all(row.as_dlor(DEFAULT) is None for row in rows)


def rewrite(mark: pytest.Mark, place: type, forms: tuple[str, ...]) -> pytest.Mark:
    """A parametrisation with DLoR, in several forms, in the place of one method and without the others."""
    rows = list(_rows(mark, place))
    templates = [row for row in rows if row.is_template()]
    if list(rows[0].cells) == _CUSTOM_MODEL_ROW:
        values = list(_custom_model_rows(rows, templates))
    else:
        made = (row.as_dlor(name) for row in templates for name in forms if row.suits(name) or len(forms) == 1)
        values = [value for value in made if value is not None]
    kwargs = {name: value for name, value in mark.kwargs.items() if name not in ("argnames", "argvalues")}
    if not callable(kwargs.get("ids")):
        # they are in the rows now
        kwargs.pop("ids", None)
    return pytest.mark.parametrize(_argument(mark, 0, "argnames"), values, **kwargs).mark


def _argument(mark: pytest.Mark, position: int, name: str) -> Any:
    return mark.args[position] if len(mark.args) > position else mark.kwargs[name]


def _rows(mark: pytest.Mark, place: type) -> Iterator[Row]:
    names = _argument(mark, 0, "argnames")
    names = [name.strip() for name in names.split(",") if name.strip()] if isinstance(names, str) else list(names)
    values = list(_argument(mark, 1, "argvalues"))
    ids = mark.kwargs.get("ids")
    labels = [None] * len(values) if ids is None or callable(ids) else list(ids)
    for value, label in zip(values, labels, strict=True):
        marks: Any = ()
        # made by pytest.param
        if hasattr(value, "marks") and hasattr(value, "values"):
            value, marks, label = value.values, value.marks, value.id or label
        elif len(names) == 1:
            value = (value,)
        yield Row(dict(zip(names, value, strict=True)), marks, label, place)


def _custom_model_rows(rows: list[Row], templates: list[Row]) -> Iterator[Any]:
    """Every model and every set of targets that any method is tried on; in every form, the most of a model."""
    seen = []
    ours = [row for row in templates if row.as_dlor(DEFAULT) is not None]
    for row in ours:
        new = row.as_dlor(DEFAULT)
        if new.values[1:] not in seen:
            seen.append(new.values[1:])
            yield new
        rivals = [other for other in ours if other.cells["model_id"] == row.cells["model_id"]]
        if row is max(rivals, key=lambda rival: len(rival.targets())):
            yield from (row.as_dlor(name) for name in FORMS if name != DEFAULT and row.suits(name))
    for row in rows:
        name, model_id, config_cls, kwargs = row.cells.values()
        if config_cls is peft.LoraConfig or issubclass(config_cls, _OTHER_LAYERS):
            continue
        cells = model_id, DLoRConfig, {key: value for key, value in kwargs.items() if key in _OF_THE_MODEL}
        if "target_modules" in kwargs and cells not in seen:
            seen.append(cells)
            yield pytest.param(f"DLoR for {name}", *cells, id=f"DLoR for {name}")
