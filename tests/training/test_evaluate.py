import json

import pytest
from samples import TOKENIZER, WITHOUT_GPU, write_rows
from stand_ins import ROWS, build_model

from dlor_peft.cli import main

QUICK = {
    "max_steps": 4,
    "learning_rate": 1e-2,
    **WITHOUT_GPU,
    "save_strategy": "no",
}
TEXTS = ["First Citizen:\nWe are accounted poor citizens.", "Second Citizen:\nOne word, good citizens."]


def evaluate(tmp_path, *arguments):
    assert main(["eval", *map(str, arguments), "--json", str(tmp_path / "eval.json")]) == 0
    return json.loads((tmp_path / "eval.json").read_text())


def error_of(capsys, *arguments):
    capsys.readouterr()
    assert main(["eval", *map(str, arguments)]) == 2
    return capsys.readouterr().err


@pytest.fixture
def classifier(write_recipe, tmp_path):
    """A recipe that has been trained, and the metrics of its run."""
    path = write_recipe()
    assert main(["train", str(path), "training.max_steps=10", "task.baseline=linear-probe"]) == 0
    return path, json.loads((tmp_path / "out" / "metrics.json").read_text())


@pytest.fixture
def language_model(write_recipe, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS] * 4)
    path = write_recipe(
        model={"path": str(TOKENIZER), "dtype": "float32"},
        task={"type": "sft", "prompts": 2, "new_tokens": 4},
        data={"files": {"train": "rows.jsonl", "test": "rows.jsonl"}},
        training=QUICK,
    )
    assert main(["train", str(path)]) == 0
    return path


def test_base_and_adapter_measure_as_the_run_did(classifier, tmp_path, capsys):
    path, run = classifier
    results = evaluate(tmp_path, path, "task.baseline=linear-probe")
    assert results["test"]["base"] == pytest.approx(run["before"], rel=1e-4)
    assert results["test"]["adapter"] == pytest.approx(run["after"], rel=1e-4)
    assert results["test"]["merged"] == pytest.approx(run["after"], rel=1e-3)
    assert results["baseline"] == run["baseline"]
    table = capsys.readouterr().out
    assert ["test", "split", "base", "adapter", "merged", "baseline"] in [line.split() for line in table.splitlines()]
    # it leaves the run as it was
    assert main(["train", str(path), "training.max_steps=10", "task.baseline=linear-probe"]) == 0


def test_an_adapter_finds_its_recipe_and_a_recipe_takes_another_adapter(classifier, tmp_path, capsys):
    path, _ = classifier
    adapter = tmp_path / "out" / "adapter"
    expected = evaluate(tmp_path, path)["test"]
    assert evaluate(tmp_path, adapter)["test"] == expected
    assert evaluate(tmp_path, adapter, "data.max_rows=8")["test"] != expected
    (tmp_path / "elsewhere").mkdir()
    moved = adapter.rename(tmp_path / "elsewhere" / "adapter")
    assert "no adapter in" in error_of(capsys, path)
    assert f"dlor eval RECIPE --adapter {moved}" in error_of(capsys, moved)
    assert evaluate(tmp_path, path, "--adapter", moved)["test"] == expected


def test_an_adapter_of_another_recipe_is_refused(classifier, tmp_path, capsys):
    path, _ = classifier
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "fewer.jsonl", [row for row in rows if row["label"] != "pin"])
    fewer = [f"data.files.{split}={tmp_path}/fewer.jsonl" for split in ("train", "dev", "test")]
    assert "other labels" in error_of(capsys, path, *fewer)
    assert "but model.path is" in error_of(capsys, path, f"model.path={TOKENIZER}")
    sft = ["task=sft", "model.pooling=", "adapter.target_modules=all-linear"]
    assert "a recipe for text-classification" in error_of(capsys, path, *sft)
    assert "--lm-eval measures causal" in error_of(capsys, path, "--lm-eval", "arc_easy")


# PEFT says so at every step of a generation
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_methods_without_a_merged_model_have_two_columns(language_model, tmp_path):
    overrides = ["adapter={peft_type: PROMPT_TUNING, num_virtual_tokens: 2}", f"output_dir={tmp_path}/prompt"]
    assert main(["train", str(language_model), *overrides]) == 0
    results = evaluate(tmp_path, language_model, *overrides)
    assert set(results["test"]) == {"base", "adapter"}
    assert results["test"]["base"]["loss"] == evaluate(tmp_path, language_model)["test"]["base"]["loss"]


def test_the_reference_of_a_preference_is_the_base_in_every_state(write_recipe, tmp_path):
    model = build_model("Qwen/Qwen3-0.6B", tmp_path / "models" / "qwen3")
    write_rows(tmp_path / "rows.jsonl", [ROWS["trl-lib/ultrafeedback_binarized"](index) for index in range(6)])
    path = write_recipe(
        model={"path": str(model), "dtype": "float32"},
        task={"type": "dpo", "prompts": 1, "new_tokens": 4},
        data={
            "files": {"train": "rows.jsonl", "test": "rows.jsonl"},
            "columns": {"chosen": "chosen", "rejected": "rejected"},
        },
        training=QUICK,
    )
    assert main(["train", str(path)]) == 0
    run = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert run["before"]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert run["after"]["loss"] < run["before"]["loss"]
    assert {file.name for file in (tmp_path / "out" / "adapter").iterdir() if file.is_dir()} == set()
    results = evaluate(tmp_path, path)["test"]
    assert results["base"]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert results["adapter"] == pytest.approx(run["after"], rel=1e-3)
    assert results["merged"] == pytest.approx(run["after"], rel=1e-2)


def test_lm_eval_measures_each_state(language_model, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval, of the extra 'eval', is not installed")
    write_rows(tmp_path / "task.jsonl", [{"text": text} for text in TEXTS])
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "citizens.yaml").write_text(
        f"""\
task: citizens
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/task.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
"""
    )
    options = ["--lm-eval", "citizens", "--lm-eval-include", tasks]
    results = evaluate(tmp_path, language_model, *options)["lm_eval"]
    bits = {state: metrics["citizens bits_per_byte"] for state, metrics in results.items()}
    assert bits["adapter"] < bits["base"]
    assert bits["merged"] == pytest.approx(bits["adapter"], rel=1e-3)
    assert "citizens bits_per_byte" in capsys.readouterr().out
    assert "Did you mean 'citizens'?" in error_of(capsys, language_model, "--lm-eval", "citizen", *options[2:])
