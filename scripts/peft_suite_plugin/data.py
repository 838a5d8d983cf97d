"""Stand-ins for the data sets that the suite downloads."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict


def load_dataset(name: str, *args: Any, **kwargs: Any) -> Any:
    """In the place of `datasets.load_dataset`.

    Raises:
        ValueError: the suite asks for a data set that has no stand-in.
    """
    if name == "ybelkada/english_quotes_copy":
        quotes = [f"A quote of {length} words: {' '.join(['so'] * length)}." for length in range(1, 33)]
        rows = {"quote": quotes, "author": ["nobody"] * len(quotes), "tags": [["short"]] * len(quotes)}
        return DatasetDict(train=Dataset.from_dict(rows))
    if name == "huggingface/cats-image":
        from PIL import Image

        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        return {"test": {"image": [Image.fromarray(pixels)]}}
    raise ValueError(f"the data set {name!r} has no stand-in in {__name__}")
