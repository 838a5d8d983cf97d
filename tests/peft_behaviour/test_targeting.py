"""Which modules are adapted, with which rank and depth, and what is trained besides."""

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import inspect_matched_modules
from tiny_models import adapted, adapter_parameters, add, build, config_of, inputs, layers
from transformers import MambaConfig, MambaForCausalLM

from dlor_peft import DLoRConfig


def names(model) -> set[str]:
    return {name.removeprefix("base_model.model.") for name in layers(model)}


def suffixes(model) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names(model)}


def on_llama(**config):
    return get_peft_model(build("llama"), DLoRConfig(**{"target_modules": ["q_proj"], **config}))


@pytest.mark.parametrize(
    ("kind", "want"),
    [("llama", {"q_proj", "v_proj"}), ("gpt2", {"c_attn"}), ("bert", {"query", "value"}), ("t5", {"q", "v"})],
)
def test_default_targets(kind, want):
    assert suffixes(get_peft_model(build(kind), DLoRConfig())) == want


def test_no_default_for_an_unknown_architecture():
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), DLoRConfig())


def test_lists_and_patterns():
    assert suffixes(on_llama(target_modules=["k_proj", "down_proj"])) == {"k_proj", "down_proj"}
    assert names(on_llama(target_modules=r".*layers\.1\.mlp\.(up|gate)_proj")) == {
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.gate_proj",
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_all_linear_spares_the_output_layer_also_the_second_time(kind):
    model = get_peft_model(
        build(kind), DLoRConfig(target_modules="all-linear", task_type="SEQ_CLS" if kind == "bert" else None)
    )
    first = names(model)
    assert len(first) >= 8
    assert not first & {"lm_head", "classifier"}
    model.add_adapter("second", DLoRConfig(target_modules="all-linear", mode="additive"))
    assert names(model) == first
    for layer in layers(model).values():
        assert set(layer.form) == {"default", "second"}


def test_exclude_modules():
    assert suffixes(on_llama(target_modules="all-linear", exclude_modules=["q_proj", "mlp.up_proj"])) == {
        "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj",
    }  # fmt: skip
    assert names(on_llama(exclude_modules=r".*layers\.0\..*")) == {"model.layers.1.self_attn.q_proj"}


def test_layers_to_transform():
    assert names(on_llama(layers_to_transform=[1])) == {"model.layers.1.self_attn.q_proj"}
    assert names(on_llama(layers_to_transform=0, layers_pattern="layers")) == {"model.layers.0.self_attn.q_proj"}
    gpt2 = get_peft_model(
        build("gpt2"), DLoRConfig(target_modules=["c_attn"], layers_to_transform=1, layers_pattern=["h"])
    )
    assert names(gpt2) == {"transformer.h.1.attn.c_attn"}


@pytest.mark.parametrize("config", [{"target_modules": ["nothing"]}, {"layers_to_transform": [7]}])
def test_a_target_that_matches_nothing_is_refused(config):
    with pytest.raises(ValueError, match="target"):
        on_llama(**config)


def test_rank_and_depth_pattern():
    model = on_llama(
        target_modules=["q_proj", "v_proj", "up_proj"],
        mode="multiplicative",
        r=4,
        depth=2,
        rank_pattern={"q_proj": 1, r".*layers\.1.*v_proj": 7, "layers.0.mlp.up_proj": 0},
        depth_pattern={"v_proj": 3, "model.layers.0.self_attn.q_proj": 1},
    )
    got = {name: (layer.form["default"].r, layer.form["default"].depth) for name, layer in layers(model).items()}
    assert {name.removeprefix("base_model.model.model.layers."): value for name, value in got.items()} == {
        "0.self_attn.q_proj": (1, 1),
        "0.self_attn.v_proj": (4, 3),
        "0.mlp.up_proj": (0, 2),
        "1.self_attn.q_proj": (1, 2),
        "1.self_attn.v_proj": (7, 3),
        "1.mlp.up_proj": (4, 2),
    }
    for name, layer in layers(model).items():
        r, depth = got[name]
        assert layer.r["default"] == r
        assert layer.dlor_diag["default"].weight.shape[0] == depth
        assert ("default" in layer.dlor_U) == ("default" in layer.dlor_V) == (r > 0)
        if r:
            assert layer.dlor_U["default"].weight.shape[::2] == (depth, r)


def test_shapes_are_those_of_the_design():
    layer = layers(on_llama(target_modules=["up_proj"], mode="scaled", side="both"))[
        "base_model.model.model.layers.0.mlp.up_proj"
    ]
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters() if "dlor_" in name}
    assert shapes == {
        "dlor_diag.default.weight": (1, 24),
        "dlor_diag_in.default.weight": (1, 16),
        "dlor_U.default.weight": (1, 24, 8),
        "dlor_V.default.weight": (1, 16, 8),
    }


