"""The tasks of the study, by name."""

from __future__ import annotations

from functools import cache

from .pretraining import BASE
from .sentences import Classification, Similarity
from .sources import Sources
from .task import Task
from .texts import Completion, Scan, Text


@cache
def tasks(sources: Sources) -> dict[str, Task]:
    """By name, each with its rows once a process. The steps are few: they are what two cores can do."""
    found: dict[str, Task] = {}
    for data in ("banking77", "clinc150", "snips"):
        found[f"{data} 10 a class"] = Classification(sources, 200, data, 10)
        found[f"{data} 50 a class"] = Classification(sources, 300, data, 50)
        found[data] = Classification(sources, 300, data, None)
    found["stsb 500 pairs"] = Similarity(sources, 120, 500)
    found["stsb"] = Similarity(sources, 360, None)
    # not babyllama-char105, whose letters have no newline
    for model in ("stories260K", "TinyStories-656K"):
        found[f"shakespeare {model}"] = Text(sources, 152, model, "tinyshakespeare")
        found[f"shakespeare {model} 456 steps"] = Text(sources, 456, model, "tinyshakespeare")
        found[f"e2e {model}"] = Completion(sources, 300, model, "e2e_nlg")
        found[f"scan {model}"] = Scan(sources, 1500, model, "scan")
    for folder in sorted(sources.pretrained.glob("*/")) if sources.pretrained else ():
        found[f"shakespeare {folder.name}"] = Text(sources, 400, folder.name, "tinyshakespeare", (BASE, "test"))
        found[f"e2e {folder.name}"] = Completion(sources, 600, folder.name, "e2e_nlg")
        found[f"scan {folder.name}"] = Scan(sources, 1500, folder.name, "scan")
    return found
