"""||U V^T||_2 <= rho min|alpha| after a projection, and the condition number that follows from it."""

from collections import OrderedDict

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tiny_models import adapted, build, config_of, inputs
from torch import Tensor, nn

from dlor_peft import DLoRConfig, DLoRLayer, create_dlor_optimizer, limit_ratio
from dlor_peft.maths import condition_bound, materialise, spectral_norm

law = settings(deadline=None, max_examples=40)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


class Experts(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 5).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ti,eoi->to", x, self.weight)


def make(dtype: torch.dtype, experts: bool, seed: int, gain: float, **form) -> tuple[nn.Module, DLoRLayer]:
    torch.manual_seed(seed)
    base = Experts(dtype) if experts else nn.Linear(7, 6, dtype=dtype)
    targets = (
        {"target_parameters": ["layer.weight"], "target_modules": []} if experts else {"target_modules": ["layer"]}
    )
    config = DLoRConfig(mode="multiplicative", init_weights=False, **form, **targets)
    model = get_peft_model(nn.Sequential(OrderedDict(layer=base)), config, autocast_adapter_dtype=False)
    (layer,) = (module for module in model.modules() if isinstance(module, DLoRLayer))
    with torch.no_grad():
        for part in ("dlor_diag", "dlor_U", "dlor_V"):
            if "default" in getattr(layer, part):
                getattr(layer, part)["default"].weight.normal_().mul_(gain)
    return model, layer


