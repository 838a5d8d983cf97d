"""The merge on disk against `merge_and_unload` and `save_pretrained` in memory: the same files, bit for bit."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from saved import adapt, adapt_tiny, assert_equal_folders, merge, tensors
from tiny_models import FEW_FORMS, FORMS, TARGETS, build, config_of, distance, inputs, logits
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from dlor_peft import DLoRConfig
from dlor_peft.deploy.merge import MergeOptions
from dlor_peft.deploy.surroundings import RECORD
from dlor_peft.deploy.writing import Shards

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*rounding dropped more than 10%"),
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form(tmp_path, form):
    model = adapt_tiny("llama", form, tmp_path, torch.bfloat16)
    merge(tmp_path, shard_size="5KB")
    model.merge_and_unload().save_pretrained(tmp_path / "want")
    assert_equal_folders(tmp_path / "out", tmp_path / "want")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
@pytest.mark.parametrize("form", FEW_FORMS)
def test_every_kind_of_model(tmp_path, kind, form, dtype):
    model = adapt_tiny(kind, form, tmp_path, dtype)
    merge(tmp_path)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "want")
    assert_equal_folders(tmp_path / "out", tmp_path / "want")
    loaded, expected = (type(merged).from_pretrained(tmp_path / name).eval() for name in ("out", "want"))
    assert distance(logits(loaded, kind), logits(expected, kind)) == 0


def test_several_adapters_in_order(tmp_path):
    model = adapt_tiny("llama", "multiplicative-output-3", tmp_path, torch.bfloat16)
    torch.manual_seed(5)
    model.add_adapter("second", config_of("llama", "scaled-both"))
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    merge(tmp_path, "adapter", "second")
    merge(tmp_path, "second", "adapter", out="reversed")
    for order, folder in ((["default", "second"], "out"), (["second", "default"], "reversed")):
        again = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        )
        again.load_adapter(tmp_path / "second", "second")
        again.base_model.merge_and_unload(adapter_names=order).save_pretrained(tmp_path / f"want-{folder}")
        assert_equal_folders(tmp_path / folder, tmp_path / f"want-{folder}")


def test_fused_experts_are_split_again(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    base = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4)).to(torch.bfloat16)
    targets = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    model = adapt(base, DLoRConfig(r=2, mode="scaled", init_weights=False, **targets), tmp_path)
    merge(tmp_path, shard_size="10KB")
    model.merge_and_unload().save_pretrained(tmp_path / "want")
    assert_equal_folders(tmp_path / "out", tmp_path / "want")
    assert any("experts.3.w2" in key for key in tensors(tmp_path / "out"))


def test_only_the_experts_that_are_adapted_are_converted(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
    base = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    model = adapt(base, DLoRConfig(r=2, init_weights=False, target_modules=["q_proj"]), tmp_path)
    merge(tmp_path)
    model.merge_and_unload().save_pretrained(tmp_path / "want")
    assert_equal_folders(tmp_path / "out", tmp_path / "want")


def bert_config(**changes):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertConfig(vocab_size=40, **sizes, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_head_on_an_encoder_without_one(tmp_path, dtype):
    torch.manual_seed(0)
    BertModel(bert_config()).to(dtype).save_pretrained(tmp_path / "encoder")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=5)
    config = DLoRConfig(r=2, init_weights=False, target_modules=["query", "dense"], task_type="SEQ_CLS")
    model = adapt(base, config, tmp_path)
    shutil.rmtree(tmp_path / "base")
    record = merge(tmp_path, base="encoder")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "want")
    assert record["class"] == "BertForSequenceClassification"
    got, want = tensors(tmp_path / "out"), tensors(tmp_path / "want")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key].to(got[key].dtype)) for key in got)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.num_labels == 5
    batch = inputs("bert")
    assert distance(loaded(**batch).logits, merged.to(loaded.dtype)(**batch).logits) == 0


def test_a_head_with_a_layer_of_its_own_and_more_labels_than_features(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaModel(RobertaConfig(vocab_size=40, **sizes)).save_pretrained(tmp_path / "encoder")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=30)
    model = adapt(base, DLoRConfig(r=2, init_weights=False, target_modules=["query"], task_type="SEQ_CLS"), tmp_path)
    merge(tmp_path, base="encoder")
    model.merge_and_unload().save_pretrained(tmp_path / "want")
    got, want = tensors(tmp_path / "out"), tensors(tmp_path / "want")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in got)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 30


def test_trained_tokens(tmp_path):
    model = adapt_tiny("llama", "scaled", tmp_path, trainable_token_indices=[3, 7])
    merge(tmp_path)
    model.merge_and_unload().save_pretrained(tmp_path / "want")
    assert_equal_folders(tmp_path / "out", tmp_path / "want")


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_trained_tokens_of_tied_embeddings(tmp_path, kind):
    tokens = {"embed_tokens" if kind == "llama" else "shared": [3, 7]}
    changes = {"trainable_token_indices": tokens}
    model = adapt(build(kind, tie_word_embeddings=True), config_of(kind, "scaled", **changes), tmp_path)
    merge(tmp_path)
    model.merge_and_unload().save_pretrained(tmp_path / "want")
    assert_equal_folders(tmp_path / "out", tmp_path / "want")


def test_a_model_without_input_embeddings(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    conv = {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (3,), "num_conv_pos_embeddings": 4}
    base = Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=9, **sizes, **conv, num_conv_pos_embedding_groups=2)).eval()
    model = adapt(base, DLoRConfig(r=3, target_modules=["q_proj"], init_weights=False), tmp_path)
    merge(tmp_path)
    model.merge_and_unload().save_pretrained(tmp_path / "want")
    assert_equal_folders(tmp_path / "out", tmp_path / "want")


def test_trained_biases(tmp_path):
    model = adapt_tiny("llama", "scaled", tmp_path, bias="dlor_only")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path)
    model.merge_and_unload().save_pretrained(tmp_path / "want")
    assert_equal_folders(tmp_path / "out", tmp_path / "want")


def test_all_biases_of_a_head_that_is_saved(tmp_path):
    model = adapt_tiny("bert", "scaled", tmp_path, bias="all", modules_to_save=["classifier"])
    merge(tmp_path)
    model.merge_and_unload().save_pretrained(tmp_path / "want")
    assert_equal_folders(tmp_path / "out", tmp_path / "want")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True")
def test_an_adapted_embedding(tmp_path, tied):
    targets = [*TARGETS["llama"], "embed_tokens"]
    model = adapt(
        build("llama", tie_word_embeddings=tied),
        config_of("llama", "scaled-output", target_modules=targets, ensure_weight_tying=tied),
        tmp_path,
    )
    merge(tmp_path)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "want")
    assert_equal_folders(tmp_path / "out", tmp_path / "want")
    assert ("lm_head.weight" in tensors(tmp_path / "out")) != tied


TIED = {
    "embedding adapted": {"target_modules": ["q_proj", "embed_tokens"], "mode": "scaled", "side": "output"},
    "head adapted": {"target_modules": ["q_proj", "lm_head"], "mode": "scaled"},
    "head trained": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both adapted": {"target_modules": ["embed_tokens", "lm_head"], "mode": "scaled", "side": "output"},
}


@pytest.mark.parametrize("case", TIED)
@pytest.mark.filterwarnings("ignore:.*tie")
def test_what_would_no_longer_be_tied_is_refused_or_untied(tmp_path, case):
    base = build("llama", tie_word_embeddings=True)
    adapt(base, DLoRConfig(r=2, init_weights=False, **TIED[case]), tmp_path)
    with pytest.raises(ValueError, match=r"lm_head\.weight.* are one tensor .*--untie"):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()
    record = merge(tmp_path, untie=True)
    assert record["untied"] == ["model.embed_tokens.weight", "lm_head.weight"]
    out = tmp_path / "out"
    # as in memory, where they were untied before they were adapted
    tied = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tied.config.tie_word_embeddings = False
    tied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.detach().clone())
    tied.save_pretrained(tmp_path / "untied")
    untied = AutoModelForCausalLM.from_pretrained(tmp_path / "untied")
    PeftModel.from_pretrained(untied, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "want")
    assert_equal_folders(out, tmp_path / "want")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_tokens_that_were_added(tmp_path):
    base = build("llama")
    base.save_pretrained(tmp_path / "before")
    base.resize_token_embeddings(base.config.vocab_size + 3, mean_resizing=False)
    model = adapt(base, config_of("llama", "scaled", modules_to_save=["embed_tokens", "lm_head"]), tmp_path)
    merge(tmp_path, base="before")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "want")
    assert_equal_folders(tmp_path / "out", tmp_path / "want")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == merged.config.vocab_size


def test_another_dtype(tmp_path):
    adapt_tiny("llama", "scaled", tmp_path, torch.bfloat16)
    merge(tmp_path, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    want = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert got.dtype == torch.float32
    assert distance(logits(got, "llama"), logits(want, "llama")) < 1e-6


def test_the_files_around_the_weights(tmp_path):
    adapt_tiny("llama", "scaled", tmp_path)
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    (base / "tokenizer_config.json").write_text('{"from": "base"}')
    (base / "chat_template.jinja").write_text("base")
    (base / "pytorch_model.bin").write_text("weights of old")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "something_of_mine": 1}))
    merge(tmp_path)
    assert (out / "generation_config.json").is_file()
    assert (out / "tokenizer_config.json").read_text() == '{"from": "base"}'
    assert not (out / "pytorch_model.bin").exists()
    assert not (out / "adapter_config.json").exists()
    assert json.loads((out / "config.json").read_text())["something_of_mine"] == 1
    assert "library_name: transformers" in (out / "README.md").read_text()
    (adapter / "tokenizer_config.json").write_text('{"from": "adapter"}')
    (adapter / "chat_template.jinja").write_text("adapter")
    merge(tmp_path, overwrite=True)
    assert (out / "tokenizer_config.json").read_text() == '{"from": "adapter"}'
    assert (out / "chat_template.jinja").read_text() == "adapter"


def test_plain_transformers_loads_it(tmp_path):
    model = adapt_tiny("llama", "scaled", tmp_path)
    merge(tmp_path)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; "
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}).eval(); "
        f"torch.save(model(input_ids=torch.arange(5)[None]).logits, {str(tmp_path / 'logits.pt')!r}); "
        "assert 'dlor_peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    got, want = torch.load(tmp_path / "logits.pt"), model.merge_and_unload()(input_ids=torch.arange(5)[None]).logits
    assert distance(got, want) < 1e-6


def test_the_record(tmp_path):
    model = adapt_tiny("llama", "scaled", tmp_path, torch.bfloat16)
    before = tensors(tmp_path / "base")
    record = merge(tmp_path)
    assert record == json.loads((tmp_path / "out" / RECORD).read_text())
    after = tensors(tmp_path / "out")
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if type(layer).__name__ == "Linear" and hasattr(layer, "form")
    }
    assert len(record["layers"]) == len(layers) > 0
    for name, layer in layers.items():
        key = f"{name.removeprefix('base_model.model.')}.weight"
        found, W = record["layers"][key], before[key].double()
        delta = layer.delta_matrix("default").double()
        stored = after[key].double() - W
        assert found["update_ratio"] == pytest.approx((delta.norm() / W.norm()).item(), rel=1e-4)
        assert found["survived"] == pytest.approx(((stored * delta).sum() / delta.square().sum()).item(), rel=1e-3)
        assert found["rounding_error"] == pytest.approx(((stored - delta).norm() / delta.norm()).item(), rel=1e-2)
    assert set(record["versions"]) == {"dlor-peft", "torch", "transformers", "peft", "safetensors"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_small_updates_are_lost_to_rounding_with_a_warning_and_kept_by_stochastic_rounding(tmp_path):
    model = adapt_tiny("llama", "additive", tmp_path, torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dlor_diag" in name or "dlor_U" in name:
                parameter.mul_(2e-3)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"rounding dropped more than 10% .*--rounding stochastic"):
        nearest = merge(tmp_path)
    assert min(layer["survived"] for layer in nearest["layers"].values()) < 0.9
    stochastic = merge(tmp_path, rounding="stochastic", overwrite=True)
    kept = [layer["survived"] for layer in stochastic["layers"].values()]
    assert sum(kept) / len(kept) == pytest.approx(1, abs=0.4)
    again = merge(tmp_path, rounding="stochastic", out="again")
    assert_equal_folders(tmp_path / "again", tmp_path / "out")
    assert again["layers"] == stochastic["layers"]
    merge(tmp_path, rounding="stochastic", seed=1, out="other")
    other, out = tensors(tmp_path / "other"), tensors(tmp_path / "out")
    assert any(not torch.equal(other[key], out[key]) for key in out)


def test_a_merged_weight_out_of_range_is_refused(tmp_path):
    model = adapt_tiny("llama", "scaled", tmp_path, torch.float16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dlor_diag" in name:
                parameter.fill_(1e8)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"the merged .*weight is not finite in torch\.float16"):
        merge(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_quantised_base_is_refused(tmp_path):
    adapt_tiny("llama", "scaled", tmp_path)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"is quantised \(gptq\).*unquantised original"):
        merge(tmp_path)


def test_of_a_single_file_and_an_index_the_single_file_counts(tmp_path):
    model = adapt_tiny("llama", "scaled", tmp_path)
    base = tmp_path / "base"
    stale = {name: tensor + 1 for name, tensor in tensors(base).items()}
    save_file(stale, base / "stale.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(stale, "stale.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(base).lm_head.weight, model.lm_head.weight)
    merge(tmp_path)
    model.merge_and_unload().save_pretrained(tmp_path / "want")
    assert_equal_folders(tmp_path / "out", tmp_path / "want")


@pytest.mark.parametrize("size", ["1000", 1000, "1KB", "1 kb"])
def test_the_size_of_a_file(tmp_path, size):
    adapt_tiny("llama", "scaled", tmp_path)
    merge(tmp_path)
    merge(tmp_path, out="small", shard_size=size)
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 5
    assert_equal_folders(tmp_path / "small", tmp_path / "out")


@pytest.mark.parametrize("size", ["", "0", "0GB", "-5", "1e3", "5 things", 0])
def test_what_is_no_size_of_a_file(size):
    with pytest.raises(ValueError, match="is no size of a file"):
        MergeOptions(shard_size=size)


def test_what_is_there_is_kept_unless_it_is_to_be_overwritten(tmp_path):
    adapt_tiny("llama", "scaled", tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        merge(tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(FileExistsError, match="no saved model or adapter"):
        merge(tmp_path, overwrite=True)
    (tmp_path / "out" / "config.json").write_text("{}")
    merge(tmp_path, overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}


@pytest.mark.parametrize("out", ["base", "adapter/", ".", "link", "base/..", "adapter/config.json", "here"])
def test_nothing_that_is_read_or_in_use_is_overwritten(tmp_path, monkeypatch, out):
    adapt_tiny("llama", "scaled", tmp_path)
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "adapter" / "config.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here" if out == "here" else tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="Name a"):
        merge(tmp_path, out=out, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_two_merges_into_one_folder(tmp_path, monkeypatch):
    adapt_tiny("llama", "scaled", tmp_path)
    write, refusals = Shards.write, []

    def with_another(self, *args):
        if not refusals:
            with pytest.raises(OSError, match="another process is writing") as refused:
                merge(tmp_path)
            refusals.append(refused)
        write(self, *args)

    monkeypatch.setattr(Shards, "write", with_another)
    merge(tmp_path)
    monkeypatch.undo()
    merge(tmp_path, out="undisturbed")
    assert refusals
    assert_equal_folders(tmp_path / "out", tmp_path / "undisturbed")


def test_an_interrupted_merge_leaves_nothing_and_what_a_killed_one_left_is_removed(tmp_path, monkeypatch):
    adapt_tiny("llama", "scaled", tmp_path)
    write, calls = Shards.write, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        write(self, *args)

    monkeypatch.setattr(Shards, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_text("half")
    merge(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}


def test_adapters_of_another_model_are_refused(tmp_path):
    adapt_tiny("llama", "scaled", tmp_path)
    build("llama", hidden_act="silu").save_pretrained(tmp_path / "same")
    merge(tmp_path, base="same", out="fits")
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"does not fit .*gpt2"):
        merge(tmp_path, base="gpt2")
    config = build("llama").config
    config.intermediate_size = 32
    type(build("llama"))(config).save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match=r"adapter does not fit .*wider: .* has the shape \(.*\), and the base needs"):
        merge(tmp_path, base="wider")
    config.num_hidden_layers = 3
    type(build("llama"))(config).save_pretrained(tmp_path / "deeper")
    with pytest.raises(ValueError, match=r"adapter lacks \d+ of \d+ tensors .* the first one .*layers\.2"):
        merge(tmp_path, base="deeper")
