"""Parameters by name: matrices, stacks of experts in real mixture-of-experts models, parametrisations."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from formula import (
    HALF_TOLERANCE,
    PARTS,
    activate,
    add,
    assert_close,
    assert_same_bits,
    assert_same_gradients,
    bits,
    configure,
    copies,
    layers,
    set_scale,
    stacked_formula,
)
from peft import PeftModel, convert_to_lora, get_layer_status, get_peft_model
from tiny_models import FORMS
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint


class Bank(nn.Module):
    """y_e = scale * x A^T B_e^T for three experts; transposed, B is stored as (experts, in_features, out_features)."""

    def __init__(self, dtype: torch.dtype = torch.float64, is_transposed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.A = nn.Parameter(torch.randn(7, 5, dtype=dtype))
        self.B = nn.Parameter(torch.randn((3, 7, 4) if is_transposed else (3, 4, 7), dtype=dtype))
        self.scale = nn.Parameter(torch.randn(4, dtype=dtype))
        self.is_transposed = is_transposed

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        if fail:
            raise ArithmeticError
        experts = self.B if self.is_transposed else self.B.mT
        return torch.einsum("ti,eio->eto", x @ self.A.T, experts) * self.scale


NAMES = ["layer.A", "layer.B"]


def adapt(base: nn.Module, form: str = "scaled", seed: int = 1, **changes: Any) -> PeftModel:
    net = nn.Sequential(OrderedDict(layer=base))
    torch.manual_seed(seed)
    config = configure(form, **{"target_modules": [], "target_parameters": NAMES, **changes})
    return get_peft_model(net, config).eval()


def by_name(model: nn.Module) -> dict[str, Any]:
    return {layer.parameter_name: layer for layer in layers(model)}


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forward_gradients_and_merge_follow_the_formula(form, is_transposed, scale):
    model = adapt(Bank(is_transposed=is_transposed), form)
    set_scale(model, scale)
    base, wrappers = model.base_model.model.layer.get_base_layer(), by_name(model)
    leaves = {name: copies(layer) for name, layer in wrappers.items()}
    weights = {
        "A": stacked_formula(base.A, leaves["A"], form, scale=scale),
        "B": stacked_formula(base.B, leaves["B"], form, is_transposed, scale),
    }
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    x_copy = x.detach().clone().requires_grad_()
    y, want = model(x), functional_call(Bank(is_transposed=is_transposed), weights, (x_copy,))
    assert_close(y, want, 1e-12)
    g = torch.randn_like(y)
    y.backward(g)
    want.backward(g)
    assert_close(x.grad, x_copy.grad, 1e-11)
    for name, layer in wrappers.items():
        assert_same_gradients(layer, leaves[name], 1e-10)
    before = bits(model)
    model.merge_adapter()
    for name, weight in weights.items():
        assert_close(getattr(base, name), weight, 1e-12)
        assert getattr(base, name).is_contiguous()
    assert_close(model(x), want, 1e-12)
    model.unmerge_adapter()
    assert_same_bits(bits(model), before)


@pytest.mark.parametrize("dtype", HALF_TOLERANCE)
def test_precision(dtype):
    for form in FORMS:
        model = adapt(Bank(dtype), form)
        base, wrappers = model.base_model.model.layer.get_base_layer(), by_name(model)
        leaves = {name: copies(layer) for name, layer in wrappers.items()}
        weights = {name: stacked_formula(getattr(base, name), leaves[name], form) for name in wrappers}
        weights["scale"] = base.scale.detach().double()
        x = torch.randn(6, 5).to(dtype)
        y, want = model(x), functional_call(Bank(), weights, (x.double(),))
        assert y.dtype is dtype
        assert_close(y, want, HALF_TOLERANCE[dtype], form)
        y.backward(want.detach().to(dtype))
        want.backward(want.detach())
        for name, layer in wrappers.items():
            assert_same_gradients(layer, leaves[name], 2 * HALF_TOLERANCE[dtype])
        model.merge_adapter()
        assert_close(model(x), want, HALF_TOLERANCE[dtype], form)


def test_autocast():
    for form in FORMS:
        model, x = adapt(Bank(torch.float32), form), torch.randn(6, 5)
        want = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert_close(y, want, 4e-2, form)
        y.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_fresh_adapter_is_the_identity(is_transposed):
    for form in FORMS:
        base, x = Bank(is_transposed=is_transposed), torch.randn(6, 5).double()
        want = base(x)
        assert torch.equal(adapt(base, form, init_weights=True)(x), want), form


def test_an_expert_that_gets_no_token_gets_no_gradient():
    for form in FORMS:
        model = adapt(Bank(), form)
        model(torch.randn(6, 5).double())[[0, 2]].sum().backward()
        for part in PARTS:
            tensors = getattr(by_name(model)["B"], part)
            if "default" in tensors:
                touched = tensors["default"].weight.grad.abs().flatten(2).sum((0, 2)) > 0
                assert touched.tolist() == [True, False, True], (form, part)


class Table(nn.Module):
    """A module of which others take the parameter, and which they call by keywords or with nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))

    def forward(self, *, first: int = 0) -> Tensor:
        return self.rows[first:]


