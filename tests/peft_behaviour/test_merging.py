"""Merging writes W', unmerging restores every bit, whatever happened in between."""

import pytest
import torch
from tiny_models import FEW_FORMS, FORMS, adapted, add, base_weights, build, distance, inputs, layers, logits

merging_again = pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_same_bits(model, before):
    after = base_weights(model)
    assert set(after) == set(before)
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype
        assert torch.equal(after[name], weight), name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("form", FORMS)
def test_merged_is_the_same_model_and_unmerge_restores_it(kind, form):
    model = adapted(kind, form)
    base = logits(build(kind), kind)
    before, want = base_weights(model), logits(model, kind)
    assert distance(want, base) > 1e-3
    model.merge_adapter()
    assert distance(logits(model, kind), want) < 1e-5
    model.unmerge_adapter()
    assert_same_bits(model, before)
    assert distance(logits(model, kind), want) == 0


@merging_again
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FEW_FORMS)
def test_unmerge_restores_every_bit_after_two_merges(form, dtype):
    model = adapted("gpt2", form)
    add(model, "second", "gpt2", "multiplicative-input-3")
    model.base_model.to(dtype)
    before = base_weights(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    assert any(not torch.equal(weight, before[name]) for name, weight in base_weights(model).items())
    model.unmerge_adapter()
    assert_same_bits(model, before)
    assert not any(layer.merged for layer in layers(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_unmerge_after_a_cast_is_the_cast_base(dtype):
    model = adapted("llama", "scaled-both")
    want = {name: weight.to(dtype) for name, weight in base_weights(model).items()}
    model.merge_adapter()
    model.to(dtype)
    model.unmerge_adapter()
    assert_same_bits(model, want)


def test_merge_returns_to_the_storage_dtype_and_layout():
    for kind in ("llama", "gpt2"):
        model = adapted(kind).to(torch.bfloat16)
        shapes = {name: weight.shape for name, weight in base_weights(model).items()}
        model.merge_adapter()
        for name, layer in layers(model).items():
            weight = layer.get_base_layer().weight
            assert weight.dtype == torch.bfloat16
            assert weight.shape == shapes[name]
            assert weight.is_contiguous()
            assert not weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_merge_rounds_once(form, dtype):
    """The merged half-precision weight is the exact W' rounded, within the last bit."""
    exact, half = adapted("llama", form), adapted("llama", form)
    half.to(dtype)
    for (name, parameter), (_, rounded) in zip(exact.named_parameters(), half.named_parameters(), strict=True):
        assert rounded.dtype == dtype, name
        parameter.data = rounded.data.double()
    exact.merge_adapter()
    half.merge_adapter()
    for want, got in zip(base_weights(exact).values(), base_weights(half).values(), strict=True):
        step = torch.finfo(dtype).eps * want.abs().clamp_min(torch.finfo(dtype).tiny)
        assert ((got.double() - want).abs() <= 0.51 * step + 1e-6).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["additive", "scaled-both", "multiplicative-output-3"])
def test_safe_merge_leaves_the_weights_alone(form, value):
    model = adapted("llama", form)
    before, unmerged = base_weights(model), layers(model)
    # the layers before it are not merged either
    list(unmerged.values())[-1].dlor_U["default"].weight.data[0, 0, 0] = value
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        model.merge_adapter(safe_merge=True)
    assert_same_bits(model, before)
    assert not any(layer.merged for layer in layers(model).values())
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert_same_bits(model, before)
    assert layers(model) == unmerged


def test_safe_merge_catches_an_overflow_of_the_storage_dtype():
    model = adapted("llama", "additive").to(torch.float16)
    layer = next(iter(layers(model).values()))
    before = layer.get_base_layer().weight.clone()
    layer.dlor_diag["default"].weight.data = torch.full_like(layer.dlor_diag["default"].weight, 60000.0).float() * 10
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_merge_and_unload_gives_back_plain_layers(kind):
    model = adapted(kind, "scaled-both")
    want = logits(model, kind)
    plain = model.merge_and_unload()
    assert not layers(plain)
    assert type(plain) is type(build(kind))
    assert list(plain.state_dict()) == list(build(kind).state_dict())
    assert distance(logits(plain, kind), want) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_unload_gives_back_the_base(kind):
    plain = adapted(kind, "multiplicative").unload()
    assert not layers(plain)
    for name, value in build(kind).state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning")
def test_disabling_or_switching_while_merged_unmerges():
    model = adapted("llama", "scaled-output")
    add(model, "second", "llama", "multiplicative-input-3")
    base, first = logits(build("llama"), "llama"), logits(model, "llama")
    model.merge_adapter()
    with model.disable_adapter():
        assert distance(logits(model, "llama"), base) == 0
    assert distance(logits(model, "llama"), first) == 0
    model.merge_adapter()
    model.set_adapter("second")
    second = logits(model, "llama")
    assert distance(second, first) > 1e-3
    model.merge_adapter()
    assert distance(logits(model, "llama"), second) < 1e-5


def test_merging_and_unmerging_twice_warns_and_does_nothing():
    model = adapted("llama")
    before = base_weights(model)
    model.merge_adapter()
    merged = base_weights(model)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert_same_bits(model, merged)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert_same_bits(model, before)


def test_merged_state_is_trained_on_nothing():
    """The merged model runs backward into its inputs without reaching the adapter."""
    model = adapted("llama")
    model.merge_adapter()
    embeddings = model.get_input_embeddings()(inputs("llama")["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_merged_adapter_cannot_be_deleted():
    model = adapted("llama")
    add(model, "second", "llama", "additive")
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