@pytest.mark.parametrize(("target", "kind"), [("act_fn", "SiLUActivation"), ("input_layernorm", "LlamaRMSNorm")])
def test_a_layer_that_cannot_be_adapted_is_refused_by_name(target, kind):
    with pytest.raises(ValueError, match=f"a {kind} is not adapted.*exclude_modules.*{target}'"):
        on_llama(target_modules=["q_proj", target])


def test_mamba_layers_that_its_kernels_read_directly_are_refused():
    """The fused kernels take out_proj.weight and never call the layer: an adapter there would be ignored."""
    config = MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        get_peft_model(MambaForCausalLM(config), DLoRConfig(target_modules=["out_proj"]))


@pytest.mark.parametrize("pattern", ["rank_pattern", "depth_pattern"])
def test_a_pattern_that_matches_nothing_is_told(pattern):
    config = DLoRConfig(mode="multiplicative", target_modules=["0"], **{pattern: {"q": 2}})
    with pytest.warns(Warning, match=f"{pattern} keys did not match any.*'q'"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 4)), config)


def test_fan_in_fan_out_on_a_linear_warns_and_is_overruled():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4))
    with pytest.warns(UserWarning, match="fan_in_fan_out=True does not hold for '0', a Linear"):
        model = get_peft_model(net, DLoRConfig(target_modules=["0"], fan_in_fan_out=True, init_weights=False))
    x = torch.randn(2, 3)
    want = model(x)
    model.merge_adapter()
    assert torch.allclose(model(x), want, atol=1e-5)


def test_modules_to_save_train_in_full():
    model = adapted("bert", modules_to_save=["classifier"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "dlor_" not in name}
    assert trained == {f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")}


def test_trainable_tokens():
    model = adapted("llama", trainable_token_indices=[5, 7])
    model(**inputs("llama")).logits.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "dlor_" not in name}
    assert len(trained) == 1
    assert "trainable_tokens_delta" in trained.pop()


@pytest.mark.parametrize("bias", ["all", "dlor_only"])
def test_biases(bias):
    model = adapted("bert", bias=bias, target_modules=["query"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "dlor_" not in name}
    every = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert trained == {name for name in every if bias == "all" or "query.base_layer.bias" in name}
    with pytest.warns(UserWarning, match="Careful, disabling adapter layers with bias"):
        model.base_model.disable_adapter_layers()


def test_inspection_and_counts():
    model = adapted("llama", "scaled-input", target_modules=["q_proj"])
    assert set(inspect_matched_modules(model.base_model)["matched"]) == names(model)
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in adapter_parameters(model).values()) == 2 * (16 + 2 * 3 * 16)
    assert total == trainable + sum(p.numel() for p in build("llama").parameters())


def test_repr_names_the_method():
    model = adapted("llama")
    add(model, "second", "llama", "additive")
    assert all(repr(layer).startswith("dlor.Linear") for layer in layers(model).values())


def test_plain_modules_and_a_lone_linear():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    x = torch.randn(5, 3)
    want = net(x)
    model = get_peft_model(net, config_of("llama", "scaled-both", target_modules=["0", "2"], init_weights=True))
    assert torch.allclose(model(x), want, atol=1e-6)