@pytest.mark.parametrize("arguments", [{}, {"first": 2}], ids=str)
def test_a_module_may_be_called_in_any_way(arguments):
    table = Table()
    model = adapt(table, "scaled-both", target_parameters=["layer.rows"])
    (layer,) = layers(model)
    want = stacked_formula(table.rows, copies(layer), "scaled-both")[arguments.get("first", 0) :]
    assert_close(layer(**arguments), want, 1e-12)


def test_the_weight_of_a_linear_layer():
    base, x = nn.Linear(7, 4, dtype=torch.float64), torch.randn(6, 7).double()
    model = adapt(base, "scaled-both", target_parameters=["layer.weight"])
    (layer,) = layers(model)
    want = nn.functional.linear(x, stacked_formula(base.weight, copies(layer), "scaled-both"), base.bias)
    assert_close(model(x), want, 1e-12)
    assert type(model.merge_and_unload().layer) is nn.Linear


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"target_parameters": ["layer.scale"]}, r"'scale' has the shape \(4,\).*target_parameters.*layer\.scale"),
        ({"dlor_dropout": 0.1}, r"dlor_dropout=0\.1 needs the input of the update.*Set dlor_dropout=0"),
    ],
    ids=str,
)
def test_what_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        adapt(Bank(), **changes)


def test_mixed_batches_are_refused():
    model = adapt(Bank())
    add(model, "second", "additive", target_modules=[], target_parameters=NAMES)
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        model(torch.randn(2, 5).double(), adapter_names=["default", "second"])


def test_adapters_on_different_parameters_are_refused():
    model = adapt(Bank())
    with pytest.raises(ValueError, match="all adapters must target the same set of parameters"):
        model.add_adapter("second", configure("scaled", target_modules=[], target_parameters=["layer.B"]))
    assert "second" not in model.peft_config or not any("second" in layer.form for layer in layers(model))


def test_active_adapters_act_in_the_order_of_merging():
    chain = {"default": "scaled-both", "second": "multiplicative-input-3", "third": "additive"}
    model, x = adapt(Bank(), chain["default"]), torch.randn(6, 5).double()
    for name in ("second", "third"):
        add(model, name, chain[name], target_modules=[], target_parameters=NAMES)
    for order in (("default", "second", "third"), ("third", "second", "default"), ("second",)):
        activate(model, *order)
        base, wrappers, before = model.base_model.model.layer.get_base_layer(), by_name(model), bits(model)
        weights = {}
        for name, layer in wrappers.items():
            weights[name] = getattr(base, name)
            for adapter in order:
                weights[name] = stacked_formula(weights[name], copies(layer, adapter), chain[adapter])
        want = functional_call(Bank(), weights, (x,))
        assert_close(model(x), want, 1e-12)
        model.merge_adapter()
        assert_close(model(x), want, 1e-12)
        model.unmerge_adapter()
        assert_same_bits(bits(model), before)


def test_disable_delete_status_and_unload():
    x = torch.randn(6, 5).double()
    want = Bank()(x)
    model = adapt(Bank(), "scaled-both")
    add(model, "second", "additive", target_modules=[], target_parameters=NAMES)
    for status in get_layer_status(model):
        assert status.module_type == "dlor.ParamWrapper"
        assert status.available_adapters == ["default", "second"]
        assert status.requires_grad == {"default": True, "second": False}
    assert len(get_layer_status(model)) == 2
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), want)
    activate(model, "second")
    second = model(x)
    activate(model, "default")
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert torch.equal(model(x), second)
    plain = model.merge_and_unload()
    assert not layers(plain)
    assert list(plain.state_dict()) == ["layer.A", "layer.B", "layer.scale"]
    assert_close(plain(x), second, 1e-12)
    assert_same_bits(adapt(Bank()).unload().parameters(), Bank().parameters())


