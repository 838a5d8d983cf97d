"""A step of several small batches is that of one large batch."""

import json

import pytest
from samples import TOPICS, write_rows
from stand_ins import build_model

from dlor_peft.cli import main


def losses_of(tmp_path, path, *words):
    assert main(["train", str(path), "training.max_steps=3", "verify=false", "--overwrite", *words]) == 0
    history = json.loads((tmp_path / "out" / "metrics.json").read_text())["history"]
    logged = [entry for entry in history if "loss" in entry]
    return [entry["loss"] for entry in logged], [entry["grad_norm"] for entry in logged]


@pytest.mark.parametrize("task", ["pooled", "classification", "seq2seq"])
def test_accumulation_changes_neither_loss_nor_gradient(write_recipe, encoder, tmp_path, task):
    sections = {}
    if task == "classification":
        adapter = {"peft_type": "DLOR", "r": 2, "target_modules": "all-linear", "modules_to_save": ["pooler"]}
        sections = {"model": {"path": str(encoder)}, "adapter": adapter}
    if task == "seq2seq":
        model = build_model("google/flan-t5-base", tmp_path / "t5")
        rows = [{"input": text, "output": label * (index + 1)} for index, (label, text) in enumerate(TOPICS.items())]
        write_rows(tmp_path / "pairs.jsonl", rows * 6)
        sections = {
            "model": {"path": str(model), "dtype": "float32", "config": {"dropout_rate": 0.0}},
            "task": {"type": "seq2seq", "generations": 1, "max_output_tokens": 2},
            "data": {"files": {"train": "pairs.jsonl", "test": "pairs.jsonl"}},
        }
    path = write_recipe(**sections)
    whole = losses_of(tmp_path, path, "training.per_device_train_batch_size=8")
    words = ("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=4")
    parts = losses_of(tmp_path, path, *words)
    assert parts[0] == pytest.approx(whole[0], rel=1e-4)
    assert parts[1] == pytest.approx(whole[1], rel=1e-3)
