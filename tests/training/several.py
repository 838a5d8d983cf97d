"""`dlor train` in two processes of the CPU, as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml
from safetensors.torch import load_file
from samples import TOKENIZER, write_rows

PROJECT = Path(__file__).parents[2]
STEPS, SAVE_STEPS, BATCH = 20, 5, 8
WORDS = "now is the winter of our discontent made glorious summer by this sun of york".split()  # noqa: SIM905
# a process that is left alone must end; a loaded machine is slow
PATIENCE = 240


def write_sft_recipe(folder: Path) -> Path:
    """48 rows of unequal length: six batches an epoch, so that the checkpoints lie within epochs."""
    rows = [{"text": " ".join(WORDS[index % 7 : index % 7 + 3 + index % 11])} for index in range(48)]
    write_rows(folder / "rows.jsonl", rows)
    recipe = {
        "model": {"path": str(TOKENIZER), "dtype": "float32"},
        "task": {"type": "sft", "prompts": 2, "new_tokens": 4},
        "data": {"files": {"train": "rows.jsonl", "test": "rows.jsonl"}},
        "adapter": {"peft_type": "DLOR", "r": 2, "target_modules": "all-linear"},
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 1e-2,
            "bf16": False,
            "activation_checkpointing": False,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": SAVE_STEPS,
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
    """The losses of every step, and the adapters."""
    got, want = losses(out), losses(reference)
    assert len(got) == len(want) == STEPS
    assert want[-1] < 0.8 * want[0]
    for step, (one, other) in enumerate(zip(got, want, strict=True), 1):
        assert abs(one - other) <= 1e-4 * other, f"step {step}: {one}, not {other}"
    got, want = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (out, reference))
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert (got[key] - tensor).norm() <= 1e-3 * tensor.norm(), key