def test_gradient_checkpointing():
    grads = []
    for checkpointed in (False, True):
        model, x = adapt(Bank(), "multiplicative-output-3"), torch.ones(2, 5).double()
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        y.square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert len(grads[0]) == 6
    assert_same_bits(*grads)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_save_and_load(form, low_cpu_mem_usage, tmp_path):
    model, x = adapt(Bank(torch.float32), form), torch.randn(6, 5)
    model.save_pretrained(tmp_path)
    fresh = nn.Sequential(OrderedDict(layer=Bank(torch.float32)))
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(x), model(x))


def parametrised() -> Bank:
    bank = Bank()
    parametrize.register_parametrization(bank, "B", nn.Tanh())
    return bank


def test_the_adapter_acts_on_what_a_parametrisation_gives():
    bank, x = parametrised(), torch.randn(6, 5).double()
    base = bank(x)
    model = adapt(bank, "scaled-both")
    wrappers = by_name(model)
    leaves = {name: copies(layer) for name, layer in wrappers.items()}
    weights = {"A": stacked_formula(Bank().A, leaves["A"], "scaled-both")}
    weights["B"] = stacked_formula(Bank().B.tanh(), leaves["B"], "scaled-both")
    want = functional_call(Bank(), weights, (x,))
    for _ in range(2):
        y = model(x)
        assert_close(y, want, 1e-12)
        assert len(bank.parametrizations["B"]) == 1
    y.sum().backward()
    want.sum().backward()
    for name, layer in wrappers.items():
        assert_same_gradients(layer, leaves[name], 1e-10)
    with model.disable_adapter():
        assert torch.equal(model(x), base)


@pytest.mark.parametrize("build", [Bank, parametrised])
def test_a_call_that_fails_leaves_nothing_behind(build):
    bank, x = build(), torch.randn(6, 5).double()
    attributes = set(vars(bank))
    model = adapt(bank, "scaled-both")
    want = model(x)
    with pytest.raises(ArithmeticError):
        model.base_model.model.layer(x, fail=True)
    assert set(vars(bank)) == attributes
    assert torch.equal(model(x), want)
    with model.disable_adapter():
        assert torch.equal(model(x), build()(x))


@pytest.mark.parametrize("unload", [False, True])
def test_a_parametrised_weight_is_merged_or_refused(unload):
    """It is computed in every call, so that writing W' into it changes nothing."""
    model, x = adapt(parametrised(), "scaled-both"), torch.randn(6, 5).double()
    want = model(x)
    refusal = "B"
    try:
        merged = (model.merge_and_unload() if unload else model.merge_adapter() or model)(x)
    except ValueError as error:
        refusal, merged = str(error), model(x)
    assert "B" in refusal
    assert_close(merged, want, 1e-12)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", ["additive", "multiplicative-output-3"])
def test_compiled_without_a_graph_break(form):
    torch._dynamo.reset()
    model, x = adapt(Bank(), form), torch.randn(6, 5).double()
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert_close(y, model(x), 1e-12)
    y.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_weighted_sums_are_exact_or_refused(combination):
    model = adapt(Bank(), "scaled-input")
    add(model, "second", "scaled-input", target_modules=[], target_parameters=NAMES)
    options = {} if combination == "cat" else {"svd_rank": 6}
    refusal = None
    try:
        model.base_model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum", combination, **options)
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert "target_parameters" in refusal
        assert "sum" not in model.peft_config
        assert not any("sum" in layer.form for layer in layers(model))
        return
    for layer in layers(model):
        want = 0.5 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("second")
        assert_close(layer.get_delta_weight("sum"), want, 1e-6)


def test_conversion_to_lora_is_refused():
    """PEFT converts linear layers only, and would take each expert for one."""
    with pytest.raises((TypeError, ValueError)):
        convert_to_lora(adapt(Bank(torch.float32)), 2)
