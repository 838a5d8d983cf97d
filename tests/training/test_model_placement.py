"""model.quantization, model.device_map and model.offload_folder."""

import json

import pytest
from samples import TOKENIZER, WITHOUT_GPU, write_rows
from transformers import BertConfig, BertModel

from dlor_peft.cli import main
from dlor_peft.training.models import load_classifier, load_tokenizer
from dlor_peft.training.recipe import load_recipe

NF4 = "model.quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.quantization={load_in_4bits: true}", r"^model\.quantization\.load_in_4bits: no field.*'load_in_4bit'"),
        ("model.quantization={load_in_4bit: 4}", r"^model\.quantization: BitsAndBytesConfig does not accept"),
        ("model.quantization={bnb_4bit_quant_type: nf4}", r"^model\.quantization quantises nothing"),
        ("model.offload_folder=x", r"^model: offload_folder belongs to device_map"),
    ],
)
def test_wrong_values(write_recipe, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(str(write_recipe()), [override])


def test_a_missing_library_is_named(write_recipe, monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="needs bitsandbytes: install dlor-peft with its extra 'quantization'"):
        load_recipe(str(write_recipe()), [NF4])


def test_a_quantised_classifier_learns(write_recipe, tmp_path):
    # 64 is the block of a 4-bit quantisation
    config = BertConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    load_tokenizer(load_recipe(str(write_recipe()))[0].model).save_pretrained(tmp_path / "bert")
    path = write_recipe(model={"path": str(tmp_path / "bert"), "dtype": "bfloat16"})
    recipe, _ = load_recipe(str(path), [NF4])
    model = load_classifier(recipe.model, ["a", "b"], load_tokenizer(recipe.model))
    # as PEFT prepares a quantised model for transformers' Trainer
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.uint8", "torch.float32"}
    assert main(["train", str(path), NF4, "training.max_steps=20"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert set(metrics["states"]) == {"reloaded"}


@pytest.mark.parametrize("on_disk", [False, True])
def test_layers_elsewhere_train_as_in_one_place(write_recipe, tmp_path, on_disk):
    write_rows(tmp_path / "rows.jsonl", [{"text": "First Citizen:\nWe are accounted poor citizens."}] * 8)
    path = write_recipe(
        model={"path": str(TOKENIZER), "dtype": "float32"},
        task={"type": "sft", "prompts": 1, "new_tokens": 4},
        data={"files": {"train": "rows.jsonl", "test": "rows.jsonl"}},
        training={
            "max_steps": 4,
            "learning_rate": 1e-2,
            **WITHOUT_GPU,
            "save_strategy": "no",
        },
    )
    assert main(["train", str(path)]) == 0
    expected = json.loads((tmp_path / "out" / "metrics.json").read_text())
    modules = [
        "model.embed_tokens",
        *(f"model.layers.{index}" for index in range(5)),
        "model.norm",
        "model.rotary_emb",
    ]
    places = {**dict.fromkeys([*modules, "lm_head"], "cpu"), "model.layers.3": "disk"} if on_disk else {"": "cpu"}
    overrides = [f"model.device_map={json.dumps(places)}", f"output_dir={tmp_path}/placed"]
    overrides += [f"model.offload_folder={tmp_path}/offload"] if on_disk else []
    assert main(["train", str(path), *overrides]) == 0
    metrics = json.loads((tmp_path / "placed" / "metrics.json").read_text())
    assert metrics["after"]["loss"] == pytest.approx(expected["after"]["loss"], rel=1e-5)
