"""mode_pattern and side_pattern: one adapter of several forms."""

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft import set_peft_model_state_dict as set_state_dict
from swapping import assert_refused_without_a_trace, saved, swap
from tiny_models import (
    adapted,
    adapter_parameters,
    add,
    base_weights,
    build,
    config_of,
    dense,
    distance,
    inputs,
    layers,
    logits,
)

from dlor_peft import DLoRConfig

MIXED = {
    "mode_pattern": {"q_proj": "additive", r".*layers\.1\.mlp\.up_proj|.*\.k_proj": "multiplicative"},
    "side_pattern": {"layers.0.mlp.up_proj": "both", r"layers\.1\..*k_proj": "output", "down_proj": "input"},
    "rank_pattern": {"k_proj": 1},
    "depth_pattern": {r".*k_proj": 2},
}
WANT = {
    "0.self_attn.q_proj": ("additive", None),
    "1.self_attn.q_proj": ("additive", None),
    "0.self_attn.k_proj": ("multiplicative", "output"),
    "1.self_attn.k_proj": ("multiplicative", "output"),
    "0.mlp.up_proj": ("scaled", "both"),
    "1.mlp.up_proj": ("multiplicative", "input"),
    "0.mlp.down_proj": ("scaled", "input"),
    "1.mlp.down_proj": ("scaled", "input"),
}
ONE_SIDED = {**MIXED, "side_pattern": {"down_proj": "input"}}


def mixed(seed=2, **changes):
    model = build("llama")
    torch.manual_seed(seed)
    return get_peft_model(model, config_of("llama", **{**MIXED, **changes})).eval()


def short(name):
    return name.partition("model.layers.")[2]


def forms(model, adapter="default"):
    return {short(name): (layer.form[adapter].mode, layer.form[adapter].side) for name, layer in layers(model).items()}


def test_each_layer_has_its_form():
    model = mixed()
    assert forms(model) == WANT
    before = base_weights(model)
    for name, layer in layers(model).items():
        form = layer.form["default"]
        assert (form.r, form.depth) == ((1, 2) if "k_proj" in name else (3, 1))
        want = dense(layer, "default", before[name], form.mode, form.side or "auto")
        assert distance(layer.adapted_weight(), want) < 1e-5


def test_forward_is_that_of_the_merged_weights():
    model = mixed()
    want = logits(model, "llama")
    assert distance(logits(build("llama"), "llama"), want) > 1e-2
    model.merge_adapter()
    assert distance(logits(model, "llama"), want) < 1e-5


def test_it_starts_as_the_identity_and_trains():
    model = mixed(init_weights=True)
    assert distance(logits(model, "llama"), logits(build("llama"), "llama")) < 1e-6
    model.train()(**inputs("llama")).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter_parameters(model).values())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_from_pretrained(low_cpu_mem_usage, tmp_path):
    model = mixed()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert forms(loaded) == WANT
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters, an inconsistency:RuntimeWarning")
def test_injection_by_tensors_of_other_ranks():
    model = mixed(rank_pattern={"up_proj": 5, "q_proj": 0})
    tensors = {key.removeprefix("base_model.model."): t for key, t in get_peft_model_state_dict(model).items()}
    config = config_of("llama", **MIXED)
    injected = inject_adapter_in_model(config, build("llama"), state_dict=tensors)
    assert not set_state_dict(injected, tensors).unexpected_keys
    assert forms(injected) == WANT
    assert torch.equal(logits(injected.eval(), "llama"), logits(model, "llama"))
    again = get_peft_model(build("llama"), config).eval()
    set_state_dict(again, get_peft_model_state_dict(model))
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


@pytest.mark.parametrize("pattern", ["mode_pattern", "side_pattern"])
def test_a_pattern_that_matches_nothing_is_told(pattern):
    value = {"mode_pattern": "additive", "side_pattern": "input"}[pattern]
    config = DLoRConfig(target_modules=["0"], **{pattern: {"q": value}})
    with pytest.warns(RuntimeWarning, match=f"{pattern} keys did not match any.*'q'"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 4)), config)


