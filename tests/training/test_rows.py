"""Rows that cannot be trained on are named by file and number."""

import os
import re

import pytest
import samples
from samples import TOKENIZER, TOPICS, write_rows
from several import write_task_recipe

from dlor_peft.cli import main

GOOD = [{"text": text, "label": label} for label, text in TOPICS.items()]
SFT = {"model": {"path": str(TOKENIZER), "dtype": "float32"}, "task": {"type": "sft", "prompts": 1, "new_tokens": 2}}


def error_of(capsys, *arguments):
    error = samples.error_of(capsys, *arguments).strip()
    assert error.count("dlor: error:") == 1
    return error


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None, "label": "pin"}, r"data\.files\.train: .*train\.jsonl: row 5 has no text"),
        ({"text": "hello", "label": None}, r"data\.files\.train: .*train\.jsonl: row 5 has no label"),
        ({"text": 7, "label": "pin"}, r"data\.files\.train: .*train\.jsonl: text must be text, but row 5 has 7\."),
        ({"label": "pin"}, r"data\.files\.train: .*train\.jsonl.*row (5 )?has no text"),
    ],
)
def test_a_row_without_a_value(write_recipe, tmp_path, capsys, row, message):
    path = write_recipe()
    write_rows(tmp_path / "train.jsonl", [*GOOD, row])
    assert re.search(message, error_of(capsys, path))
    assert not (tmp_path / "out").exists()


def test_numbers_are_no_text(write_recipe, tmp_path, capsys):
    path = write_recipe()
    write_rows(tmp_path / "dev.jsonl", [{"text": 7, "label": "pin"}])
    assert "dev.jsonl: text must be text, but row 1 has 7." in error_of(capsys, path)


def test_a_label_that_training_lacks(write_recipe, tmp_path, capsys):
    path = write_recipe()
    write_rows(tmp_path / "test.jsonl", [*GOOD, {"text": "hello", "label": "greet"}])
    assert "test.jsonl: labels that the train split lacks: greet; the first in row 5" in error_of(capsys, path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the administrator may read everything")
def test_a_file_that_may_not_be_read(write_recipe, tmp_path, capsys):
    path = write_recipe()
    (tmp_path / "train.jsonl").chmod(0)
    assert "train.jsonl may not be read" in error_of(capsys, path)


def test_rows_longer_than_the_model_reads(write_recipe, tmp_path, capsys):
    path = write_recipe(
        **SFT, data={"files": {"train": "rows.jsonl", "test": "test.jsonl"}}, training={"use_cpu": True}
    )
    write_rows(tmp_path / "rows.jsonl", [{"text": "To be"}, {"text": "To be, or not to be. " * 100}])
    error = error_of(capsys, path, "training.bf16=false")
    assert re.search(r"rows\.jsonl: 1 of 2 rows are longer than the 512 positions .* row 2 with \d+ tokens", error)
    assert "training.max_length=512" in error
    assert not (tmp_path / "out").exists()


def test_rows_that_are_cut_are_counted(write_recipe, tmp_path):
    training = {"use_cpu": True, "bf16": False, "max_length": 8, "max_steps": 1, "dataloader_pin_memory": False}
    path = write_recipe(**SFT, data={"files": {"train": "rows.jsonl", "test": "test.jsonl"}}, training=training)
    write_rows(tmp_path / "rows.jsonl", [{"text": "To be"}, {"text": "To be, or not to be. " * 9}])
    with pytest.warns(UserWarning, match=r"rows\.jsonl: 1 of 2 rows fill training\.max_length \(8 tokens\), .* row 2"):
        assert main(["train", str(path)]) == 0


@pytest.mark.filterwarnings("ignore:.*fill training.max_length:UserWarning")
def test_what_was_refused_can_be_run_when_it_is_mended(write_recipe, tmp_path):
    """The Trainer makes its folder before the rows are measured."""
    path = write_recipe(
        **SFT, data={"files": {"train": "rows.jsonl", "test": "test.jsonl"}}, training={"use_cpu": True}
    )
    write_rows(tmp_path / "rows.jsonl", [{"text": "To be, or not to be. " * 100}])
    words = ["training.bf16=false", "training.dataloader_pin_memory=false", "training.max_steps=1"]
    assert main(["train", str(path), *words]) == 2
    assert main(["train", str(path), *words, "training.max_length=16"]) == 0


def test_texts_that_an_embedding_model_cuts_are_counted(tmp_path, capsys):
    path = write_task_recipe(tmp_path, "embedding of pairs")
    rows = [{"anchor": "To be", "positive": "or not"}, {"anchor": "To be", "positive": "or not to be " * 500}]
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.warns(
        UserWarning, match=r"rows\.jsonl: 1 of 2 rows fill the model's max_seq_length \(512 tokens\), .* row 2"
    ):
        assert main(["train", str(path), "--dry-run"]) == 0
