"""Greedy generation, and whether two models generate the same up to rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .base import Comparison


@dataclasses.dataclass(frozen=True)
class Generation:
    tokens: list[int]

    leads: list[float]
    """By how much the logit of each token leads that of the next best."""

    largest: float
    """The largest absolute logit."""


def generate(
    model: Any, prompts: Sequence[list[int]], new_tokens: int, tokenizer: PreTrainedTokenizerBase
) -> list[Generation]:
    """What follows each prompt; of an encoder and decoder, what the decoder gives."""
    model.eval()
    return [_generate(model, prompt, new_tokens, tokenizer) for prompt in prompts]


def _generate(model: Any, prompt: list[int], new_tokens: int, tokenizer: PreTrainedTokenizerBase) -> Generation:
    input_ids = torch.tensor([prompt], device=model.device)
    generated = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.cat(generated.logits).float()
    tokens = generated.sequences[0, -len(logits) :]
    chosen = logits.gather(1, tokens[:, None])
    others = logits.scatter(1, tokens[:, None], -torch.inf)
    leads = (chosen[:, 0] - others.amax(1)).tolist()
    return Generation(tokens.tolist(), leads, logits[logits.isfinite()].abs().amax().item())


def compare_generations(
    trained: list[Generation], other: list[Generation], tokenizer: PreTrainedTokenizerBase
) -> Comparison:
    """A generation differs by as much as the trained model's lead where the two part."""
    pairs = enumerate(zip(trained, other, strict=True))
    different = [index for index, (before, after) in pairs if before.tokens != after.tokens]
    largest = max(generation.largest for generation in trained)
    if not different:
        return Comparison(len(trained), 0, "", max_abs_logit=largest)
    leads = {index: _lead(trained[index], other[index]) for index in different}
    worst = max(leads, key=lambda index: leads[index])
    before, after = (tokenizer.decode(outputs[worst].tokens) for outputs in (trained, other))
    return Comparison(
        len(trained),
        len(different),
        f"prompt {worst} was continued with {before!r} and is with {after!r}",
        max_abs_logit=largest,
        largest_lead=leads[worst],
    )


def _lead(trained: Generation, other: Generation) -> float:
    pairs = zip(trained.tokens, other.tokens, strict=False)
    parting = next((index for index, (before, after) in enumerate(pairs) if before != after), None)
    # one that is the other's beginning has ended, which takes a token that the other does not have
    return trained.leads[parting] if parting is not None else torch.inf
