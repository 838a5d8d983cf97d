"""DLoR adapters as LoRA and DoRA adapters of PEFT: the same outputs, the layout of serving engines, and refusals.

The rules are those of vLLM (vllm/lora/peft_helper.py, utils.py, lora_model.py, vllm/config/lora.py), SGLang
(python/sglang/srt/lora/lora_config.py, lora.py, utils.py) and llama.cpp (convert_lora_to_gguf.py).
"""

import json
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from saved import adapt, adapt_tiny, llava, tensors
from tiny_models import FORMS, TARGETS, build, config_of, distance, logits
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from dlor_peft import DLoRConfig
from dlor_peft.cli import main
from dlor_peft.deploy import low_rank
from dlor_peft.deploy.adapter import read_adapter
from dlor_peft.deploy.checkpoint import Checkpoint
from dlor_peft.deploy.export_dora import DoraExport
from dlor_peft.deploy.export_lora import RANKS, LoraExport
from dlor_peft.form import Form

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings"
)

# those with the diagonal on the outputs, or with one that is on both sides the same
DORA = {
    "additive-none", "scaled-output", "scaled-output-scalar", "scaled-both-scalar-r0", "scaled-none",
    "multiplicative-output-3", "multiplicative-scalar-2", "multiplicative-none-2",
}  # fmt: skip
LORA = {"additive-none", "scaled-none", "multiplicative-none-2"}


def lora(folder, **options):
    export = LoraExport(Checkpoint(folder / "base", with_weights=False), read_adapter(folder / "adapter"), **options)
    export.write(folder / "out")
    return export


def dora(folder):
    DoraExport(Checkpoint(folder / "base", with_weights=False), read_adapter(folder / "adapter")).write(folder / "out")


