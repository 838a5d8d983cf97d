"""Whether a merged model says what the base says with its adapters."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from .adapter import SavedAdapter

PROMPT = "The quick brown fox jumps over the lazy dog, and the cat looks on from the garden wall."


@dataclass(frozen=True)
class Agreement:
    """Of the outputs for one prompt.

    largest_difference  of two logits (hidden states, where the model has none)
    largest_logit       to compare it with
    num_tokens          positions (rows, for classifiers) that were compared
    num_agreeing        of them, with the same largest logit
    """

    largest_difference: float
    largest_logit: float
    num_tokens: int
    num_agreeing: int

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest_difference:.3g} (largest logit {self.largest_logit:.3g}), "
            f"{self.num_agreeing} of {self.num_tokens} tokens agree"
        )


def verify(
    base: Path, adapters: Sequence[SavedAdapter], merged: Path, cls: type[PreTrainedModel], prompt: str = PROMPT
) -> Agreement:
    """Run a prompt through the base with its adapters, then through the merged model: one of them in memory at a time.

    Both compute in float32, so that what differs is what was rounded when the merged weights were stored.
    """
    inputs = _inputs(merged, prompt)
    expected = _outputs(_with_adapters(base, adapters, AutoConfig.from_pretrained(merged), cls), inputs)
    gc.collect()
    got = _outputs(cls.from_pretrained(merged, dtype=torch.float32), inputs)
    return Agreement(
        (got - expected).abs().max().item(),
        expected.abs().max().item(),
        expected[..., 0].numel(),
        int((got.argmax(-1) == expected.argmax(-1)).sum()),
    )


def _with_adapters(base: Path, adapters: Sequence[SavedAdapter], merged: Any, cls: type[PreTrainedModel]) -> Any:
    config = AutoConfig.from_pretrained(base)
    if config.num_labels != merged.num_labels:
        config.num_labels = merged.num_labels
    model: Any = cls.from_pretrained(base, config=config, dtype=torch.float32)
    vocab_size = merged.get_text_config().vocab_size
    if vocab_size != config.get_text_config().vocab_size:
        model.resize_token_embeddings(vocab_size)
    names = [f"adapter{index}" for index in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        if isinstance(model, PeftModel):
            model.load_adapter(str(adapter.folder), name)
        else:
            model = PeftModel.from_pretrained(model, str(adapter.folder), name)
    if len(names) > 1:
        cast(Any, model.base_model).set_adapter(names)
    return model


def _inputs(folder: Path, prompt: str) -> dict[str, Tensor]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"{folder} is written, and not verified: it has no tokenizer for the prompt ({error})"
        ) from error
    inputs: Any = cast(Any, tokenizer)(prompt, return_tensors="pt")
    return {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}


@torch.no_grad()
def _outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    model.eval()
    if model.config.is_encoder_decoder:
        inputs = {**inputs, "decoder_input_ids": inputs["input_ids"]}
    outputs = model(**inputs)
    found = outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state
    return found.float()
