"""Layers without a dense weight."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn.utils import prune
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from dlor_peft.nn import DIAGONALS, DLoRLinear, replace_linear_layers

SHAPES = [(7, 7), (5, 9), (9, 5), (1, 6), (6, 1), (1, 1)]
SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1))


def factors_of(layer):
    """Every factor written out, the one that meets the data first in front."""
    I, O = layer.in_features, layer.out_features
    square = []
    for k in range(layer.num_square):
        d = torch.ones(max(I, O)) if layer.delta is None else (1 + layer.delta[k]).expand(max(I, O))
        square.append(torch.diag(d.to(layer.U)) + layer.U[k] @ layer.V[k].T)
    if I == O:
        return square
    end = layer.end_U @ layer.end_V.T
    for i in range(min(I, O)):
        d = 1 if layer.end_delta is None else 1 + layer.end_delta.expand(min(I, O))[i]
        unit = torch.zeros_like(end)
        unit[i, i] = 1
        end = end + d * unit
    return [end, *square] if I < O else [*square, end]


def reference(layer, x):
    for factor in factors_of(layer):
        x = x @ factor.T
    return x if layer.bias is None else x + layer.bias


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize(("I", "O"), SHAPES)
def test_the_product_of_the_factors_and_every_gradient(I, O, diagonal, depth):
    torch.manual_seed(0)
    layer = DLoRLinear(I, O, 3, depth, diagonal, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    inputs = [torch.randn(2, 5, I, dtype=torch.float64, requires_grad=True), *layer.parameters()]
    got, want = layer(inputs[0]), reference(layer, inputs[0])
    torch.testing.assert_close(got, want)
    probe = torch.randn_like(want)
    for one, other in zip(
        torch.autograd.grad(got, inputs, probe), torch.autograd.grad(want, inputs, probe), strict=True
    ):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(inputs[0] @ layer.to_dense().T + layer.bias, want)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("I", "O"), [(64, 64), (63, 100), (100, 63)])
def test_other_dtypes_and_autocast(I, O, dtype, tolerance):
    torch.manual_seed(0)
    layer = DLoRLinear(I, O, 8, 3, dtype=torch.float64)
    x = torch.randn(17, I, dtype=torch.float64)
    want = reference(layer, x)
    got = layer.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert (got - want).norm() <= tolerance * want.norm()
    with torch.autocast("cpu", torch.bfloat16):
        got = layer.float()(x.float())
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() <= 2e-2 * want.norm()


def test_autocast_leaves_float64_alone():
    torch.manual_seed(0)
    layer = DLoRLinear(7, 9, 3, 2, dtype=torch.float64)
    x = torch.randn(4, 7, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    torch.testing.assert_close(got, reference(layer, x))


def test_integers_are_no_features():
    with pytest.raises(TypeError, match=r"floating-point numbers, not torch\.int64"):
        DLoRLinear(4, 4, 2)(torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("diagonal", ["vector", "scalar"])
@pytest.mark.parametrize(("I", "O", "r"), [(256, 256, 1), (256, 256, 8), (96, 256, 4), (256, 96, 4)])
def test_the_start_keeps_the_size_of_signal_and_gradient(I, O, r, diagonal, depth):
    torch.manual_seed(0)
    sizes, gradients = [], []
    for _ in range(40):
        layer = DLoRLinear(I, O, r, depth, diagonal, bias=False)
        x = torch.randn(64, I, requires_grad=True)
        y = layer(x)
        y.backward(torch.randn_like(y))
        sizes.append(y.square().mean().item())
        gradients.append(x.grad.square().mean().item())
    assert math.fsum(sizes) / 40 == pytest.approx(1, rel=0.2)
    assert math.fsum(gradients) / 40 == pytest.approx(O / I, rel=0.25)


@pytest.mark.parametrize("depth", [1, 4, 16])
def test_without_a_trained_diagonal_the_signal_grows_by_the_root_of_e_at_most(depth):
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    sizes = [DLoRLinear(256, 256, 8, depth, "none", bias=False)(x).square().mean().item() for _ in range(40)]
    assert 1.2 < math.fsum(sizes) / 40 < 1.05 * math.exp(0.5)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 9), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_a_dense_layer_is_factorised_exactly(I, O, r, rank, seed):
    pytest.importorskip("scipy")
    torch.manual_seed(seed)
    dense = nn.Linear(I, O, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(torch.randn(O, rank, dtype=torch.float64) @ torch.randn(rank, I, dtype=torch.float64))
    layer = DLoRLinear.from_dense(dense, r)
    scale = 1 + dense.weight.norm()
    assert (layer.to_dense() - dense.weight).norm() <= 1e-10 * scale
    x = torch.randn(4, I, dtype=torch.float64)
    assert (layer(x) - dense(x)).norm() <= 1e-10 * scale * (1 + x.norm())
    full = torch.eye(O, I, dtype=torch.float64)
    assert layer.depth == max(1, math.ceil(torch.linalg.matrix_rank(dense.weight - full).item() / r))


def test_a_float32_layer_stays_one():
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    dense = nn.Linear(40, 24, bias=False)
    layer = DLoRLinear.from_dense(dense, 4)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
    assert layer.bias is None
    x = torch.randn(8, 40)
    assert (layer(x) - dense(x)).norm() <= 1e-5 * dense(x).norm() + 1e-5


def test_what_float32_rounds_of_a_low_rank_is_no_rank():
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    dense = nn.Linear(300, 300, bias=False)
    with torch.no_grad():
        dense.weight.copy_(torch.eye(300) + torch.randn(300, 12) @ torch.randn(12, 300))
    layer = DLoRLinear.from_dense(dense, 4)
    assert layer.depth == 3
    assert (layer.to_dense() - dense.weight).norm() <= 1e-5 * dense.weight.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_half_precision_is_not_factorised(dtype):
    with pytest.raises(TypeError, match=f"takes a layer in float64 or float32, not {dtype}"):
        DLoRLinear.from_dense(nn.Linear(256, 256, dtype=dtype), 8)


@pytest.mark.parametrize(
    ("dtype", "std", "c"), [(torch.float32, 1e3, 2e4), (torch.float64, 1e8, 2e9), (torch.float64, 1e-8, 2e-7)]
)
def test_a_c_of_the_size_of_the_weight_gives_it_exactly(dtype, std, c):
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    dense = nn.Linear(128, 128, dtype=dtype)
    nn.init.normal_(dense.weight, 0, std)
    layer = DLoRLinear.from_dense(dense, 8, c)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    assert (layer.to_dense() - dense.weight).norm() <= tolerance * dense.weight.norm()


@pytest.mark.parametrize("std", [1e-5, 1e4])
def test_a_c_far_from_the_size_of_the_weight_is_told(std):
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    dense = nn.Linear(128, 128)
    nn.init.normal_(dense.weight, 0, std)
    with pytest.raises(ValueError, match=r"c = 1.0 gives the weight to a relative error of .* only, since c is far"):
        DLoRLinear.from_dense(dense, 8)


def test_a_weight_of_zeros_is_factorised():
    pytest.importorskip("scipy")
    dense = nn.Linear(12, 20)
    nn.init.zeros_(dense.weight)
    assert DLoRLinear.from_dense(dense, 8).to_dense().abs().max() <= 1e-6


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_weight_that_is_not_finite_is_not_factorised(value):
    pytest.importorskip("scipy")
    dense = nn.Linear(4, 4)
    with torch.no_grad():
        dense.weight[1, 2] = value
    with pytest.raises(ValueError, match="A has entries that are not finite"):
        DLoRLinear.from_dense(dense, 2)
    with pytest.raises(ValueError, match="pass a finite number"):
        DLoRLinear.from_dense(nn.Linear(4, 4), 2, value)


def test_only_a_linear_layer_with_values_is_factorised():
    with pytest.raises(TypeError, match=r"takes an nn\.Linear, not Conv1D"):
        DLoRLinear.from_dense(Conv1D(4, 4), 2)
    with pytest.raises(ValueError, match="on the meta device"):
        DLoRLinear.from_dense(nn.Linear(4, 4, device="meta"), 2)


def test_a_language_model_without_dense_projections_learns_and_is_saved(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    names = replace_linear_layers(model, r=2, depth=2)
    assert len(names) == 2 * 7 + 1
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    ids = torch.randint(61, (4, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    save_model(model, tmp_path / "model.safetensors")
    other = LlamaForCausalLM(LlamaConfig(**SMALL))
    replace_linear_layers(other, r=2, depth=2)
    load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)


def test_experts_that_are_named_stay():
    model = mixtral()
    names = replace_linear_layers(model, r=2, exclude=["gate_up_proj", "down_proj"])
    assert len(names) == 2 * 4 + 1
    assert model(input_ids=torch.randint(61, (1, 5))).logits.isfinite().all()


def test_layers_of_gpt2_are_transposed():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=24, n_layer=1, n_head=2))
    names = replace_linear_layers(model, r=2, exclude=["lm_head"])
    assert names == [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (24, 72)
    assert model(input_ids=torch.randint(61, (1, 5))).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_an_error_at_the_last_layer_leaves_the_first():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0))
    with pytest.raises(ValueError, match="out_features = 0"):
        replace_linear_layers(model, r=2)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


def test_a_layer_in_two_places_stays_one_layer():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(4, 4))
    assert replace_linear_layers(model, r=2, exclude=["2"]) == ["3"]
    assert model[0] is model[2] is layer
    assert replace_linear_layers(model, r=2) == ["0", "2"]
    assert isinstance(model[0], DLoRLinear)
    assert model[0] is model[2]


def tied_bias():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    return model


def adapted():
    return get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize(
    ("build", "exclude", "message"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=24, n_layer=1, n_head=2)), (), "lm_head shares its"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), ["nope"], "exclude names no linear layer: 'nope'. The model has 0."),
        (lambda: nn.Sequential(nn.Linear(2, 2)), ["0"], "has no linear layer to replace"),
        (
            mixtral,
            (),
            "gate_up_proj stacks the weights of several projections, which are no linear layers. Keep",
        ),
        (lambda: nn.MultiheadAttention(4, 2), (), "in_proj_weight stacks the weights"),
        (lambda: nn.MultiheadAttention(4, 2), ["in_proj_weight"], "out_proj is a NonDynamicallyQuantizableLinear"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)), (), "weight_ih_l0 stacks the weights"),
        (tied_bias, (), "0 shares its bias with another module"),
        (adapted, (), "base_model.model.0 has an adapter"),
        (lambda: nn.Linear(4, 4), (), "the model is a linear layer itself"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), prune.identity(nn.Linear(4, 4), "weight")),
            (),
            "the weight of 1 is computed from other parameters",
        ),
    ],
)
def test_what_cannot_be_replaced_is_named_and_nothing_is(build, exclude, message):
    model = build()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        replace_linear_layers(model, r=2, exclude=exclude)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r = 0; it must be at least 1"),
        ({"r": 1, "depth": 0}, "depth = 0; it must be at least 1"),
        ({"r": 1, "diagonal": "full"}, "diagonal 'full' is none of 'vector', 'scalar', 'none'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DLoRLinear(4, 4, **arguments)


@pytest.mark.parametrize("r", [True, 2.0, "2"])
def test_a_rank_that_is_no_whole_number(r):
    with pytest.raises(TypeError, match=f"r = {r!r}; it must be a whole number"):
        DLoRLinear(4, 4, r)


def test_a_string_is_no_list_of_names():
    with pytest.raises(TypeError, match=r"exclude is the string 'lm_head'; give a list, exclude=\['lm_head'\]"):
        replace_linear_layers(nn.Sequential(nn.Linear(2, 2)), r=2, exclude="lm_head")


def test_t5_reads_the_weight_of_a_layer():
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=61,
            d_model=24,
            d_kv=8,
            d_ff=40,
            num_layers=1,
            num_heads=3,
            decoder_start_token_id=0,
        )
    )
    replace_linear_layers(model, r=2, exclude=["lm_head"])
    ids = torch.randint(61, (1, 5))
    assert model(input_ids=ids, labels=ids).loss.isfinite()
