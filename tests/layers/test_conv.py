"""Convolutions: every form and geometry against the formula, and what PEFT does with an adapted layer."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from formula import (
    HALF_TOLERANCE,
    activate,
    adapt,
    add,
    assert_close,
    assert_same_bits,
    assert_same_gradients,
    bits,
    copies,
    formula,
    layers,
    set_scale,
    smaller_side,
    stored,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_layer_status
from tiny_models import FEW_FORMS, FORMS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# torch itself, of the base layer
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Geometry(NamedTuple):
    dims: int
    channels: tuple[int, int]
    arguments: dict[str, Any]
    size: tuple[int, ...]


GEOMETRIES = {
    "1d": Geometry(1, (5, 3), {"kernel_size": 3}, (2, 5, 8)),
    "1d-pointwise": Geometry(1, (5, 5), {"kernel_size": 1, "bias": False}, (3, 5, 4)),
    "1d-even": Geometry(1, (3, 5), {"kernel_size": 4, "stride": 3, "padding": 2, "dilation": 2}, (2, 3, 13)),
    "1d-unbatched": Geometry(1, (5, 3), {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, (5, 8)),
    "2d": Geometry(2, (3, 5), {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)}, (2, 3, 6, 5)),
    "2d-same": Geometry(2, (5, 3), {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)}, (2, 5, 6, 7)),
    "2d-valid": Geometry(2, (5, 3), {"kernel_size": 2, "padding": "valid", "bias": False}, (2, 5, 3, 4)),
    "2d-reflect": Geometry(
        2, (3, 5), {"kernel_size": (2, 3), "padding": "same", "padding_mode": "reflect"}, (1, 3, 5, 4)
    ),
    "2d-replicate": Geometry(
        2, (4, 3), {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "stride": 2}, (2, 4, 5, 6)
    ),
    "2d-unbatched": Geometry(2, (4, 3), {"kernel_size": 3, "stride": 2, "padding": 1}, (4, 5, 6)),
    "3d": Geometry(3, (3, 4), {"kernel_size": (2, 3, 1), "stride": (2, 1, 1), "padding": (1, 0, 1)}, (2, 3, 4, 5, 2)),
    "3d-circular": Geometry(
        3, (3, 2), {"kernel_size": (3, 1, 2), "padding": (1, 0, 1), "padding_mode": "circular"}, (1, 3, 3, 2, 4)
    ),
    "2d-groups": Geometry(2, (6, 4), {"kernel_size": (2, 3), "padding": 1, "groups": 2}, (2, 6, 4, 5)),
    "1d-groups-wide": Geometry(
        1, (4, 12), {"kernel_size": 3, "groups": 2, "padding": "same", "padding_mode": "reflect"}, (2, 4, 6)
    ),
    "2d-depthwise": Geometry(2, (5, 5), {"kernel_size": 3, "stride": 2, "groups": 5, "bias": False}, (2, 5, 5, 5)),
    "1d-depthwise-twofold": Geometry(1, (4, 8), {"kernel_size": 2, "dilation": 3, "groups": 4}, (4, 9)),
}


def impossible(form: str, groups: int) -> bool:
    """Whether the form is no convolution of that many groups."""
    mode, side = FORMS[form]["mode"], FORMS[form].get("side")
    if groups == 1:
        return False
    return (mode == "additive" and form != "additive-none") or (mode == "multiplicative" and side == "output")


def conv_of(geometry: Geometry, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return CONVS[geometry.dims](*geometry.channels, **geometry.arguments).to(dtype)


def input_of(geometry: Geometry, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(geometry.size, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def expected_weight(conv: nn.Module, tensors: dict[str, Tensor], form: str, scale: float = 1.0) -> Tensor:
    """W' in the shape of the kernel; each group's output channels see the C input channels of the group."""
    W = conv.weight.detach()
    side = smaller_side(form, W.shape[0], W.shape[1])
    if conv.groups > 1 and FORMS[form]["mode"] == "multiplicative":
        side = "input"
    centre = sum(size // 2 * step for size, step in zip(conv.kernel_size, _strides(conv.kernel_size), strict=True))
    return formula(W.flatten(2), tensors, FORMS[form]["mode"], side, scale, centre).view(W.shape)


def _strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(sizes).stride()


def convolve(conv: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The convolution from torch's functional API, in the dtype of x."""
    dims = len(conv.kernel_size)
    bias = None if conv.bias is None else conv.bias.detach().to(x.dtype)
    padding = conv.padding
    if conv.padding_mode != "zeros":
        padding = 0
        before = [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        after = [d * (k - 1) - b for d, k, b in zip(conv.dilation, conv.kernel_size, before, strict=True)]
        if conv.padding != "same":
            before = after = list((0,) * dims if conv.padding == "valid" else conv.padding)
        pad = [width for pair in reversed(list(zip(before, after, strict=True))) for width in pair]
        x = F.pad(x, pad, mode=conv.padding_mode)
    return FUNCTIONS[dims](x, weight.to(x.dtype), bias, conv.stride, padding, conv.dilation, conv.groups)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_forward_gradients_and_merge_follow_the_formula(name, scale):
    geometry = GEOMETRIES[name]
    for form in FORMS:
        conv = conv_of(geometry)
        if impossible(form, conv.groups):
            continue
        model = adapt(conv, form)
        set_scale(model, scale)
        (layer,) = layers(model)
        tensors = copies(layer)
        x, x_copy = input_of(geometry).requires_grad_(), input_of(geometry).requires_grad_()
        y, want = model(x), convolve(conv, x_copy, expected_weight(conv, tensors, form, scale))
        assert_close(y, want, 1e-12, form)
        g = torch.randn(y.shape, dtype=y.dtype)
        y.backward(g)
        want.backward(g)
        assert_close(x.grad, x_copy.grad, 1e-11, form)
        assert_same_gradients(layer, tensors, 1e-11)
        before = bits(model)
        model.merge_adapter()
        assert_close(conv.weight, expected_weight(conv_of(geometry), tensors, form, scale), 1e-12, form)
        assert conv.weight.is_contiguous()
        assert_close(model(x), want, 1e-12, form)
        model.unmerge_adapter()
        assert_same_bits(bits(model), before)


@st.composite
def cases(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = (groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3)))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    each = [st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(0, 3)]
    kernel, stride, dilation, padding, extra = (tuple(draw(of) for _ in range(dims)) for of in each)
    if draw(st.booleans()):
        stride, padding = (1,) * dims, draw(st.sampled_from(["same", "valid"]))
    # beyond the reach of the kernel, and of reflection
    size = tuple(max(d * (k - 1) + 1, 4) + e for d, k, e in zip(dilation, kernel, extra, strict=True))
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    arguments = {"kernel_size": kernel, "stride": stride, "dilation": dilation, "padding": padding, "groups": groups}
    geometry = Geometry(
        dims, channels, {**arguments, "padding_mode": mode, "bias": draw(st.booleans())}, (*batch, channels[0], *size)
    )
    form = draw(st.sampled_from([form for form in FORMS if not impossible(form, groups)]))
    return geometry, form, draw(st.sampled_from([1.0, -0.7]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_merge_equals_forward_for_any_geometry(case):
    geometry, form, scale = case
    conv = conv_of(geometry)
    model = adapt(conv, form)
    set_scale(model, scale)
    x, before = input_of(geometry), bits(model)
    with torch.no_grad():
        want = convolve(conv, x, expected_weight(conv, copies(layers(model)[0]), form, scale))
        assert_close(model(x), want, 1e-12)
        model.merge_adapter()
        assert_close(model(x), want, 1e-12)
    model.unmerge_adapter()
    assert_same_bits(bits(model), before)


@pytest.mark.parametrize("dtype", HALF_TOLERANCE)
@pytest.mark.parametrize("name", ["2d", "2d-groups"])
def test_precision(name, dtype):
    """Forward and gradients within the stated tolerance of float64 on the same, rounded values."""
    geometry, tolerance = GEOMETRIES[name], HALF_TOLERANCE[dtype]
    for form in FORMS:
        conv = conv_of(geometry, dtype)
        if impossible(form, conv.groups):
            continue
        model = adapt(conv, form)
        (layer,) = layers(model)
        tensors = copies(layer)
        assert all(tensor.dtype is torch.float32 for tensor in stored(layer).values())
        x = input_of(geometry, dtype).requires_grad_()
        x_copy = x.detach().double().requires_grad_()
        y, want = model(x), convolve(conv, x_copy, expected_weight(conv, tensors, form))
        assert y.dtype is dtype
        assert_close(y, want, tolerance, form)
        # of one sign with the output: the gradient of a scalar diagonal does not cancel
        g = want.detach().to(dtype)
        y.backward(g)
        want.backward(g.double())
        assert_close(x.grad, x_copy.grad, tolerance, form)
        assert_same_gradients(layer, tensors, tolerance)
        model.merge_adapter()
        assert conv.weight.dtype is dtype
        assert_close(model(x), want, tolerance, form)


def test_merge_rounds_once():
    for form in FORMS:
        conv = conv_of(GEOMETRIES["2d"], torch.bfloat16)
        model = adapt(conv, form)
        want = expected_weight(conv, copies(layers(model)[0]), form)
        model.merge_adapter()
        step = torch.finfo(torch.bfloat16).eps * want.abs()
        assert ((conv.weight.double() - want).abs() <= 0.51 * step + 1e-6).all(), form


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_adapter_is_the_exact_identity(form):
    for name in ("2d-reflect", "2d-groups"):
        conv, x = conv_of(GEOMETRIES[name], torch.float32), input_of(GEOMETRIES[name], torch.float32)
        if not impossible(form, conv.groups):
            want = conv(x)
            assert torch.equal(adapt(conv, form, init_weights=True)(x), want)


@pytest.mark.parametrize(
    ("groups", "changes", "match"),
    [
        (2, {"mode": "additive"}, r"groups=2 has no identity.*diagonal=\"none\".*The target is 'layer'"),
        (4, {"mode": "additive", "diagonal": "scalar"}, "no identity"),
        (2, {"mode": "multiplicative", "side": "output"}, r"groups=2.*side='input' or 'auto'.*The target is 'layer'"),
    ],
    ids=str,
)
def test_groups_refuse_forms_that_would_mix_them(groups, changes, match):
    with pytest.raises(ValueError, match=match):
        adapt(nn.Conv1d(4, 4, 3, groups=groups), changes)


def test_a_transposed_convolution_is_refused():
    with pytest.raises(ValueError, match="a ConvTranspose2d is not adapted by DLoR"):
        adapt(nn.ConvTranspose2d(4, 4, 3))


@pytest.mark.parametrize("name", ["2d", "2d-groups"])
def test_active_adapters_act_in_the_order_of_merging(name):
    geometry = GEOMETRIES[name]
    chain = {"default": "scaled-both", "second": "multiplicative-input-3", "third": "additive-none"}
    conv, x = conv_of(geometry), input_of(geometry)
    model = adapt(conv, chain["default"])
    add(model, "second", chain["second"])
    add(model, "third", chain["third"])
    for order in (("default", "second", "third"), ("third", "second", "default"), ("second", "third")):
        activate(model, *order)
        reference = conv_of(geometry)
        for adapter in order:
            reference.weight.data = expected_weight(reference, copies(layers(model)[0], adapter), chain[adapter]).data
        want, before = convolve(reference, x, reference.weight), bits(model)
        assert_close(model(x), want, 1e-12)
        model.merge_adapter()
        assert_close(conv.weight, reference.weight, 1e-12)
        model.unmerge_adapter()
        model.merge_adapter([order[0]])
        with pytest.warns(UserWarning, match="Already following adapters were merged"):
            model.merge_adapter(list(order[1:]))
        assert_close(model(x), want, 1e-12)
        model.unmerge_adapter()
        assert_same_bits(bits(model), before)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("first", FEW_FORMS)
@pytest.mark.parametrize(("name", "second"), [("2d", "multiplicative-output-3"), ("2d-groups", "scaled-both")])
def test_mixed_batch(name, first, second, scale):
    geometry = GEOMETRIES[name]
    if impossible(first, geometry.arguments.get("groups", 1)):
        first = "multiplicative-input-3"
    model = adapt(conv_of(geometry), first)
    set_scale(model, scale)
    add(model, "second", second)
    names = ["second", "__base__", "default", "second"]
    x = input_of(geometry).repeat(2, 1, 1, 1)
    alone = {}
    for name in ("default", "second"):
        activate(model, name)
        alone[name] = model(x)
    with model.disable_adapter():
        alone["__base__"] = model(x)
    want = torch.stack([alone[name][row] for row, name in enumerate(names)])
    assert_close(model(x, adapter_names=names), want, 1e-12)


def test_dropout_touches_the_update_only():
    torch.manual_seed(0)
    conv = nn.Conv1d(64, 8, 1, bias=False)
    x = torch.ones(1, 64, 50)
    model = adapt(conv, "scaled-none", dlor_dropout=0.5).train()
    base, full, dropped = conv(x), model.eval()(x), model.train()(x)
    update = dropped - base
    assert not torch.allclose(update[..., 0], update[..., 1])
    kept = torch.stack([model(x) - base for _ in range(400)]).mean((0, 3))
    assert_close(kept, (full - base).mean(2), 0.05)
    # what is left of the inputs is doubled
    single = adapt(nn.Conv1d(1, 3, 1, bias=False), "scaled-none", dlor_dropout=0.5)
    one = torch.ones(1, 1, 200)
    base, full = single.base_model.model.layer.base_layer(one), single(one)
    ratio = ((single.train()(one) - base) / (full - base))[0, 0]
    assert torch.allclose(ratio, torch.where(ratio > 1, 2.0, 0.0), atol=1e-4)
    assert 60 < (ratio > 1).sum() < 140


@pytest.mark.parametrize("name", ["1d-even", "2d-reflect", "2d-groups"])
def test_autocast(name):
    geometry = GEOMETRIES[name]
    for form in FORMS:
        conv = conv_of(geometry, torch.float32)
        if impossible(form, conv.groups):
            continue
        for dropout in (0.0, 0.1):
            model = adapt(conv_of(geometry, torch.float32), form, dlor_dropout=dropout)
            (layer,) = layers(model)
            tensors, x = copies(layer), input_of(geometry, torch.float32)
            want = convolve(conv, x.double(), expected_weight(conv, tensors, form))
            with torch.autocast("cpu", torch.bfloat16):
                y = model(x)
            assert y.dtype is torch.bfloat16
            assert_close(y, want, 4e-2, form)
            g = want.detach().bfloat16()
            y.backward(g)
            want.backward(g.double())
            assert_same_gradients(layer, tensors, 4e-2)
            # the train-mode path has tensors of its own, which dropout made
            with torch.autocast("cpu", torch.bfloat16):
                assert model.train()(x).dtype is torch.bfloat16


@pytest.mark.parametrize("form", FEW_FORMS)
def test_gradient_checkpointing(form):
    geometry = GEOMETRIES["2d"]
    grads = []
    for run in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=False)):
        model = adapt(conv_of(geometry), form)
        x = input_of(geometry).requires_grad_()
        run(model, x).square().sum().backward()
        grads.append([x.grad, *(parameter.grad for parameter in stored(layers(model)[0]).values())])
    assert_same_bits(*grads)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_save_and_load(form, low_cpu_mem_usage, tmp_path):
    for name in ("3d", "2d-groups"):
        conv, x = conv_of(GEOMETRIES[name], torch.float32), input_of(GEOMETRIES[name], torch.float32)
        if impossible(form, conv.groups):
            continue
        model = adapt(conv, form)
        model.save_pretrained(tmp_path / name)
        fresh = nn.Sequential()
        fresh.add_module("layer", conv_of(GEOMETRIES[name], torch.float32))
        loaded = PeftModel.from_pretrained(fresh, tmp_path / name, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(loaded(x), model(x))


def test_disable_delete_and_status():
    geometry = GEOMETRIES["2d"]
    conv, x = conv_of(geometry), input_of(geometry)
    want = conv(x)
    model = adapt(conv, "scaled-both")
    add(model, "second", "multiplicative-output-3")
    (status,) = get_layer_status(model)
    assert status.module_type == "dlor.Conv"
    assert status.available_adapters == ["default", "second"]
    assert status.active_adapters == ["default"]
    assert status.requires_grad == {"default": True, "second": False}
    with model.disable_adapter():
        assert torch.equal(model(x), want)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), want)
    second = copies(layers(model)[0], "second")
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert_close(model(x), convolve(conv, x, expected_weight(conv, second, "multiplicative-output-3")), 1e-12)
    assert not any(".default." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("form", FEW_FORMS)
def test_merge_and_unload(form):
    geometry = GEOMETRIES["3d-circular"]
    model, x = adapt(conv_of(geometry), form), input_of(geometry)
    want = model(x)
    plain = model.merge_and_unload()
    assert not layers(plain)
    assert type(plain.layer) is nn.Conv3d
    assert list(plain.state_dict()) == ["layer.weight", "layer.bias"]
    assert_close(plain(x), want, 1e-12)
    assert_same_bits(adapt(conv_of(geometry), form).unload().parameters(), conv_of(geometry).parameters())


def test_a_hooked_convolution_is_called():
    """The bias is then subtracted again from what the output-side factors multiply."""
    geometry = GEOMETRIES["2d-unbatched"]
    for form in ("scaled-output", "scaled-both", "multiplicative-output-3"):
        model, x, calls = adapt(conv_of(geometry), form), input_of(geometry), []
        want = model(x)
        model.base_model.model.layer.base_layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert_close(model(x), want, 1e-12)
        assert calls


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_a_weight_that_is_computed_is_merged_or_refused(norm, unload):
    """Weight-normalised convolutions compute their weight from other tensors: to overwrite it changes nothing."""
    conv = norm(nn.Conv1d(4, 6, 3, padding=1))
    model, x = adapt(conv, "scaled-both"), torch.randn(2, 4, 7)
    want = model(x)
    refusal = "weight"
    try:
        merged = (model.merge_and_unload() if unload else model.merge_adapter() or model)(x)
    except ValueError as error:
        refusal, merged = str(error), model(x)
    assert "weight" in refusal
    assert_close(merged, want, 1e-5)


@pytest.mark.parametrize(
    "arguments",
    [{"stride": 2}, {"padding": 3, "padding_mode": "reflect"}, {"padding": "same", "dilation": 2}],
    ids=str,
)
def test_an_offloaded_convolution_gives_the_same(arguments):
    """Its bias, which the output side must not scale, is on no device but while it runs."""
    for form in ("scaled-both", "additive", "multiplicative-output-3"):
        model, x = adapt(nn.Conv1d(4, 3, 3, **arguments), form), torch.randn(2, 4, 9)
        with torch.no_grad():
            want = model(x)
            cpu_offload(model, execution_device="cpu")
            assert model.base_model.model.layer.base_layer.bias.is_meta
            assert_close(model(x), want, 1e-5, form)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", ["additive", "scaled-both", "multiplicative-output-3"])
def test_compiled_without_a_graph_break(form):
    torch._dynamo.reset()
    geometry = GEOMETRIES["2d-reflect"]
    model, x = adapt(conv_of(geometry), form), input_of(geometry)
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert_close(y, model(x), 1e-12)
    y.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in stored(layers(model)[0]).values())


