"""Texts on small language models. All rows are tokenised once, in memory."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .sources import Sources
from .task import Task, by_length, padded

MEASURED = 30_000
"""Characters of a text that are enough to measure on."""


class LanguageModel(Task):
    """One of the small models, by the name of its folder."""

    headline = "bits_per_byte"

    def __init__(self, sources: Sources, steps: int, model: str, data: str) -> None:
        super().__init__(sources, steps)
        self.folder, self.data = sources.model(model), data

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder)

    def build(self, seed: int) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)


class Text(LanguageModel):
    """A plain text on a small language model: bits a byte, on windows that do not overlap."""

    batch_size = 8
    window = 256

    def __init__(
        self,
        sources: Sources,
        steps: int,
        model: str,
        data: str,
        base: tuple[str, str] = ("tinystories_sample", "tinystories"),
    ) -> None:
        super().__init__(sources, steps, model, data)
        self.base = base
        """What the model was trained on before, data and split."""

    @cached_property
    def splits(self) -> dict[str, tuple[list[list[int]], int]]:
        found = {"train": self._windows(self.sources.text(self.data, "train"))}
        for split, (data, name) in {
            "dev": (self.data, "dev"),
            "test": (self.data, "test"),
            "base": self.base,
        }.items():
            found[split] = self._windows(self.sources.text(data, name)[:MEASURED])
        return found

    def _windows(self, text: str) -> tuple[list[list[int]], int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        windows = [ids[start : start + self.window] for start in range(0, len(ids), self.window)]
        return [window for window in windows if len(window) > 1], len(text.encode())

    def length(self, row: Any) -> int:
        return len(row)

    def rows(self, split: str, seed: int) -> list[Any]:
        windows, _ = self.splits[split]
        return [window for window in windows if len(window) == self.window] if split == "train" else windows

    def loss(self, model: nn.Module, rows: list[Any]) -> Tensor:
        ids = torch.tensor(rows, device=next(model.parameters()).device)
        return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        return {"bits_per_byte": self._bits(model, split)}

    def forgotten(self, model: nn.Module) -> float | None:
        return self._bits(model, "base")

    @torch.no_grad()
    def _bits(self, model: nn.Module, split: str) -> float:
        windows, num_bytes = self.splits[split]
        nats = 0.0
        full = [window for window in windows if len(window) == self.window]
        for rows in [full[start : start + 32] for start in range(0, len(full), 32)] + [
            [window] for window in windows if len(window) < self.window
        ]:
            nats += self.loss(model, rows).item() * len(rows) * (len(rows[0]) - 1)
        return nats / math.log(2) / num_bytes


class Completion(LanguageModel):
    """A prompt and what follows it on a small language model: bits a byte of what follows, or exact match."""

    num_test = 500

    def shorten(self, output: str) -> str:
        return output

    @cached_property
    def splits(self) -> dict[str, list[tuple[list[int], list[int], int]]]:
        found = {}
        for split in ("train", "dev", "test"):
            raw = self.sources.rows(self.data, split)
            if split != "train":
                # files are sorted by their input
                chosen = torch.randperm(len(raw), generator=torch.Generator().manual_seed(0))[: self.num_test]
                raw = [raw[index] for index in chosen.tolist()]
            outputs = [self.shorten(row["output"]) for row in raw]
            one = self.tokenizer([row["input"] + "\n" for row in raw], add_special_tokens=False)["input_ids"]
            other = self.tokenizer(outputs, add_special_tokens=False)["input_ids"]
            end = self.tokenizer.eos_token_id
            sizes = [len(output.encode()) for output in outputs]
            found[split] = [(a, [*b, end], size) for a, b, size in zip(one, other, sizes, strict=True)]
        return found

    def length(self, row: Any) -> int:
        return len(row[0]) + len(row[1])

    def rows(self, split: str, seed: int) -> list[Any]:
        return self.splits[split]

    def loss(self, model: nn.Module, rows: list[Any]) -> Tensor:
        return self._nats(model, rows) / sum(len(output) for _, output, _ in rows)

    def _nats(self, model: nn.Module, rows: list[Any]) -> Tensor:
        ids, mask = padded([prompt + output for prompt, output, _ in rows], 0)
        device = next(model.parameters()).device
        labels = ids.masked_fill(mask == 0, -100)
        for label, (prompt, _, _) in zip(labels, rows, strict=True):
            label[: len(prompt)] = -100
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        targets = labels[:, 1:].flatten().to(device)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum")

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        rows = self.rows(split, 0)
        batches = by_length(rows, self.length)
        nats = sum(self._nats(model, [rows[index] for index in batch]).item() for batch in batches)
        return {"bits_per_byte": nats / math.log(2) / sum(size for _, _, size in rows)}


class Scan(Completion):
    """SCAN, an action a letter: the share of commands whose greedy continuation is right to the last action."""

    headline = "exact_match"
    letters: ClassVar[dict[str, str]] = {
        "I_TURN_LEFT": "l", "I_TURN_RIGHT": "r", "I_WALK": "w", "I_RUN": "u", "I_LOOK": "o", "I_JUMP": "j",
    }  # fmt: skip

    def shorten(self, output: str) -> str:
        return " ".join(self.letters[word] for word in output.split())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        rows = self.rows(split, 0)
        right = 0
        for batch in by_length(rows, self.length):
            of_batch = [rows[index] for index in batch]
            ids, mask = padded([prompt + output for prompt, output, _ in of_batch], 0)
            device = next(model.parameters()).device
            chosen = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.argmax(-1).cpu()
            # greedy decoding follows the reference for as long as it agrees, so no step has to be decoded
            for (prompt, output, _), row in zip(of_batch, chosen, strict=True):
                right += row[len(prompt) - 1 : len(prompt) + len(output) - 1].tolist() == output
        return {"exact_match": right / len(rows), **super().evaluate(model, split)}