def served(folder, model):
    """The exported adapter on a model, loaded by PEFT without a warning: every tensor is found and used."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`|Model has `tie_word_embeddings")
        return PeftModel.from_pretrained(model, folder / "out").eval()


def exported(folder):
    config = json.loads((folder / "out" / "adapter_config.json").read_text())
    return config, load_file(folder / "out" / "adapter_model.safetensors")


@st.composite
def cases(draw):
    """A form on a layer of any shape, with its residual and W in float64."""
    form = draw(st.sampled_from(sorted(FORMS)))
    I, O, r = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    config = DLoRConfig(**{"r": r, **FORMS[form]})
    resolved = Form.resolve(config, config.r, config.depth, I, O)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    stored = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * (0.3 if "diag" in name else 1)
        for name, shape in resolved.shapes.items()
    }
    if draw(st.booleans()):
        # not trained
        stored = {name: t.zero_() if "diag" in name else t for name, t in stored.items()}
    W = torch.randn(O, I, generator=generator, dtype=torch.float64)
    return form, resolved, resolved.residual(stored), W


@settings(deadline=None, max_examples=60)
@given(cases())
def test_an_exact_form_is_the_adapter(case):
    name, form, residual, W = case
    gain = low_rank.gain(form, residual)
    assert gain is not None or name not in DORA
    if gain is None:
        return
    B, A = low_rank.product(form, residual, W)
    assert B.shape[1] == form.r * form.depth
    want = form.delta_weight(residual, W)
    torch.testing.assert_close(gain[:, None] * W + B @ A, want)
    if name in LORA:
        assert not gain.any()
        rest = low_rank.singular_values(B, A)
        torch.testing.assert_close(rest.square().sum(), want.square().sum())


@settings(deadline=None, max_examples=60)
@given(cases(), st.integers(0, 9))
def test_the_error_of_the_nearest_is_the_rest_of_the_singular_values(case, rank):
    _, form, residual, W = case
    delta = form.delta_weight(residual, W)
    B, A, sigma = low_rank.nearest(delta, rank)
    torch.testing.assert_close((delta - B @ A).square().sum(), (delta.square().sum() - sigma.square().sum()).clamp(0))
    product = torch.randn(delta.shape[0], 5, dtype=torch.float64), torch.randn(5, delta.shape[1], dtype=torch.float64)
    B, A = low_rank.nearest_product(*product, rank)
    error = (product[0] @ product[1] - B @ A).square().sum()
    torch.testing.assert_close(error, low_rank.singular_values(*product)[rank:].square().sum())


def test_subspace_iteration_measures_its_own_error(monkeypatch):
    torch.manual_seed(0)
    delta = torch.randn(90, 8) @ torch.randn(8, 70) + 0.1 * torch.randn(90, 70)
    exact = torch.linalg.svdvals(delta)
    monkeypatch.setattr(low_rank, "_DENSE", 10)
    before = torch.get_rng_state()
    B, A, sigma = low_rank.nearest(delta, 8)
    again = low_rank.nearest(delta, 8)[0]
    assert torch.equal(B, again)
    assert torch.equal(torch.get_rng_state(), before)
    assert distance(sigma, exact[:8]) < 1e-5
    error, estimate = (delta - B @ A).square().sum(), delta.square().sum() - sigma.square().sum()
    assert distance(error, estimate) < 1e-3


@pytest.mark.parametrize(
    ("form", "dtype"),
    [(form, torch.float32) for form in FORMS]
    + [(form, torch.bfloat16) for form in ("scaled-both", "scaled-none", "multiplicative-none-2")],
)
def test_every_form(tmp_path, form, dtype):
    # the tiny layers have rank 16 at most, which a LoRA of rank 16 has too
    model = adapt_tiny("llama", form, tmp_path, dtype)
    export = lora(tmp_path, r=16)
    assert export.is_exact == (form in LORA)
    assert export.error < 2e-6
    want = logits(model.float(), "llama")
    base = build("llama").to(dtype).float()
    assert distance(logits(base, "llama"), want) > 0.01
    assert distance(logits(served(tmp_path, base), "llama"), want) < 2e-5


@pytest.mark.parametrize("form", ["additive-none", "scaled-both", "multiplicative-none-2", "multiplicative-scalar-2"])
@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_every_kind_of_model(tmp_path, kind, form):
    model = adapt_tiny(kind, form, tmp_path)
    lora(tmp_path, r=16)
    assert distance(logits(served(tmp_path, build(kind)), kind), logits(model, kind)) < 2e-5


@pytest.mark.parametrize(
    ("kind", "form"),
    [("llama", form) for form in FORMS] + [("gpt2", "scaled-output"), ("gpt2", "multiplicative-output-3")],
)
def test_dora(tmp_path, kind, form):
    model = adapt_tiny(kind, form, tmp_path)
    if form not in DORA:
        with pytest.raises(ValueError, match=r"\.0\.\w+\.\w+ is no DoRA: mode '\w+'.* Those with a diagonal on"):
            dora(tmp_path)
        assert not (tmp_path / "out").exists()
        return
    dora(tmp_path)
    config, _ = exported(tmp_path)
    assert config["use_dora"]
    assert distance(logits(served(tmp_path, build(kind)), kind), logits(model, kind)) < 2e-5


@pytest.mark.parametrize(
    ("delta", "finding"), [(-1.5, "row 3 of its weight is scaled by -0.5"), (-1.0, "scaled by 0")]
)
def test_no_dora_has_magnitudes_that_are_not_positive(tmp_path, delta, finding):
    adapt_tiny("llama", "scaled-output", tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    stored = load_file(path)
    stored["base_model.model.model.layers.1.mlp.up_proj.dlor_diag.weight"][0, 3] = delta
    save_file(stored, path)
    with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.up_proj is no DoRA: .*{finding}"):
        dora(tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_layout_that_serving_engines_read(tmp_path):
    adapt_tiny("llama", "multiplicative-none-2", tmp_path, rank_pattern={"q_proj": 1})
    export = lora(tmp_path)
    config, stored = exported(tmp_path)
    # vllm/config/lora.py, MaxLoRARanks; the smallest for the rank 2 * 3
    assert config["r"] == export.rank == 8
    assert set(RANKS) <= {1, 8, 16, 32, 64, 128, 256, 320, 512}
    # vllm peft_helper.py: the required fields, and those that are refused
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert config["modules_to_save"] is None
    assert config["use_dora"] is False
    assert config["bias"] == "none"
    # vllm and sglang lora.py: one scaling, lora_alpha / r, which is 1; llama.cpp reads lora_alpha and no use_rslora
    assert config["lora_alpha"] == config["r"]
    assert config["use_rslora"] is False
    # sglang lora_config.py: rank_pattern and alpha_pattern are for engines that follow PEFT
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    # sglang lora.py asserts the type
    assert config["peft_type"] == "LORA"
    # vllm lora_model.py compares last parts with its modules, sglang utils.py get_normalized_target_modules too
    assert config["target_modules"] == sorted(TARGETS["llama"])
    assert "dlor" not in json.dumps(config).replace(str(tmp_path), "").replace("use_bdlora", "").lower()
    for key, tensor in stored.items():
        # vllm utils.py parse_fine_tuned_lora_name: base_model.model.<module>.lora_A.weight or lora_B.weight
        parts = key.split(".")
        assert parts[:2] == ["base_model", "model"]
        assert parts[-2] in ("lora_A", "lora_B")
        assert parts[-1] == "weight"
        # llama.cpp get_base_tensor_name: the name of a tensor in the base's files; every A has a B of its rank
        name = key.replace("base_model.model.", "").replace(".lora_A.weight", ".weight")
        assert name.replace(".lora_B.weight", ".weight") in Checkpoint(tmp_path / "base").specs
        assert tensor.shape[0 if "lora_A" in key else 1] == 8
        assert tensor.dtype == torch.float32
    assert len(stored) == 2 * len(export.fits)


def test_one_rank_for_all_by_zeros(tmp_path):
    model = adapt_tiny("llama", "additive-none", tmp_path, rank_pattern={"q_proj": 11})
    assert lora(tmp_path).rank == 16
    _, stored = exported(tmp_path)
    name = "base_model.model.model.layers.0.{}"
    assert not stored[name.format("self_attn.k_proj.lora_A.weight")][3:].any()
    assert not stored[name.format("self_attn.k_proj.lora_B.weight")][:, 3:].any()
    assert stored[name.format("self_attn.q_proj.lora_A.weight")][3:11].any()
    assert distance(logits(served(tmp_path, build("llama")), "llama"), logits(model, "llama")) < 1e-5


def wide(folder, form="scaled", **changes):
    """An adapter of layers of rank 40."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 40}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    return adapt(base, config_of("llama", form, **changes), folder)