def factors(layer: DLoRLayer) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(alpha, U, V) of each factor of each expert, in float64."""
    U, V = (getattr(layer, part)["default"].weight.detach().double() for part in ("dlor_U", "dlor_V"))
    alpha = torch.ones(*U.shape[:-2], 1, dtype=torch.float64)
    if "default" in layer.dlor_diag:
        alpha = 1 + layer.dlor_diag["default"].weight.detach().double()
    flat = (alpha.flatten(0, -2), U.flatten(0, -3), V.flatten(0, -3))
    return list(zip(*flat, strict=True))


def bits(layer: DLoRLayer) -> list[Tensor]:
    return [parameter.detach().clone() for name, parameter in layer.named_parameters() if "dlor_" in name]


forms = st.fixed_dictionaries(
    {
        "r": st.integers(1, 3),
        "depth": st.integers(1, 3),
        "diagonal": st.sampled_from(["vector", "scalar", "none"]),
        "side": st.sampled_from(["input", "output"]),
    }
)


@law
@given(
    forms, dtypes, st.booleans(), st.integers(0, 10**6), st.sampled_from([1e-3, 0.1, 0.5, 2.0]), st.floats(0.05, 0.95)
)
def test_the_ratio_and_the_condition_number_are_bounded(form, dtype, experts, seed, gain, rho):
    model, layer = make(dtype, experts, seed, gain, **form)
    before = bits(layer)
    was_within = [spectral_norm(U, V) <= rho * alpha.abs().min() for alpha, U, V in factors(layer)]
    limit_ratio(model, rho)
    for alpha, U, V in factors(layer):
        n, smallest = len(U), alpha.abs().min()
        assert torch.linalg.matrix_norm(U @ V.mT, 2) <= rho * smallest * (1 + 1e-12)
        bound = (alpha.abs().max() / smallest + rho) / (1 - rho)
        assert condition_bound(alpha, U, V) <= bound * (1 + 1e-9)
        assert torch.linalg.cond(materialise(alpha.expand(n), U, V)) <= bound * (1 + 1e-6)
    after = bits(layer)
    if all(was_within):
        assert all(map(torch.equal, before, after))
    limit_ratio(model, rho)
    assert all(map(torch.equal, after, bits(layer)))


@law
@given(forms, dtypes, st.integers(0, 10**6), st.floats(0.05, 0.95), st.floats(1.01, 50))
def test_with_a_spread_the_condition_number_has_one_bound_for_all(form, dtype, seed, rho, spread):
    model, layer = make(dtype, False, seed, 2.0, **form)
    limit_ratio(model, rho, max_spread=spread)
    for alpha, U, V in factors(layer):
        assert (alpha > 0).all()
        assert alpha.max() / alpha.min() <= spread * (1 + 1e-12)
        cond = torch.linalg.cond(materialise(alpha.expand(len(U)), U, V))
        assert cond <= (spread + rho) / (1 - rho) * (1 + 1e-6)
    after = bits(layer)
    limit_ratio(model, rho, max_spread=spread)
    assert all(map(torch.equal, after, bits(layer)))


def test_the_adapted_weight_inherits_the_bound():
    model, layer = make(torch.float64, False, 0, 1.0, r=2, depth=2, side="output")
    limit_ratio(model, 0.5, max_spread=2.0)
    W = layer.base_layer.weight.detach()
    assert torch.linalg.cond(W + layer.get_delta_weight("default")) <= torch.linalg.cond(W) * 5.0**2


def test_only_factors_above_the_limit_are_scaled_and_v_never():
    model, layer = make(torch.float32, False, 0, 0.3, r=2, depth=3, diagonal="none")
    with torch.no_grad():
        layer.dlor_U["default"].weight[1] *= 1e-3
    before = layer.dlor_U["default"].weight.detach().clone(), layer.dlor_V["default"].weight.detach().clone()
    limit_ratio(model, 0.2)
    U, V = layer.dlor_U["default"].weight, layer.dlor_V["default"].weight
    assert torch.equal(V, before[1])
    assert torch.equal(U[1], before[0][1])
    for k in (0, 2):
        scale = (U[k] / before[0][k]).detach()
        torch.testing.assert_close(scale, scale.mean().expand_as(scale))
        # as little as needed
        assert spectral_norm(U[k].double(), V[k].double()).item() == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_ends_close_below_the_limit(dtype):
    model, layer = make(dtype, False, 0, 1.0, r=3, diagonal="none")
    limit_ratio(model, 0.5)
    (_, U, V), *_ = factors(layer)
    assert 0.5 * (1 - 4 * torch.finfo(dtype).eps) <= spectral_norm(U, V).item() <= 0.5


def test_an_alpha_of_zero_leaves_no_update_but_the_directions():
    model, layer = make(torch.float32, False, 0, 1.0, r=2)
    with torch.no_grad():
        layer.dlor_diag["default"].weight[0, 0] = -1.0
    limit_ratio(model, 0.5)
    assert not layer.dlor_U["default"].weight.any()
    assert layer.dlor_V["default"].weight.any()


@pytest.mark.parametrize("form", ["additive", "additive-r0", "scaled", "scaled-both", "scaled-none"])
def test_forms_without_a_square_multiplier_are_refused(form):
    with pytest.raises(ValueError, match=r'guarantees nothing for .*q_proj.*Use mode="multiplicative"'):
        limit_ratio(adapted("llama", form), 0.5)
    with pytest.raises(ValueError, match=r"guarantees nothing"):
        create_dlor_optimizer(adapted("llama", form), 1e-3, max_ratio=0.5)


def test_a_diagonal_alone_is_a_square_multiplier():
    model = adapted("llama", "scaled-both-scalar-r0")
    layer = next(module for module in model.modules() if isinstance(module, DLoRLayer))
    with torch.no_grad():
        layer.dlor_diag_in["default"].weight.fill_(9.0)
    limit_ratio(model, 0.5, max_spread=4.0)
    assert layer.dlor_diag_in["default"].weight.item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"max_ratio": 0}, "max_ratio must be above 0 and below 1"),
        ({"max_ratio": 1.0}, "max_ratio must be above 0 and below 1"),
        ({"max_ratio": float("nan")}, "max_ratio must be above 0 and below 1"),
        ({"max_ratio": 0.5, "max_spread": 1.0}, "max_spread must be above 1 and finite"),
        ({"max_ratio": 0.5, "adapter_name": "second"}, "no DLoR adapter of the model is called 'second'"),
    ],
    ids=str,
)
def test_what_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match) as caught:
        limit_ratio(adapted("llama", "multiplicative"), **arguments)
    assert str(caught.value).startswith("dlor_peft.cap: ")


def test_an_adapter_that_is_not_trained_is_limited_by_name():
    model = get_peft_model(build("llama"), config_of("llama", "multiplicative", inference_mode=True))
    with pytest.raises(ValueError, match="no DLoR adapter of the model is trained"):
        limit_ratio(model, 0.01)
    limit_ratio(model, 0.01, adapter_name="default")
    layer = next(module for module in model.modules() if isinstance(module, DLoRLayer))
    assert all(spectral_norm(U, V) <= 0.01 * alpha.abs().min() for alpha, U, V in factors(layer))


def test_what_is_not_finite_names_the_layer():
    model, layer = make(torch.float32, False, 0, 1.0, r=2)
    with torch.no_grad():
        layer.dlor_U["default"].weight[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"of 'base_model.model.layer' is not finite.*Lower the learning rate"):
        limit_ratio(model, 0.5)


def test_a_flat_shard_is_refused():
    model, layer = make(torch.float32, False, 0, 1.0, r=2)
    layer.dlor_U["default"].weight = nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match=r"has the shape \(5,\) here.*Use FSDP2 or DDP"):
        limit_ratio(model, 0.5)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "accelerate"])
def test_the_limit_holds_after_every_step(wrapped):
    model, batch = adapted("llama", "multiplicative-output-3"), inputs("llama")
    optimizer = create_dlor_optimizer(model, 0.3, weight_decay=0.01, max_ratio=0.2, max_spread=1.5)
    if wrapped:
        model, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
    reached = 0.0
    for _ in range(4):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        for layer in (module for module in model.modules() if isinstance(module, DLoRLayer)):
            for alpha, U, V in factors(layer):
                ratio = (spectral_norm(U, V) / alpha.abs().min()).item()
                assert ratio <= 0.2 * (1 + 1e-12)
                assert alpha.max() / alpha.min() <= 1.5
                reached = max(reached, ratio)
    assert reached > 0.199
