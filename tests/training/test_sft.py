import json

import pytest
from samples import TOKENIZER, WITHOUT_GPU, write_rows

from dlor_peft.cli import main

TRAINING = {
    "max_steps": 20,
    "learning_rate": 1e-2,
    **WITHOUT_GPU,
    "save_strategy": "no",
}
SHAPES = {
    "text": {"text": "First Citizen:\nWe are accounted poor citizens."},
    "prompt and completion": {"prompt": "First Citizen:", "completion": "We are accounted poor citizens."},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_falls_and_the_states_generate_the_same_tokens(write_recipe, tmp_path, shape):
    row = SHAPES[shape]
    path = write_recipe(
        model={"path": str(TOKENIZER), "dtype": "float32"},
        task={"type": "sft", "prompts": 2, "new_tokens": 12},
        data={
            "files": {"train": "rows.jsonl", "dev": "rows.jsonl", "test": "rows.jsonl"},
            "columns": {name: name for name in row},
        },
        training=TRAINING,
    )
    write_rows(tmp_path / "rows.jsonl", [row] * 16)
    assert main(["train", str(path)]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["after"]["loss"] < 0.5 * metrics["before"]["loss"]
    for state in ("reloaded", "merged"):
        assert metrics["states"][state]["num_outputs"] == 2
        assert metrics["states"][state]["num_different"] == 0
