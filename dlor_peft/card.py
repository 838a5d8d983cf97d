"""An adapter directory explains itself: the model card says how to load it."""

from pathlib import Path
from typing import cast

from huggingface_hub import ModelCard, ModelCardData

_HEADING = "## How to load this adapter"

_INTRODUCTION = """\
This is a DLoR adapter, made with the Python package dlor-peft. PEFT knows the method once that package is imported;
without the import it raises `KeyError: 'DLOR'`.
"""

_GENERIC = """\
import dlor_peft  # makes DLOR known to PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/or/repo-id/of/this/adapter")
"""


def add_usage(directory: str | Path, code: str = _GENERIC) -> None:
    """The model card (README.md) of `directory` has the tag "dlor" and ends with the lines that load its adapter.

    The card is made where there is none. Called again, it replaces those lines. The card is replaced in one step: an
    interrupted save leaves the former one.
    """
    path = Path(directory) / "README.md"
    if path.exists():
        card = ModelCard.load(path, ignore_metadata_errors=True)
    else:
        card = ModelCard(f"---\n{ModelCardData(library_name='peft').to_yaml()}\n---\n")
    data = cast(ModelCardData, card.data)
    tags = data.tags or []
    data.tags = tags if "dlor" in tags else [*tags, "dlor"]
    before, _, _ = card.text.partition(_HEADING)
    card.text = f"{before.rstrip()}\n\n{_HEADING}\n\n{_INTRODUCTION}\n```python\n{code}```\n"
    partial = path.with_name(".README.md.partial")
    partial.write_text(str(card), encoding="utf-8")
    partial.replace(path)
