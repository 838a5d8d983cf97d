import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from samples import TOPICS, write_rows
from sklearn.linear_model import LogisticRegression

from dlor_peft.cli import main
from dlor_peft.training.configs import build_adapter_config, build_training_arguments
from dlor_peft.training.recipe import load_recipe
from dlor_peft.training.states import StateMismatchError, check_states
from dlor_peft.training.tasks.batches import run_batches
from dlor_peft.training.tasks.classification import ClassificationTask


def metrics_of(tmp_path):
    return json.loads((tmp_path / "out" / "metrics.json").read_text())


def test_a_run_learns_and_leaves_what_it_promises(write_recipe, tmp_path):
    overrides = ["training.max_steps=30", "training.eval_strategy=steps", "training.eval_steps=15"]
    assert main(["train", str(write_recipe()), *overrides]) == 0
    metrics = metrics_of(tmp_path)
    assert metrics["after"]["accuracy"] > metrics["before"]["accuracy"] + 0.4
    assert metrics["steps"] == 30
    assert metrics["baseline"] is None
    for state in ("reloaded", "merged"):
        assert metrics["states"][state]["num_outputs"] == 48
        assert metrics["states"][state]["num_different"] == 0
        assert metrics["states"][state]["max_abs_difference"] < 1e-3
    assert metrics["parameters"]["kinds"]["encoder.encoder.layer.*.attention.self.query"]["modules"] == 2
    assert metrics["parameters"]["kinds"]["classifier"]["parameters"] == 4 * 32 + 4
    assert metrics["recipe"]["adapter"]["peft_type"] == "DLOR"
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"adapter", "recipe.yaml"}
    assert not [path for path in (tmp_path / "out").iterdir() if "partial" in path.name]
    adapter = {path.name for path in (tmp_path / "out" / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= adapter


def test_a_finished_run_is_not_repeated(write_recipe, tmp_path, capsys):
    path = str(write_recipe())
    main(["train", path])
    written = (tmp_path / "out" / "metrics.json").stat().st_mtime_ns
    capsys.readouterr()

    assert main(["train", path]) == 0
    output = capsys.readouterr().out
    assert "accuracy" in output
    assert "--overwrite runs it again" in output
    assert (tmp_path / "out" / "metrics.json").stat().st_mtime_ns == written

    assert main(["train", path, "adapter.r=1"]) == 2
    assert "finished run of another recipe (different: adapter.r)" in capsys.readouterr().err

    assert main(["train", path, "adapter.r=1", "--overwrite"]) == 0
    assert metrics_of(tmp_path)["recipe"]["adapter"]["r"] == 1

    (tmp_path / "out" / "metrics.json").write_text("{")
    assert main(["train", path]) == 2
    assert "metrics.json is damaged" in capsys.readouterr().err


def test_one_flag_trains_lora(write_recipe, tmp_path):
    assert main(["train", str(write_recipe()), "adapter.peft_type=LORA"]) == 0
    saved = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert any("lora_A" in key for key in saved)
    assert set(metrics_of(tmp_path)["states"]) == {"reloaded", "merged"}


def test_without_pooling_transformers_own_classifier_is_trained(write_recipe, tmp_path):
    assert main(["train", str(write_recipe()), "model.pooling="]) == 0
    assert "classifier" in metrics_of(tmp_path)["parameters"]["kinds"]


def test_the_linear_probe_is_reported(write_recipe, tmp_path, capsys):
    assert main(["train", str(write_recipe()), "task.baseline=linear-probe"]) == 0
    baseline = metrics_of(tmp_path)["baseline"]
    assert baseline["name"] == "linear-probe"
    assert baseline["accuracy"] > 0.5
    assert "linear-probe" in capsys.readouterr().out


@pytest.mark.parametrize("num_labels", [2, 4])
def test_the_head_starts_from_the_probe(write_recipe, tmp_path, num_labels):
    path = write_recipe()
    for name in ("train", "dev", "test"):
        file = tmp_path / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        write_rows(file, [row for row in rows if row["label"] in list(TOPICS)[:num_labels]])
    recipe, _ = load_recipe(str(path), ["task.head_from_probe=10.0"])
    task = ClassificationTask(recipe)
    model = task.load_model()
    embeddings = run_batches(model.embed, task.test, task.tokenizer, model.device)
    assert task.prepare(model) is None
    train = run_batches(
        model.embed, task.rows["train"].remove_columns("labels").to_list(), task.tokenizer, model.device
    )
    probe = LogisticRegression(C=10.0, max_iter=1_000).fit(train.numpy(), task.rows["train"]["labels"][:])
    expected = torch.from_numpy(probe.predict_log_proba(embeddings.numpy())).float()
    torch.testing.assert_close(task.run(model).log_softmax(-1), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tensor", ["dlor_diag", "dlor_U", "classifier"])
def test_a_tampered_adapter_fails_loudly(write_recipe, tmp_path, tensor):
    path = str(write_recipe())
    assert main(["train", path, "training.max_steps=30"]) == 0
    task = ClassificationTask(load_recipe(path)[0])
    adapter = tmp_path / "out" / "adapter"
    trained = task.run(PeftModel.from_pretrained(task.load_model(), str(adapter)))
    assert check_states(task, trained, adapter, torch.device("cpu"))["merged"]["num_different"] == 0

    file = adapter / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    saved = {
        key: value + 0.05 * torch.randn(value.shape, generator=generator) if tensor in key else value
        for key, value in load_file(file).items()
    }
    save_file(saved, file, metadata={"format": "pt"})
    with pytest.raises(StateMismatchError, match=r"the reloaded adapter .* is not the trained one: \d+ of 48"):
        check_states(task, trained, adapter, torch.device("cpu"))


def test_the_head_learns_at_its_own_rate(write_recipe):
    recipe, _ = load_recipe(str(write_recipe()), ["training.learning_rate=1e-3", "optimizer.head_learning_rate=0.5"])
    task = ClassificationTask(recipe)
    model = get_peft_model(task.load_model(), build_adapter_config(recipe))
    optimizer = task.build_trainer(model, build_training_arguments(recipe)).create_optimizer()
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(rates) == len(trainable)
    for name, parameter in trainable.items():
        role = "classifier" if "classifier" in name else name.split(".dlor_")[1][0]
        # U learns at 4 times the rate
        assert rates[id(parameter)] == {"classifier": 0.5, "U": 4e-3}.get(role, 1e-3)