def test_the_smallest_rank_within_the_error(tmp_path):
    model = wide(tmp_path)
    errors = {}
    for rank in (8, 16, 32, 64):
        errors[rank] = lora(tmp_path, r=rank, max_error=0.99).error
        W = tensors(tmp_path / "base")
        _, stored = exported(tmp_path)
        error = update = 0.0
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "delta_matrix"):
                key = f"base_model.model.{name}"
                B, A = (stored[f"{key}.lora_{x}.weight"].double() for x in "BA")
                delta = module.delta_matrix("default").double()
                assert delta.shape == W[f"{name}.weight"].shape
                error, update = error + (delta - B @ A).square().sum().item(), update + delta.square().sum().item()
        assert math.isclose(errors[rank], math.sqrt(error / update), rel_tol=1e-3, abs_tol=1e-5)
        (tmp_path / "out").rename(tmp_path / f"out-{rank}")
    assert errors[8] > errors[16] > errors[32] > 1e-3 > errors[64]
    export = lora(tmp_path, max_error=1.001 * errors[16])
    assert export.rank == 16
    assert exported(tmp_path)[0]["r"] == 16


def test_what_is_too_far_is_refused(tmp_path):
    wide(tmp_path, r=0)
    with pytest.raises(ValueError, match=r"rank 8: 0\.\d+, and at most 0\.1 is allowed; .*Raise --r, or .*dlor merge"):
        lora(tmp_path, r=8)
    assert not (tmp_path / "out").exists()
    assert lora(tmp_path).rank == 32


def test_a_product_of_a_higher_rank_is_cut_with_its_error(tmp_path):
    wide(tmp_path, "additive-none", r=12)
    export = lora(tmp_path, r=8, max_error=0.9)
    assert not export.is_exact
    assert 0.05 < export.error < 0.9
    assert "0 (exact)" not in export.table()


def test_untrained_diagonals_and_adapters(tmp_path):
    model = adapt_tiny("llama", "scaled-both", tmp_path, init_weights=True)
    export = lora(tmp_path)
    assert (export.is_exact, export.rank, export.error) == (True, 8, 0)
    assert torch.equal(logits(served(tmp_path, build("llama")), "llama"), logits(model, "llama"))


def test_the_weights_are_read_where_they_matter_only(tmp_path):
    for form, needs in (("additive-none", False), ("scaled-none", False), ("multiplicative-none-2", True)):
        folder = tmp_path / form
        adapt_tiny("llama", form, folder)
        (folder / "base" / "model.safetensors").unlink()
        if needs:
            with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
                lora(folder)
        else:
            lora(folder)
        assert (folder / "out").exists() != needs


def test_modules_that_share_their_last_name_with_others(tmp_path):
    model = adapt_tiny("llama", "additive-none", tmp_path, layers_to_transform=[1])
    lora(tmp_path)
    assert exported(tmp_path)[0]["target_modules"] == sorted(
        f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    )
    assert distance(logits(served(tmp_path, build("llama")), "llama"), logits(model, "llama")) < 1e-5


