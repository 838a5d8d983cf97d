"""dlor extract: an adapter out of two checkpoints, that PEFT loads and that does what the tuned model does."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import adapted, base_weights, build, distance, layers, logits
from torch import nn

from dlor_peft import cli
from dlor_peft.config import DLoRConfig
from dlor_peft.deploy.adapter import read_adapter
from dlor_peft.deploy.checkpoint import Checkpoint
from dlor_peft.deploy.extract import RECORD, Extraction, as_pattern
from dlor_peft.deploy.fitting import Wanted
from dlor_peft.deploy.merge import Merge

KINDS = ["llama", "gpt2", "bert", "t5"]
NOT_ALL = "ignore:.*changed tensors are not in the adapter:UserWarning"

MIXED = {
    "mode": "scaled",
    "mode_pattern": {"layers.1.self_attn.q_proj": "additive", "k_proj": "multiplicative"},
    "side_pattern": {"up_proj": "both", "k_proj": "output", "down_proj": "input"},
}


def save(model, path, dtype=None):
    (model if dtype is None else model.to(dtype)).save_pretrained(path)
    return path


def planted(kind, tmp_path, form="scaled", scale=1.0, **changes):
    """A base, and what an adapter makes of it."""
    base = save(build(kind), tmp_path / "base")
    model = adapted(kind, form, **changes)
    tuned = save(model.merge_and_unload(), tmp_path / "tuned")
    return base, tuned


def extract(base, tuned, out, r=3, modules_to_save=(), overwrite=False, **wanted):
    extraction = Extraction(Checkpoint(base), Checkpoint(tuned), Wanted(r, **wanted), modules_to_save)
    return extraction.write(out, overwrite)


def change(path, **edits):
    """Edit tensors of a saved model."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name, edit in edits.items():
        tensors[name] = edit(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_planted_adapter_is_found_and_loads(kind, low_cpu_mem_usage, tmp_path):
    base, tuned = planted(kind, tmp_path, "scaled-output")
    report = extract(base, tuned, tmp_path / "out", mode="scaled", side="output")
    assert report.residual < 1e-3
    assert not report.left
    model = adapted(kind, "scaled-output")
    assert [*report.layers] == sorted(name.removeprefix("base_model.model.") for name in layers(model))
    loaded = PeftModel.from_pretrained(build(kind), tmp_path / "out", low_cpu_mem_usage=low_cpu_mem_usage)
    assert set(layers(loaded)) == set(layers(model))
    want = type(build(kind)).from_pretrained(tuned)
    assert distance(logits(loaded, kind), logits(want, kind)) < 1e-2
    # PEFT shortens the names in what it has loaded
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert config.base_model_name_or_path == str(base)
    assert config.target_modules == {name.removeprefix("base_model.model.") for name in layers(loaded)}


def test_auto_finds_the_form_of_each_layer(tmp_path):
    base, tuned = planted("llama", tmp_path, r=1, **MIXED)
    report = extract(base, tuned, tmp_path / "out", r=1)
    want = {
        name.removeprefix("base_model.model."): layer.form["default"]
        for name, layer in layers(adapted("llama", r=1, **MIXED)).items()
    }
    assert report.residual < 2e-2
    assert report.lora_residual > 0.2
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "out")
    for name, layer in layers(loaded).items():
        form, planted_form = layer.form["default"], want[name.removeprefix("base_model.model.")]
        # a square weight has the multiplicative form for a scaled one
        assert (form.mode, form.side) == (planted_form.mode, planted_form.side), name
    assert distance(logits(loaded, "llama"), logits(type(build("llama")).from_pretrained(tuned), "llama")) < 0.05


