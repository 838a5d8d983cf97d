"""What one adapted layer keeps for its backward pass: the input and x V, however many factors are stacked."""

import pytest
import torch
from tiny_models import FORMS, adapted, layers

TOKENS = 64


def saved(form, target, **changes):
    """Distinct storages that hold something for each token, as their widths, and the total of all other elements."""
    model = adapted("llama", form, target_modules=[target], **changes)
    layer = next(iter(layers(model).values()))
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(TOKENS, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    widths = sorted(t.numel() // TOKENS for t in storages.values() if t.shape[:1] == (TOKENS,))
    big = [t for t in storages.values() if t.numel() >= TOKENS and t.shape[:1] != (TOKENS,)]
    y.sum().backward()
    return widths, x.data_ptr() in storages, big


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_multiplicative_memory_does_not_grow_with_depth(depth):
    """up_proj is 16 -> 24; r 3: the collapsed x V has 3 * depth columns."""
    widths, keeps_x, _ = saved("multiplicative-input-3", "up_proj", depth=depth)
    assert widths == sorted([3 * depth, 16])
    assert keeps_x
    widths, keeps_x, _ = saved("multiplicative-output-3", "up_proj", depth=depth)
    # W x without its bias, and t; x itself is not needed, the base is frozen
    assert widths == sorted([3 * depth, 24])
    assert not keeps_x


@pytest.mark.parametrize(
    ("form", "want"),
    [
        ("additive", [3, 16]),
        ("additive-none", [3, 16]),
        ("additive-r0", [16]),
        ("scaled-input", [3, 16]),
        ("scaled-output", [3, 16, 24]),
        ("scaled-both", [3, 16, 24]),
        ("scaled-none", [3, 16]),
        ("multiplicative-r0-2", [16]),
    ],
)
def test_only_the_input_and_x_V_are_kept(form, want):
    widths, _, _ = saved(form, "up_proj")
    assert widths == want


@pytest.mark.parametrize("form", FORMS)
def test_nothing_larger_than_the_weights_is_kept_besides(form):
    _, _, others = saved(form, "up_proj")
    assert all(tensor.numel() <= 24 * 24 * 3 for tensor in others)


def test_scale_other_than_one_keeps_the_same():
    model = adapted("llama", "multiplicative-input-3", target_modules=["up_proj"])
    layer = next(iter(layers(model).values()))
    layer.set_scale("default", 0.5)
    kept = []
    x = torch.randn(TOKENS, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert sorted({t.shape[1] for t in kept if t.shape[:1] == (TOKENS,)}) == [9, 16]


def test_inference_keeps_nothing():
    model = adapted("llama", "scaled-both")
    layer = next(iter(layers(model).values()))
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(TOKENS, layer.in_features))
    assert not kept


def test_float32_factors_over_a_half_base_cost_no_float32_copy_of_the_input():
    for form in FORMS:
        model = adapted("llama", form, target_modules=["up_proj"])
        layer = next(iter(layers(model).values()))
        layer.base_layer.to(torch.bfloat16)
        kept = []
        x = torch.randn(TOKENS, 16, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert {t.dtype for t in kept if t.shape[:1] == (TOKENS,)} == {torch.bfloat16}, form
