"""The linear probe: what the frozen encoder's embeddings give without any adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

REGULARISATIONS = (3.0, 10.0, 20.0, 30.0, 50.0, 100.0)

Splits = dict[str, Tensor]
"""Embeddings (rows, hidden), or labels (rows,), by split."""


def linear_probe(embeddings: Splits, labels: Splits) -> dict[str, str | float]:
    """Test accuracy of a logistic regression on the embeddings, its C chosen on the dev split."""
    probes = [_fit(embeddings, labels, C) for C in REGULARISATIONS]
    best = max(probes, key=lambda probe: _accuracy(probe, embeddings, labels, "dev"))
    return {"name": "linear-probe", "C": best.C, "accuracy": _accuracy(best, embeddings, labels, "test")}


def probe_head(embeddings: Splits, labels: Splits, C: float, num_labels: int) -> tuple[Tensor, Tensor]:
    """Weight (num_labels, hidden) and bias (num_labels,) of a logistic regression on the train split.

    Labels that no row has get zeros.
    """
    probe = _fit(embeddings, labels, C)
    coefficients, intercepts = torch.from_numpy(probe.coef_), torch.from_numpy(probe.intercept_)
    classes = torch.from_numpy(probe.classes_)
    if len(classes) == 2:
        # scikit-learn then has one row, the difference of the two
        classes = classes[1:]
    weight = torch.zeros(num_labels, coefficients.shape[1]).index_copy_(0, classes, coefficients.float())
    return weight, torch.zeros(num_labels).index_copy_(0, classes, intercepts.float())


def _fit(embeddings: Splits, labels: Splits, C: float) -> LogisticRegression:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            "task: a linear probe needs scikit-learn: install dlor-peft with its extra 'quickstart'"
        ) from error

    return LogisticRegression(C=C, max_iter=1_000).fit(embeddings["train"].numpy(), labels["train"].numpy())


def _accuracy(probe: LogisticRegression, embeddings: Splits, labels: Splits, split: str) -> float:
    return float(probe.score(embeddings[split].numpy(), labels[split].numpy()))
