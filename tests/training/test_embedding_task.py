import json
import shutil

import pytest
import torch
from samples import write_rows
from stand_ins import build_model

from dlor_peft.cli import main

TEXTS = ["A plane takes off.", "A man plays the flute.", "Two dogs run.", "It rains on the roof."]
ROWS = {
    "spearman_cosine": [
        {"text1": first, "text2": second, "score": float(first == second)} for first in TEXTS for second in TEXTS
    ],
    "src2trg_accuracy": [{"anchor": text, "positive": f"I saw it: {text}"} for text in TEXTS],
    "cosine_accuracy": [
        {"anchor": text, "positive": f"I saw it: {text}", "negative": other}
        for text, other in zip(TEXTS, TEXTS[1:] + TEXTS[:1], strict=True)
    ],
}


@pytest.fixture
def write(write_recipe, tmp_path):
    def of(rows, **sections):
        model = build_model("sentence-transformers/all-MiniLM-L6-v2", tmp_path / "models" / "minilm")
        write_rows(tmp_path / "rows.jsonl", rows)
        return write_recipe(
            model={"path": str(model), "dtype": "float32"},
            optimizer={"diag_lr_ratio": 2.0},
            task={"type": "embedding"},
            data={
                "files": {"train": "rows.jsonl", "dev": "rows.jsonl", "test": "rows.jsonl"},
                "columns": {role: role for role in rows[0]},
            },
            adapter={
                "peft_type": "DLOR",
                "r": 2,
                "target_modules": "all-linear",
                "exclude_modules": ["pooler.dense"],
            },
            **sections,
        )

    return of


def metrics_of(tmp_path):
    return json.loads((tmp_path / "out" / "metrics.json").read_text())


@pytest.mark.parametrize("metric", ROWS)
def test_each_shape_has_its_loss_and_metric(write, tmp_path, metric):
    path = write(ROWS[metric])
    overrides = ["training.max_steps=8", "training.eval_strategy=steps", "training.eval_steps=4"]
    assert main(["train", str(path), *overrides]) == 0
    metrics = metrics_of(tmp_path)
    assert set(metrics["after"]) == {metric, "loss"}
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    for state in metrics["states"].values():
        assert state["max_abs_difference"] < 1e-4


def test_the_card_s_lines_load_the_trained_embedding(write, tmp_path):
    assert main(["train", str(write(ROWS["spearman_cosine"])), "training.max_steps=8"]) == 0
    adapter = tmp_path / "out" / "adapter"
    _, _, code = (adapter / "README.md").read_text().partition("```python\n")
    code = code.partition("```")[0]
    base: dict = {}
    exec(code.partition("model.load_adapter")[0], base)
    trained: dict = {}
    exec(code.replace("path/of/this/adapter", str(adapter)), trained)
    before, after = (names["model"].encode(TEXTS, convert_to_tensor=True) for names in (base, trained))
    assert (before - after).abs().max() > 1e-2

    from dlor_peft.training.load import load_trained
    from dlor_peft.training.recipe import load_recipe
    from dlor_peft.training.tasks.embedding import EmbeddingTask

    task = EmbeddingTask(load_recipe(str(tmp_path / "out" / "recipe.yaml"))[0])
    reloaded = task.run(load_trained(adapter)[0])[:: len(TEXTS)][: len(TEXTS)]
    torch.testing.assert_close(reloaded, after, rtol=1e-5, atol=1e-6)


def test_a_run_resumes_and_ends_with_its_best(write, tmp_path):
    path = write(ROWS["spearman_cosine"])
    steps = ["training.max_steps=6", "training.save_strategy=steps", "training.save_steps=2"]
    best = ["training.load_best_model_at_end=true", "training.eval_strategy=steps", "training.eval_steps=2"]
    assert main(["train", str(path), *steps, *best]) == 0
    expected = metrics_of(tmp_path)["after"]
    checkpoints = tmp_path / "out" / "checkpoints"
    for step in (4, 6):
        shutil.rmtree(checkpoints / f"checkpoint-{step}")
    (tmp_path / "out" / "metrics.json").unlink()
    assert main(["train", str(path), *steps, *best, "--resume"]) == 0
    assert metrics_of(tmp_path)["after"] == pytest.approx(expected, rel=1e-5)


def test_identity_weights_are_refused(write, tmp_path, capsys):
    assert main(["train", str(write(ROWS["cosine_accuracy"])), "model.weights=identity"]) == 2
    assert "an embedding model starts from a checkpoint" in capsys.readouterr().err
