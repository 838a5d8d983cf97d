import pytest
from samples import write_rows

from dlor_peft.training.data import draw_rows, load_splits
from dlor_peft.training.recipe import load_recipe
from dlor_peft.training.tasks import task_class
from dlor_peft.training.tasks.classification import ClassificationTask


def splits_of(path, *overrides):
    recipe, _ = load_recipe(str(path), overrides)
    return load_splits(recipe, task_class(recipe.task.type).columns)


def test_columns_are_named_by_their_role(write_recipe, tmp_path):
    path = write_recipe()
    for name in ("train", "dev", "test"):
        write_rows(tmp_path / f"{name}.jsonl", [{"utterance": "hello", "label": 7, "intent": "greet"}])
    splits = splits_of(path, "data.columns={text: utterance, label: intent}")
    assert splits["test"].to_list() == [{"text": "hello", "label": "greet"}]


def test_csv_files_are_read(write_recipe, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\nhello,greet\n")
    path = write_recipe(data={"files": {"train": "rows.csv", "test": "rows.csv"}})
    assert splits_of(path)["train"].to_list() == [{"text": "hello", "label": "greet"}]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.columns.text=txt", r"data\.columns\.text: the \w+ split has no column 'txt'\. Did you mean 'text'\?"),
        ("data.columns.prompt=text", r"text-classification reads text and label\. Given: prompt"),
        ("data.files.test=/nowhere.jsonl", r"data\.files\.test: no file /nowhere\.jsonl"),
        ("data.files.test=/rows.parquet", r"data\.files\.test: /rows\.parquet is of no known kind\. Known: \.jsonl"),
    ],
)
def test_wrong_data(write_recipe, override, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        splits_of(write_recipe(), override)


def test_sft_reads_one_of_three_shapes(write_recipe):
    path = write_recipe(task="sft", model={"path": "unused"})
    assert splits_of(path)["train"].column_names == ["text"]
    assert splits_of(path, "data.columns={prompt: text, completion: label}")["train"].column_names == [
        "prompt",
        "completion",
    ]
    with pytest.raises(ValueError, match=r"data\.columns\.completion: the \w+ split has no column 'completion'"):
        splits_of(path, "data.columns={prompt: text}")
    with pytest.raises(ValueError, match=r"sft reads text; prompt and completion; messages\. Given: prompt, messages"):
        splits_of(path, "data.columns={prompt: text, messages: text}")


def test_a_set_of_columns_that_is_named_in_full_is_meant(write_recipe):
    path = write_recipe(task="dpo", model={"path": "unused"})
    implicit = splits_of(path, "data.columns={chosen: text, rejected: label}")
    assert implicit["train"].column_names == ["chosen", "rejected"]
    with pytest.raises(ValueError, match=r"data\.columns\.prompt: the \w+ split has no column 'prompt'"):
        splits_of(path, "data.columns={chosen: text}")


def test_max_rows_draws_rows_with_the_seed(write_recipe):
    recipe, _ = load_recipe(str(write_recipe()), ["data.max_rows=10"])
    splits = load_splits(recipe, [("text", "label")])
    drawn = draw_rows(splits, recipe)["test"]["text"][:]
    assert len(drawn) == 10
    assert drawn != splits["test"]["text"][:10]
    assert drawn == draw_rows(splits, recipe)["test"]["text"][:]


def test_labels_are_those_of_all_training_rows(write_recipe, tmp_path):
    path = write_recipe()
    assert ClassificationTask(load_recipe(str(path), ["data.max_rows=1"])[0]).labels == ["card", "cash", "pin", "rate"]
    write_rows(tmp_path / "test.jsonl", [{"text": "hello", "label": "greet"}])
    with pytest.raises(ValueError, match=r"test\.jsonl: labels that the train split lacks: greet; the first in row 1"):
        ClassificationTask(load_recipe(str(path))[0])


def test_integer_labels_keep_their_order(write_recipe, tmp_path):
    path = write_recipe()
    for name in ("train", "dev", "test"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": "hello", "label": label} for label in (10, 9, 2)])
    task = ClassificationTask(load_recipe(str(path))[0])
    assert task.labels == ["2", "9", "10"]
    assert task.rows["test"]["labels"][:] == [2, 1, 0]
