import json

from samples import write_rows
from stand_ins import build_model

from dlor_peft.cli import main


def test_an_echo_is_learned_and_counted(write_recipe, tmp_path):
    model = build_model("google/flan-t5-base", tmp_path / "models" / "t5")
    write_rows(tmp_path / "rows.jsonl", [{"input": f"say {word}", "output": "yes"} for word in ("a", "b", "c", "d")])
    path = write_recipe(
        model={"path": str(model), "dtype": "float32"},
        task={"type": "seq2seq", "generations": 3, "max_output_tokens": 6},
        data={"files": {"train": "rows.jsonl", "dev": "rows.jsonl", "test": "rows.jsonl"}},
        adapter={"peft_type": "DLOR", "r": 4, "target_modules": "all-linear"},
    )
    assert main(["train", str(path), "training.max_steps=40", "training.learning_rate=3e-2"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["before"]["exact_match"] == 0
    assert metrics["after"]["exact_match"] == 1
    assert metrics["after"]["loss"] < 0.5 * metrics["before"]["loss"]
    for state in metrics["states"].values():
        assert state["num_outputs"] == 3
        assert state["num_different"] == 0
