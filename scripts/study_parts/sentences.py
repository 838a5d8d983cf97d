"""Sentences on an encoder: their classes, and how alike two are. All rows are tokenised once, in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlor_peft.training.models import load_classifier, load_tokenizer, resolve_path
from dlor_peft.training.schema import ModelSection
from dlor_peft.training.tasks.probe import linear_probe

from .sources import Sources
from .task import Task, by_length, padded

RIDGES = tuple(10 ** (exponent / 2) for exponent in range(-4, 3))
"""Of the squared distance of w to 1, beside a sum of squared errors over pairs whose scores are 0 to 1."""


class Sentences(Task):
    """On a sentence encoder without dropout."""

    def __init__(self, sources: Sources, steps: int) -> None:
        super().__init__(sources, steps)
        self.encoder = ModelSection(
            path=sources.encoder,
            pooling="mean",
            dtype="float32",
            config={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        )

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.encoder)

    @abstractmethod
    def probe(self, seed: int) -> dict[str, float]:
        """The headline on test of a linear model on the frozen embeddings, its regularisation chosen on dev."""

    def _padded(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        return padded(ids, self.tokenizer.pad_token_id)

    def _in_order(self, rows: list[Any], of_batch: Callable[[list[Any]], Tensor]) -> Tensor:
        """What batches of similar length give, a row of it for each of the rows."""
        batches = by_length(rows, self.length)
        found = torch.cat([of_batch([rows[index] for index in batch]) for batch in batches])
        return found[torch.tensor(list(chain.from_iterable(batches))).argsort()]


class Classification(Sentences):
    """Mean of the tokens, unit length, logits x 20, a head drawn by the seed."""

    headline = "accuracy"
    head = "classifier"

    def __init__(self, sources: Sources, steps: int, data: str, per_class: int | None) -> None:
        super().__init__(sources, steps)
        self.data, self.per_class = data, per_class

    @cached_property
    def splits(self) -> dict[str, list[tuple[list[int], int]]]:
        found = {}
        for split in ("train", "dev", "test"):
            raw = self.sources.rows(self.data, split)
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
        return load_classifier(self.encoder, labels, self.tokenizer)

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

    @torch.no_grad()
    def probe(self, seed: int) -> dict[str, float]:
        """A logistic regression."""
        model: Any = self.build(seed).eval()
        embeddings, labels = {}, {}
        for split in ("train", "dev", "test"):
            rows = self.rows(split, seed)
            embeddings[split] = self._in_order(rows, lambda some: model.embed(*self._padded([ids for ids, _ in some])))
            labels[split] = torch.tensor([label for _, label in rows])
        return {"accuracy": float(linear_probe(embeddings, labels)["accuracy"])}

    def _logits(self, model: nn.Module, rows: list[Any]) -> Tensor:
        device = next(model.parameters()).device
        ids, mask = self._padded([ids for ids, _ in rows])
        return model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()

    def _labels(self, model: nn.Module, rows: list[Any]) -> Tensor:
        return torch.tensor([label for _, label in rows], device=next(model.parameters()).device)


class Similarity(Sentences):
    """STS-B: the cosine of two sentences' embeddings against the score, squared error."""

    headline = "spearman"

    def __init__(self, sources: Sources, steps: int, num_rows: int | None) -> None:
        super().__init__(sources, steps)
        self.num_rows = num_rows

    @cached_property
    def splits(self) -> dict[str, list[tuple[list[int], list[int], float]]]:
        found = {}
        for split in ("train", "dev", "test"):
            raw = self.sources.rows("stsb", split)
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

        model = AutoModel.from_pretrained(resolve_path(self.encoder), dtype=torch.float32, **self.encoder.config)
        # it reads the first token only
        model.pooler = None
        return model

    def loss(self, model: nn.Module, rows: list[Any]) -> Tensor:
        one, other = self._embeddings(model, rows)
        cosine = (one * other).sum(-1)
        return F.mse_loss(cosine, torch.tensor([row[2] for row in rows], device=cosine.device))

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        rows = self.rows(split, 0)
        cosines = self._products(model, rows).sum(1)
        scores = torch.tensor([row[2] for row in rows])
        return {"spearman": _spearman(cosines, scores), "loss": F.mse_loss(cosines, scores).item()}

    def probe(self, seed: int) -> dict[str, float]:
        """w . (u * v) + b of the two embeddings u and v, by a ridge regression towards w = 1, the cosine itself."""
        from sklearn.linear_model import Ridge

        model = self.build(seed).eval()
        rows = {split: self.rows(split, seed) for split in ("train", "dev", "test")}
        products = {split: self._products(model, of_split) for split, of_split in rows.items()}
        scores = {split: torch.tensor([row[2] for row in of_split]) for split, of_split in rows.items()}
        rest = scores["train"] - products["train"].sum(1)
        fits = [Ridge(ridge).fit(products["train"].numpy(), rest.numpy()) for ridge in RIDGES]

        def correlation(fit: Ridge, split: str) -> float:
            found = products[split].sum(1) + torch.from_numpy(fit.predict(products[split].numpy()))
            return _spearman(found, scores[split])

        return {"spearman": correlation(max(fits, key=lambda fit: correlation(fit, "dev")), "test")}

    @torch.no_grad()
    def _products(self, model: nn.Module, rows: list[Any]) -> Tensor:
        """u * v of each pair (pairs, hidden), whose sum is the cosine."""

        def of_batch(some: list[Any]) -> Tensor:
            one, other = self._embeddings(model, some)
            return (one * other).cpu()

        return self._in_order(rows, of_batch)

    def _embeddings(self, model: nn.Module, rows: list[Any]) -> tuple[Tensor, Tensor]:
        ids, mask = self._padded([row[side] for side in (0, 1) for row in rows])
        device = next(model.parameters()).device
        mask = mask.to(device)
        hidden = model(input_ids=ids.to(device), attention_mask=mask).last_hidden_state.float()
        one, other = F.normalize((hidden * mask.unsqueeze(-1)).sum(1), dim=-1).chunk(2)
        return one, other


def _spearman(found: Tensor, scores: Tensor) -> float:
    from scipy.stats import spearmanr

    correlation: Any = spearmanr(found.numpy(), scores.numpy())
    return float(correlation.statistic)