@pytest.mark.parametrize("mode", ["scaled", "additive", "multiplicative"])
@pytest.mark.parametrize("diagonal", ["vector", "scalar", "none"])
def test_what_is_stored_is_what_is_reported(mode, diagonal, tmp_path):
    base, tuned = planted("gpt2", tmp_path)
    report = extract(base, tuned, tmp_path / "out", r=2, mode=mode, diagonal=diagonal)
    loaded = PeftModel.from_pretrained(build("gpt2"), tmp_path / "out")
    before, after = base_weights(loaded), load_file(tuned / "model.safetensors")
    for name, layer in layers(loaded).items():
        key = name.removeprefix("base_model.model.")
        delta = (after[f"{key}.weight"] - before[name]).T
        left = (layer.delta_matrix("default") - delta).norm() / delta.norm()
        assert left.item() == pytest.approx(report.layers[key].residual, abs=1e-4)
        stored = sum(p.numel() for n, p in layer.named_parameters() if "dlor_" in n)
        assert stored == report.layers[key].num_parameters


def test_what_did_not_change_has_no_adapter(tmp_path):
    base, tuned = planted("llama", tmp_path, target_modules=["q_proj"], layers_to_transform=[1])
    report = extract(base, tuned, tmp_path / "out")
    assert [*report.layers] == ["model.layers.1.self_attn.q_proj"]
    # the rest of the linear layers, the head among them
    assert report.num_unchanged == 14
    assert "14 linear layers did not change" in report.text()
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert config.target_modules == {"model.layers.1.self_attn.q_proj"}


def test_what_is_no_linear_weight_is_listed(tmp_path):
    base, tuned = planted("llama", tmp_path, target_modules=["q_proj"])
    norm, bias, embedding = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "model.embed_tokens.weight"
    change(base, **{bias: torch.zeros_like})
    change(tuned, **{norm: lambda t: 1.5 * t, embedding: lambda t: 0.75 * t})
    with pytest.warns(UserWarning, match="3 changed tensors are not in the adapter.*modules_to_save"):
        report = extract(base, tuned, tmp_path / "out")
    assert {(item.name, item.kind) for item in report.left} == {
        (norm, "LlamaRMSNorm"), (bias, "Linear"), (embedding, "Embedding"),
    }  # fmt: skip
    by_name = {item.name: item.change for item in report.left}
    assert by_name[norm] == pytest.approx(0.5)
    assert by_name[embedding] == pytest.approx(0.25)
    assert f"not extracted: {norm} (LlamaRMSNorm): changed by 0.5" in report.text()
    assert f"not extracted: {bias} (Linear): all zeros in the base" in report.text()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_modules_to_save(tmp_path):
    base, tuned = planted("llama", tmp_path, target_modules=["q_proj"])
    change(tuned, **{"model.norm.weight": lambda t: 1.5 * t, "lm_head.weight": lambda t: t + 0.1})
    report = extract(base, tuned, tmp_path / "out", modules_to_save=["norm", "lm_head"])
    assert not report.left
    assert report.saved == ["lm_head.weight", "model.norm.weight"]
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "out")
    assert distance(logits(loaded, "llama"), logits(type(build("llama")).from_pretrained(tuned), "llama")) < 1e-2
    with pytest.raises(ValueError, match=r"no module of LlamaForCausalLM is called 'score'.*model, lm_head"):
        extract(base, tuned, tmp_path / "other", modules_to_save=["score"])