def test_names_are_those_of_the_base_s_files(tmp_path):
    config = DLoRConfig(
        r=3, diagonal="none", init_weights=False, target_modules=r".*language_model.*\.(q_proj|up_proj)"
    )
    model = adapt(llava(), config, tmp_path)
    assert not lora(tmp_path).foreign
    names = {key.removeprefix("base_model.model.").rsplit(".", 2)[0] for key in exported(tmp_path)[1]}
    assert names == {f"language_model.model.layers.0.{part}" for part in ("mlp.up_proj", "self_attn.q_proj")}
    assert {f"{name}.weight" for name in names} <= Checkpoint(tmp_path / "base").specs.keys()
    assert distance(logits(served(tmp_path, llava()), "llama"), logits(model, "llama")) < 1e-5
    # without the files, the names are those in the model, which PEFT reads as well
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "out").rename(tmp_path / "before")
    assert "may not know model.language_model.layers.0.self_attn.q_proj and 1 more" in lora(tmp_path).caveats()[0]
    assert distance(logits(served(tmp_path, llava()), "llama"), logits(model, "llama")) < 1e-5


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"modules_to_save": ["lm_head"]}, r"lm_head\.weight in full"),
        ({"trainable_token_indices": [3]}, r"trained tokens of model\.embed_tokens"),
        ({"bias": "dlor_only"}, r"layers\.0\.self_attn\.q_proj\.bias in full"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"model\.embed_tokens \(Embedding\)"),
    ],
)
def test_more_than_a_lora_is_refused(tmp_path, changes, finding):
    adapt_tiny("llama", "scaled-none", tmp_path, **changes)
    if "bias" in changes:
        path = tmp_path / "adapter" / "adapter_model.safetensors"
        save_file({key: tensor + ("bias" in key) for key, tensor in load_file(path).items()}, path)
    for export in (lora, dora):
        with pytest.raises(ValueError, match=rf"more than a LoRA of linear layers can hold: .*{finding}.*dlor merge"):
            export(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "base"]


def test_experts_are_refused(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    base = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4))
    config = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    adapt(base, DLoRConfig(r=2, diagonal="none", **config), tmp_path)
    with pytest.raises(ValueError, match=r"experts \(MixtralExperts\)"):
        lora(tmp_path)


def test_an_output_layer_that_is_tied(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)).eval()
    model = adapt(base, config_of("llama", "multiplicative-none-2", target_modules=["lm_head", "q_proj"]), tmp_path)
    assert lora(tmp_path).caveats() == ["llama.cpp does not read it: lm_head has no weight of its own in the base"]
    again = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert distance(logits(served(tmp_path, again), "llama"), logits(model, "llama")) < 1e-5


def test_an_output_layer_whose_weight_is_saved_along(tmp_path):
    model = adapt_tiny("llama", "scaled-none", tmp_path, target_modules=["q_proj", "lm_head"])
    assert "lm_head.base_layer.weight" in read_adapter(tmp_path / "adapter").others
    lora(tmp_path)
    assert distance(logits(served(tmp_path, build("llama")), "llama"), logits(model, "llama")) < 1e-5


def test_the_command(tmp_path, capsys):
    adapt_tiny("llama", "multiplicative-none-2", tmp_path)
    command = ["export", "--adapter", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]
    assert main([*command, "--to", "lora", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj multiplicative input diagonal none 6 0 (exact)" in " ".join(out.split())
    assert f"vllm serve {tmp_path / 'base'} --enable-lora --max-lora-rank 8 --lora-modules adapter=" in out
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"exported from the DLoR adapter {tmp_path / 'adapter'}. It has rank 8 and is the same update." in card
    assert main([*command, "--to", "dora", "--out", str(tmp_path / "dora")]) == 0
    assert "a DoRA of rank 6 on 8 layers, the same update" in capsys.readouterr().out
    for wrong, finding in (
        (["--to", "lora", "--out", str(tmp_path / "out")], "is there already"),
        (["--to", "lora", "--r", "12", "--out", str(tmp_path / "new")], "r=12 is none of 8, 16, 32"),
        (["--to", "lora", "--max-error", "1.5", "--out", str(tmp_path / "new")], "max_error=1.5 must be"),
        (["--to", "dora", "--r", "8", "--out", str(tmp_path / "new")], "--r and --max-error are for --to lora"),
    ):
        assert main([*command, *wrong]) == 2
        assert finding in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
