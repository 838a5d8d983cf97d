"""What a run refuses, and that a refusal costs nothing that was there before."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from samples import error_of
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from dlor_peft.cli import main


def test_a_recipe_that_cannot_be_built_leaves_the_finished_run(write_recipe, tmp_path, capsys):
    path = write_recipe()
    assert main(["train", str(path)]) == 0
    before = sorted(file.name for file in (tmp_path / "out").rglob("*"))
    assert "No modules were targeted" in error_of(capsys, path, "adapter.target_modules=[nope]", "--overwrite")
    assert sorted(file.name for file in (tmp_path / "out").rglob("*")) == before


def test_checkpoints_of_an_unfinished_run_are_not_replaced_unasked(write_recipe, tmp_path, capsys):
    path = write_recipe()
    assert main(["train", str(path), "training.save_strategy=steps", "training.save_steps=1"]) == 0
    (tmp_path / "out" / "metrics.json").unlink()
    assert "checkpoints of an unfinished run" in error_of(capsys, path)
    assert list((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))
    assert main(["train", str(path), "--overwrite"]) == 0


def test_a_diverged_run_saves_nothing(write_recipe, tmp_path, capsys):
    error = error_of(capsys, write_recipe(), "training.learning_rate=1e30", "training.max_steps=4")
    assert "training diverged at step" in error
    assert "Nothing was saved but the checkpoints before. Lower training.learning_rate" in error
    assert not (tmp_path / "out" / "adapter").exists()
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_checkpoint_without_the_task_s_weights_is_refused(write_recipe, encoder, tmp_path, capsys):
    """Without a pooler in the checkpoint the pooler would be random, frozen and never saved."""
    config = BertConfig.from_pretrained(encoder)
    BertForMaskedLM(config).save_pretrained(tmp_path / "mlm")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "mlm")
    path = write_recipe(model={"path": str(tmp_path / "mlm")})
    assert "the checkpoint lacks 2 weights, bert.pooler.dense.bias" in error_of(capsys, path)
    assert main(["train", str(path), "adapter.modules_to_save=[pooler, classifier]"]) == 0


@pytest.mark.parametrize(
    ("text", "message"), [("", "has no rows|is empty|cannot be read"), ('{"text": "a"\n{', "cannot be read")]
)
def test_an_empty_or_broken_file_is_named(write_recipe, tmp_path, capsys, text, message):
    path = write_recipe()
    (tmp_path / "train.jsonl").write_text(text)
    error = error_of(capsys, path)
    assert "data.files.train" in error
    assert any(part in error for part in message.split("|"))


def test_resuming_has_its_own_option(write_recipe, capsys):
    assert "run dlor train with --resume" in error_of(capsys, write_recipe(), "training.resume_from_checkpoint=/x")


def test_no_is_a_word(write_recipe, tmp_path):
    assert (
        main(["train", str(write_recipe()), "training.save_strategy=no", "training.dataloader_pin_memory=false"]) == 0
    )
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["recipe"]["training"]["save_strategy"] == "no"


def test_data_of_the_hub_is_loaded_by_its_id(write_recipe, tmp_path):
    """load_dataset takes a folder where it takes a hub id."""
    path = write_recipe(data={"dataset": str(tmp_path), "splits": {"train": "train", "test": "test[:50%]"}})
    (tmp_path / "dev.jsonl").unlink()
    assert main(["train", str(path)]) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["states"]["merged"]["num_outputs"] == 24


def test_the_card_s_lines_load_the_adapter(write_recipe, tmp_path):
    assert main(["train", str(write_recipe())]) == 0
    adapter = tmp_path / "out" / "adapter"
    _, _, code = (adapter / "README.md").read_text().partition("```python\n")
    names: dict = {}
    exec(code.partition("```")[0].replace("path/of/this/adapter", str(adapter)), names)  # the card's own lines
    model, tokenizer = names["model"], names["tokenizer"]
    assert sorted(model.config.id2label.values()) == ["card", "cash", "pin", "rate"]
    with torch.no_grad():
        assert model(**tokenizer("my card is lost", return_tensors="pt")).logits.shape == (1, 4)


def test_the_card_tells_of_the_training(write_recipe, tmp_path):
    assert main(["train", str(write_recipe())]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    text = (tmp_path / "out" / "adapter" / "README.md").read_text()
    accuracy, before = metrics["after"]["accuracy"], metrics["before"]["accuracy"]
    for row in [
        "| task | text-classification |",
        "| data | dev: dev.jsonl, test: test.jsonl, train: train.jsonl |",
        "| steps | 2 |",
        "| batch size | 8 |",
        "| learning rate | 0.01 |",
        "| seed | 0 |",
        f"| accuracy on the test split | {accuracy:.4f} ({before:.4f} before training) |",
        "| mode | `scaled` |",
    ]:
        assert f"{row}\n" in text


def test_the_card_of_another_method_does_not_claim_to_be_dlor_s(write_recipe, tmp_path):
    adapter = {"peft_type": "LORA", "target_modules": "all-linear"}
    assert main(["train", str(write_recipe(adapter=adapter))]) == 0
    card = ModelCard.load(tmp_path / "out" / "adapter" / "README.md")
    assert "lora" in card.data.tags
    assert "dlor" not in card.data.tags
    assert "DLoR" not in card.text
    assert "| steps | 2 |" in card.text
    assert "load_trained(" in card.text


def finished(write_recipe, tmp_path, **sections):
    """A recipe whose run is finished, and what is in its folder."""
    path = write_recipe(**sections)
    assert main(["train", str(path), "training.save_strategy=steps", "training.save_steps=1"]) == 0
    return path, sorted(file.relative_to(tmp_path) for file in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer={max_ratio: 0.5}"], "max_ratio guarantees nothing"),
        (["optimizer={diag_lr_ratio: 2}", "adapter.diagonal=none"], "diag_lr_ratio"),
        (["start_batches=1", "adapter.r=0"], "start_batches: "),
        (["optimizer={name: Adamm}"], "optimizer.name: torch.optim has no 'Adamm'. Did you mean 'Adam'?"),
    ],
)
def test_what_the_optimizer_refuses_leaves_the_finished_run(write_recipe, tmp_path, capsys, words, message):
    path, before = finished(write_recipe, tmp_path)
    assert message in error_of(capsys, path, "--overwrite", *words)
    assert sorted(file.relative_to(tmp_path) for file in (tmp_path / "out").rglob("*")) == before


def test_an_adapter_without_metrics_is_not_replaced_unasked(write_recipe, tmp_path, capsys):
    path = write_recipe()
    assert main(["train", str(path)]) == 0
    (tmp_path / "out" / "metrics.json").unlink()
    assert "is of a run that broke off after it was trained" in error_of(capsys, path, "adapter.r=1")
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer={name: SGD, options: {lr: 5.0}}"], "lr is training.learning_rate"),
        (["optimizer={name: SGD}", "training.optim=adafactor"], "training.optim and optimizer.name"),
        (["training.save_only_model=true"], "cannot be resumed"),
        (["training.hub_token=hf_x"], "no place for a secret"),
    ],
)
def test_what_would_be_ignored_or_lost_is_refused(write_recipe, capsys, words, message):
    assert message in error_of(capsys, write_recipe(), *words)


def test_damaged_checkpoints_are_kept(write_recipe, tmp_path, capsys):
    path, _ = finished(write_recipe, tmp_path)
    words = [path, "training.save_strategy=steps", "training.save_steps=1", "--resume"]
    (tmp_path / "out" / "metrics.json").unlink()
    last = tmp_path / "out" / "checkpoints" / "checkpoint-2"
    (last / "optimizer.pt").rename(tmp_path / "optimizer.pt")
    assert "lacks optimizer.pt" in error_of(capsys, *words)
    (tmp_path / "optimizer.pt").rename(last / "optimizer.pt")
    mark = last / "dlor_checkpoint.json"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "new": 1}))
    assert "written by another version of dlor-peft" in error_of(capsys, *words)
    assert (last / "optimizer.pt").is_file()
