"""model.weights: identity."""

import json

import pytest
import torch
from samples import TOKENIZER, WITHOUT_GPU, write_rows
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from dlor_peft.cli import main
from dlor_peft.training.identity import build_identity
from dlor_peft.training.load import load_trained

SAVED = ["embed_tokens", "lm_head"]


@pytest.fixture
def write(write_recipe, tmp_path):
    def of(*saved, **model):
        write_rows(tmp_path / "rows.jsonl", [{"text": "First Citizen:\nWe are accounted poor citizens."}] * 8)
        return write_recipe(
            model={"path": str(TOKENIZER), "dtype": "float32", "weights": "identity", **model},
            task={"type": "sft", "prompts": 1, "new_tokens": 4},
            data={"files": {"train": "rows.jsonl", "test": "rows.jsonl"}},
            adapter={"peft_type": "DLOR", "r": 2, "target_modules": "all-linear", "modules_to_save": list(saved)},
            training={
                "max_steps": 10,
                "learning_rate": 1e-2,
                **WITHOUT_GPU,
                "save_strategy": "no",
            },
        )

    return of


def test_linear_layers_are_rectangular_identities_and_the_rest_is_named():
    config = AutoConfig.from_pretrained(TOKENIZER, tie_word_embeddings=False)
    model, random = build_identity(AutoModelForCausalLM, config, "float32", SAVED)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            assert torch.equal(module.weight, torch.eye(*module.weight.shape))
    assert random == ["model.embed_tokens.weight", "lm_head.weight"]
    assert not model.training


def test_two_draws_differ_only_in_what_is_named():
    config = AutoConfig.from_pretrained(TOKENIZER, tie_word_embeddings=False)
    states = []
    for seed in (0, 1):
        set_seed(seed)
        model, random = build_identity(AutoModelForCausalLM, config, "auto", SAVED)
        states.append(model.state_dict())
    assert {name for name in states[0] if not torch.equal(states[0][name], states[1][name])} == set(random)


def test_it_trains_and_its_random_start_is_saved_with_it(write, tmp_path):
    path = write(*SAVED, config={"tie_word_embeddings": False})
    assert main(["train", str(path)]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert metrics["states"]["reloaded"]["num_different"] == metrics["states"]["merged"]["num_different"] == 0
    # its base is no checkpoint that an adapter could be merged into
    assert not json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    weight = load_trained(tmp_path / "out" / "adapter")[0].merge_and_unload().model.layers[0].self_attn.q_proj.weight
    off_diagonal = weight - torch.diag(weight.diagonal())
    assert (weight.diagonal() - 1).abs().max() > 1e-3
    assert torch.linalg.matrix_rank(off_diagonal) > 2


@pytest.mark.parametrize(("saved", "tied"), [(["embed_tokens"], False), (["lm_head"], True), (["embed_tokens"], True)])
def test_random_weights_that_are_not_saved_are_refused(write, capsys, saved, tied):
    path = write(*saved, config={"tie_word_embeddings": tied})
    assert main(["train", str(path)]) == 2
    assert "model.weights: identity leaves 1 weights" in capsys.readouterr().err
    assert main(["train", str(path), "--dry-run"]) == 2
    assert "model.weights: identity leaves 1 weights" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["quantization={load_in_4bit: true}", "device_map=auto"])
def test_a_checkpoint_s_placement_is_refused(write, capsys, field):
    assert main(["train", str(write(*SAVED)), f"model.{field}"]) == 2
    assert f"model: weights: identity takes no {field.partition('=')[0]}" in capsys.readouterr().err