def test_a_head_that_the_base_has_not(tmp_path):
    base, tuned = planted("bert", tmp_path, target_modules=["query"])
    change(tuned, **{"classifier.weight": lambda t: t + 0.1})
    tensors = load_file(base / "model.safetensors")
    save_file(
        {key: t for key, t in tensors.items() if "classifier" not in key},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.warns(UserWarning, match="2 changed tensors are not in the adapter"):
        report = extract(base, tuned, tmp_path / "out")
    assert [item.reason for item in report.left] == ["not in the base"] * 2
    extract(base, tuned, tmp_path / "out", modules_to_save=["classifier"], overwrite=True)
    loaded = PeftModel.from_pretrained(build("bert", seed=3), tmp_path / "out")
    saved = loaded.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(saved, load_file(tuned / "model.safetensors")["classifier.weight"])


@pytest.mark.filterwarnings(NOT_ALL)
def test_tied_embeddings_are_not_extracted(tmp_path):
    base, tuned = planted("gpt2", tmp_path)
    change(tuned, **{"transformer.wte.weight": lambda t: t * 1.1})
    report = extract(base, tuned, tmp_path / "out")
    assert [item.name for item in report.left] == ["transformer.wte.weight"]
    assert all("lm_head" not in name for name in report.layers)


@pytest.mark.filterwarnings("ignore:.*tie:UserWarning", "ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("module", ["wte", "lm_head"])
def test_tied_embeddings_that_are_saved_stay_tied(tmp_path, module):
    base, tuned = planted("gpt2", tmp_path)
    change(tuned, **{"transformer.wte.weight": lambda t: t * 1.1})
    report = extract(base, tuned, tmp_path / "out", modules_to_save=[module])
    assert not report.left
    want = logits(type(build("gpt2")).from_pretrained(tuned), "gpt2")
    loaded = PeftModel.from_pretrained(build("gpt2"), tmp_path / "out")
    assert distance(logits(loaded, "gpt2"), want) < 1e-2
    Merge(Checkpoint(base), [read_adapter(tmp_path / "out")]).write(tmp_path / "merged")
    assert distance(logits(type(build("gpt2")).from_pretrained(tmp_path / "merged"), "gpt2"), want) < 1e-2


@pytest.mark.filterwarnings(NOT_ALL)
def test_another_vocabulary(tmp_path):
    base, tuned = planted("llama", tmp_path)
    model = type(build("llama")).from_pretrained(tuned)
    model.resize_token_embeddings(43, mean_resizing=False)
    report = extract(base, save(model, tmp_path / "larger"), tmp_path / "out")
    assert {item.name: item.reason for item in report.left} == {
        "lm_head.weight": "40x16 in the base, 43x16 after",
        "model.embed_tokens.weight": "40x16 in the base, 43x16 after",
    }


def test_half_precision_is_compared_as_it_is_stored(tmp_path):
    base = save(build("llama"), tmp_path / "base")
    model = adapted("llama", target_modules=["q_proj"]).merge_and_unload()
    tuned = save(model, tmp_path / "tuned", torch.bfloat16)
    report = extract(base, tuned, tmp_path / "out")
    assert {name.rpartition(".")[2] for name in report.layers} == {"q_proj"}
    # what bfloat16 rounds is a part of the update
    assert report.residual < 0.2


def test_the_rank_is_at_most_the_smaller_dimension(tmp_path):
    base, tuned = planted("llama", tmp_path)
    report = extract(base, tuned, tmp_path / "out", r=20, mode="additive")
    assert report.layers["model.layers.0.self_attn.k_proj"].r == 8
    assert report.residual < 1e-5
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "out")
    assert {layer.r["default"] for layer in layers(loaded).values()} == {8, 16}


def test_diagonals_alone(tmp_path):
    base, tuned = planted("llama", tmp_path, r=0)
    report = extract(base, tuned, tmp_path / "out", r=0)
    assert report.residual < 1e-5
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "out")
    assert not any(len(layer.dlor_U) for layer in layers(loaded).values())


def test_the_auto_class_of_peft_loads_it(tmp_path):
    base, tuned = planted("llama", tmp_path)
    extract(base, tuned, tmp_path / "out", side="output", mode="scaled")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.peft_config["default"].task_type == "CAUSAL_LM"
    assert distance(logits(loaded, "llama"), logits(type(build("llama")).from_pretrained(tuned), "llama")) < 0.5


