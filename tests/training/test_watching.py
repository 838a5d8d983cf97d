"""What is logged of the layers: where it arrives, and that it is what the saved adapter is."""

import json

import pytest
import yaml
from peft import get_peft_model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dlor_peft import DLoRConfig
from dlor_peft.cli import main
from dlor_peft.deploy.adapter import read_adapter
from dlor_peft.deploy.inspect import inspect_adapter
from dlor_peft.training.watching import WatchLayers, facts_of, read_history, summary

KEYS = {
    "dlor_alpha_drift_mean", "dlor_alpha_drift_max", "dlor_norm_mean", "dlor_norm_max", "dlor_effective_rank",
    "dlor_condition_bound", "dlor_condition_bound_layer",
}  # fmt: skip
PNG = b"\x89PNG"


def test_each_logging_step_has_the_facts_and_the_last_are_the_saved_adapter_s(write_recipe, tmp_path):
    adapter = {"peft_type": "DLOR", "r": 2, "mode": "multiplicative", "target_modules": "all-linear"}
    assert main(["train", str(write_recipe(adapter=adapter)), "training.max_steps=3"]) == 0
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    logged = [entry for entry in metrics["history"] if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3]
    assert all(entry.keys() >= KEYS for entry in logged)
    report = inspect_adapter(read_adapter(str(out / "adapter")))
    assert set(metrics["layers"]) == {layer.module for layer in report.layers}
    for layer in report.layers:
        for name, value in metrics["layers"][layer.module].items():
            assert value == pytest.approx(getattr(layer, name), rel=1e-6), (layer.module, name)
    worst = max(report.layers, key=lambda layer: layer.condition_bound)
    assert logged[-1]["dlor_condition_bound_layer"] == worst.module
    assert logged[-1]["dlor_condition_bound"] == pytest.approx(worst.condition_bound, rel=1e-6)
    assert logged[-1]["dlor_norm_max"] == pytest.approx(max(layer.frobenius_norm for layer in report.layers), rel=1e-6)
    drifts = [layer.diagonal_deviation for layer in report.layers]
    assert logged[-1]["dlor_alpha_drift_mean"] == pytest.approx(sum(drifts) / len(drifts), rel=1e-6)
    lines = read_history(out / "layers.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["layers"] == metrics["layers"]
    assert (out / "updates.png").read_bytes().startswith(PNG)
    assert (out / "curves.png").read_bytes().startswith(PNG)


def test_tensorboard_gets_them(write_recipe, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    assert main(["train", str(write_recipe()), "training.report_to=tensorboard"]) == 0
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    history = json.loads((tmp_path / "out" / "metrics.json").read_text())["history"]
    for name in KEYS - {"dlor_condition_bound", "dlor_condition_bound_layer"}:
        got = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert got == pytest.approx({entry["step"]: entry[name] for entry in history if name in entry}), name


class Reporter(TrainerCallback):
    """Reports as those of transformers do: it keeps the numbers of the logs that it is handed."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs or {}))


def test_what_reports_finds_them_whatever_its_place(write_recipe, tmp_path):
    from dlor_peft.training.callbacks import add_callbacks
    from dlor_peft.training.checkpoints import adapter_shapes
    from dlor_peft.training.configs import build_adapter_config, build_training_arguments
    from dlor_peft.training.folder import RunFolder
    from dlor_peft.training.recipe import load_recipe
    from dlor_peft.training.tasks import task_class

    recipe, _ = load_recipe(str(write_recipe()))
    task = task_class(recipe.task.type)(recipe)
    model = get_peft_model(task.load_model(), build_adapter_config(recipe))
    expected = adapter_shapes(model)
    trainer = task.build_trainer(model, build_training_arguments(recipe))
    reporter = Reporter()
    trainer.add_callback(reporter)
    add_callbacks(trainer, recipe, RunFolder(tmp_path), expected)
    trainer.train()
    assert sum("dlor_norm_max" in logs for logs in reporter.seen) == 2
    assert sum("dlor_norm_max" in entry for entry in trainer.state.log_history) == 2
    # nothing of it in what is logged of the end
    assert "dlor_norm_max" not in reporter.seen[-1]


def test_other_methods_are_told_that_nothing_is_logged(write_recipe, tmp_path, capsys):
    adapter = {"peft_type": "LORA", "target_modules": "all-linear"}
    assert main(["train", str(write_recipe(adapter=adapter))]) == 0
    assert capsys.readouterr().out.count("watch.layers: the facts logged of each layer are those of DLOR") == 1
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["layers"] is None
    assert not any(key.startswith("dlor_") for entry in metrics["history"] for key in entry)
    assert not (tmp_path / "out" / "layers.jsonl").exists()
    assert not (tmp_path / "out" / "updates.png").exists()


def test_watching_can_be_switched_off(write_recipe, tmp_path, capsys):
    assert main(["train", str(write_recipe()), "watch.layers=false"]) == 0
    assert "watch.layers" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["layers"] is None


def test_a_run_that_goes_on_keeps_what_was_before_its_checkpoint(tmp_path):
    file = tmp_path / "layers.jsonl"
    file.write_text('{"step": 1, "layers": {}}\n{"step": 2, "layers": {}}\n{"step": 3, "layers": {}}\n{"step": 4, "la')
    state = TrainerState(global_step=2, is_world_process_zero=True)
    WatchLayers(file).on_train_begin(TrainingArguments(str(tmp_path)), state, TrainerControl())
    assert [line["step"] for line in read_history(file)] == [1, 2]


def test_layers_that_share_tensors_count_once(encoder):
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(encoder, tie_word_embeddings=True)
    config = DLoRConfig(target_modules=["word_embeddings", "query"], ensure_weight_tying=True, init_weights=False)
    facts = facts_of(get_peft_model(model, config))
    assert len(facts) == 3
    assert summary(facts)["dlor_norm_max"] == max(layer.frobenius_norm for layer in facts.values())


def test_the_old_recipe_s_folder_is_found_again(write_recipe, tmp_path, capsys):
    path = write_recipe()
    assert main(["train", str(path)]) == 0
    capsys.readouterr()
    resolved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert resolved["watch"] == {"layers": True, "max_condition": 1e8}
    assert main(["train", str(path)]) == 0
    assert "finished run of this recipe" in capsys.readouterr().out
