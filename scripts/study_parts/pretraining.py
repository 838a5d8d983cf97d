"""A small Llama, pre-trained for some minutes: a base of larger width than the models that are at hand."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dlor_peft.training.folder import atomic

from .sources import Sources
from .texts import Text

BASE = "wikitext2_small"
"""What it is trained on: English, but neither Shakespeare nor a task of the study."""

TOKENIZER = "stories260K"
"""Whose tokenizer it has: 512 pieces with bytes to fall back on, so that nothing is lost."""

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
LEARNING_RATE = 1e-3
MEASUREMENTS = 10


def pretrain(sources: Sources, target: Path, minutes: float, sizes: dict[str, int] = SIZES, seed: int = 0) -> float:
    """Writes the model that was best on dev, with its tokenizer, to the folder `target`; its bits a byte on dev.

    AdamW, decay 0.1, in bfloat16 on a GPU. The learning rate rises over the first twentieth of the time and falls to
    0 at its end.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # steps are counted by the clock
    task = Text(sources, 10**9, TOKENIZER, BASE, (BASE, "test"))
    task.batch_size = 32 if device == "cuda" else 8
    torch.manual_seed(seed)
    config = LlamaConfig(
        **sizes, vocab_size=len(task.tokenizer), max_position_embeddings=512, tie_word_embeddings=True
    )
    model: Any = LlamaForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.1, betas=(0.9, 0.95))
    best, measured, start = math.inf, 0, time.monotonic()
    with atomic(target) as partial:
        for rows in task.batches(seed):
            share = (time.monotonic() - start) / (60 * minutes)
            if share * MEASUREMENTS >= measured + 1 or share >= 1:
                measured += 1
                bits = task.evaluate(model, "dev")["bits_per_byte"]
                print(f"{min(share, 1):.0%}: {bits:.4f} bits a byte on dev", flush=True)
                if bits < best:
                    best = bits
                    model.save_pretrained(partial)
            if share >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1, share / 0.05) * (1 - share)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = task.loss(model, rows)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        task.tokenizer.save_pretrained(partial)
    return best