def test_nothing_to_extract(tmp_path):
    base = save(build("llama"), tmp_path / "base")
    tuned = tmp_path / "tuned"
    shutil.copytree(base, tuned)
    with pytest.raises(ValueError, match="same weights in all linear layers: there is nothing to extract"):
        extract(base, tuned, tmp_path / "out")
    change(tuned, **{"model.norm.weight": lambda t: 2 * t})
    with pytest.raises(ValueError, match=r"nothing to extract; these changed: model\.norm\.weight"):
        extract(base, tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_different_models(tmp_path):
    with pytest.raises(ValueError, match="no tensor in common"):
        extract(save(build("gpt2"), tmp_path / "a"), save(build("llama"), tmp_path / "b"), tmp_path / "out")


def test_nan_is_refused_by_name(tmp_path):
    base, tuned = planted("llama", tmp_path)
    change(tuned, **{"model.layers.0.self_attn.q_proj.weight": lambda t: t * float("nan")})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight: .*NaN"):
        extract(base, tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys):
    base, tuned = planted("llama", tmp_path, "scaled-both")
    change(tuned, **{"model.norm.weight": lambda t: 1.5 * t})
    arguments = ["extract", "--base", str(base), "--tuned", str(tuned), "--r", "3", "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--modules-to-save", "norm"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj" in out
    assert "saved in full: model.norm.weight" in out
    assert "LoRA of as many parameters" in out
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["base"] == {"source": str(base), "revision": None}
    assert record["residual"] < record["lora_residual"]
    assert set(record["layers"]) == PeftConfig.from_pretrained(tmp_path / "out").target_modules
    assert cli.main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.main([*arguments[:1], *arguments[3:]]) == 2
    assert "--base is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "match"),
    [
        ({"r": -1}, "r must be an integer of at least 0"),
        ({"r": 2, "mode": "additive", "side": "input"}, "no meaning in mode"),
        ({"r": 2, "mode": "multiplicative", "side": "both"}, 'side="both" needs mode="scaled"'),
        ({"r": 0, "diagonal": "none"}, "nothing to train"),
        ({"r": 2, "mode": "best"}, "mode must be one of"),
    ],
)
def test_what_cannot_be_wanted(wanted, match):
    with pytest.raises(ValueError, match=match):
        Wanted(**wanted)


def test_candidates():
    auto = Wanted(4)
    one_sided = [("scaled", "output"), ("scaled", "input"), ("scaled", "both"), ("additive", None)]
    assert auto.candidates(8, 8) == one_sided
    assert auto.candidates(8, 6) == [*one_sided, ("multiplicative", "input")]
    assert auto.candidates(6, 8) == [*one_sided, ("multiplicative", "output")]
    assert Wanted(4, side="output").candidates(6, 8) == [("scaled", "output"), ("multiplicative", "output")]
    assert Wanted(4, mode="multiplicative").candidates(8, 8) == [("multiplicative", "input")]
    assert Wanted(4, mode="multiplicative", side="input").candidates(6, 8) == [("multiplicative", "input")]
    assert Wanted(4, diagonal="none").candidates(6, 8) == [("scaled", None), ("multiplicative", "output")]


@pytest.mark.parametrize(
    "values",
    [
        {"a.q": 1, "b.q": 1, "a.k": 2, "b.k": 3, "c.k": 3},
        {"q": 1, "a.q": 2, "b.a.q": 1, "k": 2, "b.k": 2},
        {"a": 1},
        {"h.0.x": 1, "e.h.0.x": 1, "h.1.x": 2, "e.h.1.x": 1},
    ],
)
def test_patterns_say_what_they_were_made_of(values):
    general, pattern = as_pattern(values)
    config = DLoRConfig(r=general, rank_pattern=pattern)
    assert {name: config.for_layer(name).r for name in values} == values


def test_names_that_end_with_a_target_are_kept_out(tmp_path):
    base, tuned = planted("llama", tmp_path, target_modules=["q_proj"])
    extraction = Extraction(Checkpoint(base), Checkpoint(tuned), Wanted(2))
    extraction._modules["other.model.layers.0.self_attn.q_proj"] = nn.Linear(1, 1)
    assert extraction._beyond({"model.layers.0.self_attn.q_proj": None}) == ["other.model.layers.0.self_attn.q_proj"]


def test_it_merges_from_the_command_line_too(tmp_path, capsys):
    base, tuned = planted("llama", tmp_path, r=1, **MIXED)
    extract(base, tuned, tmp_path / "out", r=1)
    assert cli.main(["merge", "--adapter", str(tmp_path / "out"), "--out", str(tmp_path / "merged")]) == 0
    got, want = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", tuned))
    before = load_file(base / "model.safetensors")
    for name in PeftConfig.from_pretrained(tmp_path / "out").target_modules:
        key = f"{name}.weight"
        assert (got[key] - want[key]).norm() < 0.05 * (want[key] - before[key]).norm()
