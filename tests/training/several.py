"""`dlor train` in two processes of the CPU, as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml
from safetensors.torch import load_file
from samples import TOKENIZER, write_rows
from stand_ins import build_model

PROJECT = Path(__file__).parents[2]
STEPS, SAVE_STEPS, BATCH = 20, 5, 8
WORDS = "now is the winter of our discontent made glorious summer by this sun of york".split()  # noqa: SIM905
# a process that is left alone must end; a loaded machine is slow
PATIENCE = 240


MINILM, T5, LLAMA = "sentence-transformers/all-MiniLM-L6-v2", "google/flan-t5-base", "meta-llama/Llama-3.2-1B"
OF_TRL = {"bf16": False, "activation_checkpointing": False}


def _text(index: int) -> str:
    return " ".join(WORDS[index % 7 : index % 7 + 3 + index % 11])


# of each task: its section, the row of a number, the model's architecture, and other training arguments
TASKS: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]], str | None, dict[str, Any]]] = {
    "sft": (
        {"type": "sft", "prompts": 2, "new_tokens": 4},
        lambda index: {"text": _text(index)},
        None,
        OF_TRL,
    ),
    "dpo": (
        {"type": "dpo", "prompts": 1, "new_tokens": 2},
        lambda index: {
            "prompt": _text(index),
            "chosen": " yes" * (1 + index % 3),
            "rejected": " no" * 3,
        },
        LLAMA,
        {**OF_TRL, "beta": 0.5},
    ),
    "classification": (
        {"type": "text-classification"},
        lambda index: {"text": _text(index), "label": WORDS[index % 7]},
        MINILM,
        {},
    ),
    "seq2seq": (
        {"type": "seq2seq", "generations": 1, "max_output_tokens": 2},
        lambda index: {"input": _text(index), "output": f"{WORDS[index % 3]} " * (1 + index % 4)},
        T5,
        {},
    ),
    "embedding of pairs": (
        {"type": "embedding"},
        lambda index: {"anchor": f"{index} {_text(index)}", "positive": _text(index)},
        MINILM,
        {},
    ),
    "embedding of scores": (
        {"type": "embedding"},
        lambda index: {"text1": _text(index), "text2": _text(index + 3), "score": (index % 5) / 4},
        MINILM,
        {},
    ),
}


def write_task_recipe(folder: Path, task: str) -> Path:
    """48 rows of unequal length: six batches an epoch, so that the checkpoints lie within epochs."""
    section, row, hub_id, training = TASKS[task]
    write_rows(folder / "rows.jsonl", [row(index) for index in range(48)])
    model = {"path": str(TOKENIZER if hub_id is None else build_model(hub_id, folder / "model")), "dtype": "float32"}
    # processes would drop other activations than one does
    model["config"] = {
        MINILM: {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        T5: {"dropout_rate": 0.0},
    }.get(hub_id, {})
    adapter = {"peft_type": "DLOR", "r": 2, "target_modules": "all-linear"}
    if task == "classification":
        model["pooling"] = "mean"
    elif hub_id == MINILM:
        # not part of an embedding
        adapter["exclude_modules"] = ["pooler.dense"]
    recipe = {
        "model": model,
        "task": section,
        "data": {
            "files": {"train": "rows.jsonl", "test": "rows.jsonl"},
            "columns": {name: name for name in row(0)},
        },
        "adapter": adapter,
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": SAVE_STEPS,
            **training,
        },
        "output_dir": str(folder / "out"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


class Launched:
    """One command in the background, in a process group of its own; its output is in `text` when it has ended."""

    def __init__(self, log: Path, *command: object) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")]),
        }
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @classmethod
    def dlor(cls, log: Path, *arguments: object) -> Launched:
        return cls(log, "-m", "dlor_peft.cli", "train", *arguments)

    def wait_for(self, path: Path) -> None:
        end = time.monotonic() + PATIENCE
        while not path.exists():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < end, self.text
            time.sleep(0.01)

    def rank(self, number: int) -> psutil.Process:
        (found,) = [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if child.environ().get("RANK") == str(number)
        ]
        return found

    def end(self) -> int:
        """The exit code. Whatever is still running then is ended."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        try:
            return self.process.wait(PATIENCE)
        finally:
            for process in processes:
                if process.is_running():
                    process.send_signal(signal.SIGKILL)
            self.process.kill()

    @property
    def text(self) -> str:
        return self.log.read_text()


def losses(out: Path) -> list[float]:
    """Of every step, as the checkpoint of the last one tells."""
    state = json.loads((out / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def assert_same_training(out: Path, reference: Path) -> None:
    """The losses of every step, the adapters, and the metrics."""
    got, want = losses(out), losses(reference)
    assert len(got) == len(want) == STEPS
    for step, (one, other) in enumerate(zip(got, want, strict=True), 1):
        assert abs(one - other) <= 1e-4 * other, f"step {step}: {one}, not {other}"
    got, want = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (out, reference))
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert (got[key] - tensor).norm() <= 1e-3 * tensor.norm(), key
    one, other = (json.loads((folder / "metrics.json").read_text()) for folder in (out, reference))
    assert other["after"]["loss"] < other["before"]["loss"]
    for state in ("before", "after"):
        for metric, value in one[state].items():
            assert abs(value - other[state][metric]) <= 1e-4 * max(1, abs(value)), f"{state}, {metric}"