def test_trained_biases_are_saved(tmp_path):
    geometry = GEOMETRIES["2d"]
    model, x = adapt(conv_of(geometry, torch.float32), "scaled", bias="dlor_only"), input_of(geometry, torch.float32)
    bias = model.base_model.model.layer.base_layer.bias
    assert bias.requires_grad
    bias.data += 1
    model.save_pretrained(tmp_path)
    fresh = nn.Sequential()
    fresh.add_module("layer", conv_of(geometry, torch.float32))
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path)(x), model(x))


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_weighted_sums(combination):
    geometry = GEOMETRIES["2d-groups"]
    model = adapt(conv_of(geometry), "scaled-input")
    add(model, "second", "scaled-input")
    (layer,) = layers(model)
    want = 0.5 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("second")
    model.base_model.add_weighted_adapter(
        ["default", "second"], [0.5, -2.0], "sum", combination, **({} if combination == "cat" else {"svd_rank": 6})
    )
    assert_close(layer.get_delta_weight("sum"), want, 1e-6)


def test_an_empty_batch():
    model = adapt(nn.Conv2d(3, 4, 3), "additive")
    x = torch.randn(0, 3, 5, 5, requires_grad=True)
    y = model(x)
    assert y.shape == (0, 4, 3, 3)
    y.sum().backward()
    assert all(parameter.grad.abs().sum() == 0 for parameter in stored(layers(model)[0]).values())