REFUSED = {
    "depth": (
        {"mode": "multiplicative", "depth": 2, "mode_pattern": {"1.mlp.up_proj": "scaled"}},
        r'depth=2 needs mode="multiplicative", but mode is .scaled.*give the layer .*layers\.1\.mlp\.up_proj',
    ),
    "side": ({"side": "both", "mode_pattern": {"q_proj": "multiplicative"}}, r'side="both" needs.*layers\.0.*q_proj'),
    "no side": ({"side": "input", "mode_pattern": {"q_proj": "additive"}}, r"no meaning in mode.*q_proj.*name it in"),
    "none": (
        {"diagonal": "none", "mode_pattern": {"q_proj": "multiplicative"}, "side_pattern": {"k_proj": "input"}},
        r'no meaning in mode "scaled" with diagonal="none".*k_proj',
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_layer_whose_values_have_no_meaning_together_is_named(what):
    changes, match = REFUSED[what]
    model = build("llama")
    with pytest.raises(ValueError, match=match):
        get_peft_model(model, config_of("llama", **changes))
    assert not layers(model)


def test_hotswap(tmp_path):
    model, other = mixed(5), mixed(6, r=4)
    swap(model, saved(other, tmp_path / "other"))
    assert torch.equal(logits(model, "llama"), logits(other, "llama"))
    again = PeftModel.from_pretrained(build("llama"), saved(model, tmp_path / "again"))
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


def test_hotswap_of_the_same_forms_by_other_patterns(tmp_path):
    targets = {"target_modules": ["q_proj", "up_proj"], "depth_pattern": {}, "rank_pattern": {}}
    one = mixed(5, **targets, mode="scaled", mode_pattern={"q_proj": "additive"}, side_pattern={"up_proj": "input"})
    other = mixed(6, **targets, mode="additive", mode_pattern={"up_proj": "scaled"}, side_pattern={})
    swap(one, saved(other, tmp_path))
    assert torch.equal(logits(one, "llama"), logits(other, "llama"))


def test_hotswap_of_other_forms_is_refused(tmp_path):
    other = mixed(6, mode_pattern={**MIXED["mode_pattern"], "layers.1.self_attn.q_proj": "scaled", "q_proj": "scaled"})
    match = "mode='additive'.*mode='scaled'"
    assert_refused_without_a_trace(ValueError, match, mixed(5), saved(other, tmp_path))


def sums(model, kind, weights=(0.7, -0.4), **changes):
    model.add_weighted_adapter(["default", "second"], list(weights), "sum", combination_type=kind, **changes)
    for layer in layers(model).values():
        want = sum(w * layer.delta_matrix(n) for n, w in zip(["default", "second"], weights, strict=True))
        yield distance(layer.delta_matrix("sum"), want)


@pytest.mark.parametrize(("kind", "changes"), [("cat", {}), ("svd", {"svd_rank": 48})])
def test_the_sum_of_two_with_the_same_patterns_keeps_them(kind, changes, tmp_path):
    model = mixed(**ONE_SIDED)
    add(model, "second", "llama", "scaled", **ONE_SIDED)
    assert max(sums(model, kind, **changes)) < 1e-5
    assert forms(model, "sum") == forms(model)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "sum")
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


def test_the_sum_with_other_patterns_is_dense():
    model = mixed()
    add(model, "second", "llama", "scaled", mode_pattern={"up_proj": "additive"})
    assert max(sums(model, "svd", svd_rank=48)) < 1e-5
    assert set(forms(model, "sum").values()) == {("additive", None)}
    assert not model.peft_config["sum"].mode_pattern


def test_both_sides_on_one_layer_cannot_be_joined_exactly():
    model = mixed()
    add(model, "second", "llama", "scaled", **MIXED)
    with pytest.raises(ValueError, match='"cat" needs adapters of one mode and one side other than "both"'):
        model.add_weighted_adapter(["default", "second"], [1, 1], "sum", combination_type="cat")
    assert max(sums(model, "svd", svd_rank=48)) < 1e-5


def test_tied_layers_share_a_form():
    model = build("llama", tie_word_embeddings=True)
    config = config_of(
        "llama", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True, side="output",
        mode_pattern={"embed_tokens": "multiplicative"},
    )  # fmt: skip
    adapted_layers = layers(get_peft_model(model, config))
    got = {name.rpartition(".")[2]: layer.form["default"].mode for name, layer in adapted_layers.items()}
    assert got == {"embed_tokens": "multiplicative", "lm_head": "multiplicative", "q_proj": "scaled"}


def test_parameters_and_attention_are_named_as_for_ranks(tmp_path):
    torch.manual_seed(0)

    def model(seed):
        torch.manual_seed(0)
        net = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        torch.manual_seed(seed)
        config = DLoRConfig(
            target_modules=["self_attn"], target_parameters=["linear1.weight", "linear2.weight"], init_weights=False,
            mode_pattern={"self_attn": "multiplicative", "linear2.weight": "additive"},
        )  # fmt: skip
        return get_peft_model(net, config).eval()

    one, other = model(1), model(2)
    modes = {name.removeprefix("base_model.model."): layer.form["default"].mode for name, layer in layers(one).items()}
    assert modes == {
        "self_attn": "multiplicative",
        "self_attn.base_layer.out_proj": "multiplicative",
        "linear1": "scaled",
        "linear2": "additive",
    }
    swap(one, saved(other, tmp_path))
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(one(x), other(x))


def test_adapted_alone_is_as_without_patterns():
    assert torch.equal(logits(mixed(**{field: {} for field in MIXED}), "llama"), logits(adapted("llama"), "llama"))
