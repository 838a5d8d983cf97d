"""The tasks of the study, by name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from .sentences import Classification, Similarity
from .task import Task
from .texts import Completion, Scan, Text


@cache
def tasks(shared: Path) -> dict[str, Task]:
    """By name, each with its rows once a process. The steps are few: they are what two cores can do."""
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
