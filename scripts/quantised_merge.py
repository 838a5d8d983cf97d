"""What merging an adapter into quantised weights costs, beside what the adapter does: a table for the README.

    dlor train smol-lm-sft output_dir=runs/smol-lm-sft   # about a minute
    python scripts/quantised_merge.py runs/smol-lm-sft

The base model is loaded in float32 and through bitsandbytes; the adapter is applied beside it, then merged into it.
The error is the distance of the logits after merging from those before, relative to their distance from the base
model's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import dlor_peft  # noqa: F401

TEXTS = Path(__file__).parents[1] / "recipes" / "data" / "tinyshakespeare" / "test.jsonl"
TOKENS = 128
BASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "8-bit": {"load_in_8bit": True},
    "4-bit (nf4)": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
    },
}


@torch.no_grad()
def evaluate(model: nn.Module, texts: list[Tensor]) -> tuple[float, Tensor]:
    """Mean loss over the texts, and all logits."""
    outputs = [model(input_ids=ids, labels=ids) for ids in texts]
    return sum(out.loss.item() for out in outputs) / len(outputs), torch.cat([out.logits.flatten() for out in outputs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the output_dir of a run of the recipe smol-lm-sft")
    adapter = parser.parse_args().run / "adapter"
    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = map(json.loads, TEXTS.read_text(encoding="utf-8").splitlines())
    texts = [tokenizer(row["text"], return_tensors="pt").input_ids[:, :TOKENS] for row in rows]
    print(f"{'base':12} {'loss':>6} {'adapted':>8} {'merged':>7} {'error':>8}")
    for name, quantisation in BASES.items():
        settings = {"quantization_config": BitsAndBytesConfig(**quantisation)} if quantisation else {}
        # on a CPU bitsandbytes repacks 4-bit weights for inference, which these layers are too small for
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **settings).train()
        base_loss, base_logits = evaluate(model, texts)
        model = PeftModel.from_pretrained(model, adapter).train()
        loss, logits = evaluate(model, texts)
        model.merge_adapter()
        merged_loss, merged_logits = evaluate(model, texts)
        error = (merged_logits - logits).norm() / (logits - base_logits).norm()
        print(f"{name:12} {base_loss:6.3f} {loss:8.3f} {merged_loss:7.3f} {error:8.2g}")


if __name__ == "__main__":
    main()
