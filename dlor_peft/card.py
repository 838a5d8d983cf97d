"""An adapter directory explains itself: the model card says how to load it."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

_HEADING = "## How to load this adapter"


def add_usage(directory: str | Path) -> None:
    """The model card (README.md) of `directory` ends with the lines that load its adapter; made where there is none.

    Without `import dlor_peft` PEFT does not know the method and raises `KeyError: 'DLOR'`. Idempotent. The card is
    replaced in one step, so that an interrupted save leaves the former one.
    """
    path = Path(directory) / "README.md"
    if path.exists():
        card = ModelCard.load(path, ignore_metadata_errors=True)
    else:
        card = ModelCard(f"---\n{ModelCardData(library_name='peft').to_yaml()}\n---\n")
    if _HEADING in card.text:
        return
    card.text = f"{card.text.rstrip()}\n\n{_HEADING}\n{_USAGE}"
    partial = path.with_name(".README.md.partial")
    partial.write_text(str(card), encoding="utf-8")
    partial.replace(path)


_USAGE = """
This is a DLoR adapter: `pip install dlor-peft`, and import it before PEFT loads the adapter. Without the import PEFT
raises `KeyError: 'DLOR'`.

```python
import dlor_peft  # makes DLOR known to PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/or/repo-id/of/this/adapter")
```
"""
