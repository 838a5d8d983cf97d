"""The linear probe: what the frozen encoder's embeddings give without any adapter."""

from __future__ import annotations

import torch

REGULARISATIONS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def linear_probe(
    embeddings: dict[str, torch.Tensor], labels: dict[str, list[int]], seed: int
) -> dict[str, str | float]:
    """Test accuracy of a logistic regression on (rows, hidden) embeddings, its C chosen on the dev split."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            "task.baseline: linear-probe needs scikit-learn: pip install dlor-peft[quickstart]"
        ) from error

    features = {name: split.numpy() for name, split in embeddings.items()}
    probes = [
        LogisticRegression(C=c, max_iter=1_000, random_state=seed).fit(features["train"], labels["train"])
        for c in REGULARISATIONS
    ]
    best = max(probes, key=lambda probe: probe.score(features["dev"], labels["dev"]))
    return {"name": "linear-probe", "C": best.C, "accuracy": float(best.score(features["test"], labels["test"]))}
