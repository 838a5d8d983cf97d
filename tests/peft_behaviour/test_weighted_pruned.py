"""add_weighted_adapter, "linear" and the pruning types, against the same written out in float64, and against LoRA."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import adapted, add, distance, layers, logits
from torch import nn

from dlor_peft import DLoRConfig

WEIGHTS = [0.7, -0.4, 1.3]
NAMES = ["default", "second", "third"]
PRUNING = ["ties", "dare_linear", "dare_ties", "magnitude_prune"]
DENSITY = 0.6


def three(form, others=None, **changes):
    """Adapters of scales other than 1, all in float64."""
    model = adapted("llama", form, **changes).double()
    for seed, name in enumerate(NAMES[1:]):
        add(model, name, "llama", others or form, seed=seed + 5, **changes)
    for layer in layers(model).values():
        for name, scale in zip(NAMES, [1.0, 2.0, -0.5], strict=True):
            layer.set_scale(name, scale)
    return model.double()


def pruned(kind, tensor, density):
    if kind.startswith("dare"):
        return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density
    smallest = tensor.abs().flatten().sort(descending=True).values[int(density * tensor.numel()) - 1]
    return tensor.where(tensor.abs() >= smallest, 0)


def merged(kind, tensors, weights, density=DENSITY, method="total"):
    """sum_i w_i t_i of the pruned tensors; with "ties", the mean over those whose sign is that of the majority."""
    kind = kind.removesuffix("_svd")
    if kind not in ("linear", "svd"):
        tensors = [pruned(kind, tensor, density) for tensor in tensors]
    tensors = torch.stack(tensors)
    weighted = tensors * torch.tensor(weights, dtype=tensors.dtype).view(-1, *[1] * (tensors.ndim - 1))
    if "ties" not in kind:
        return weighted.sum(0)
    votes = (tensors if method == "total" else tensors.sign()).sum(0)
    counts = tensors.sign() == torch.where(votes >= 0, 1.0, -1.0)
    return (weighted * counts).sum(0) / counts.sum(0).clamp_min(1)


def truncated(matrix, rank):
    left, S, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * S[:rank]) @ right[:rank]


def parts(layer):
    residuals = [layer.residual(name) for name in NAMES]
    weights = [w * layer.scaling[name] for w, name in zip(WEIGHTS, NAMES, strict=True)]
    return residuals, weights


def combine(model, kind, density=DENSITY, **options):
    torch.manual_seed(11)
    options |= {} if kind in ("linear", "svd") else {"density": density}
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", combination_type=kind, **options)
    torch.manual_seed(11)
    assert all(layer.scaling["sum"] == 1 for layer in layers(model).values())


def sign_methods(kinds):
    return [
        (kind, method) for kind in kinds for method in ("total", "frequency") if method == "total" or "ties" in kind
    ]


@pytest.mark.parametrize("form", ["additive", "scaled", "scaled-both", "scaled-none", "multiplicative-output-3"])
@pytest.mark.parametrize(("kind", "method"), sign_methods(["linear", *PRUNING]))
def test_tensor_by_tensor(kind, method, form):
    model = three(form)
    combine(model, kind, majority_sign_method=method)
    for layer in layers(model).values():
        residuals, weights = parts(layer)
        roots = [math.sqrt(abs(weight)) for weight in weights]
        signed = [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
        got = layer.residual("sum")
        for diagonal in ("q", "q_in"):
            qs = [getattr(residual, diagonal) for residual in residuals]
            if qs[0] is None:
                assert getattr(got, diagonal) is None
            else:
                want = merged(kind, qs, weights, method=method)
                torch.testing.assert_close(getattr(got, diagonal), want, rtol=0, atol=1e-14)
        U = merged(kind, [residual.U for residual in residuals], roots, method=method)
        V = merged(kind, [residual.V for residual in residuals], signed, method=method)
        torch.testing.assert_close(got.U @ got.V.T, U @ V.T, rtol=0, atol=1e-13)
        assert layer.form["sum"].side == layer.form["default"].side


@pytest.mark.parametrize("form", ["additive", "scaled", "multiplicative-output-3"])
@pytest.mark.parametrize(("kind", "method"), sign_methods([f"{kind}_svd" for kind in PRUNING]))
def test_by_svd_of_one_form(kind, method, form):
    """The diagonals are pruned, and the products U V^T; the sum of the products is truncated."""
    model = three(form)
    combine(model, kind, majority_sign_method=method, svd_rank=4)
    for layer in layers(model).values():
        residuals, weights = parts(layer)
        q = merged(kind, [residual.q for residual in residuals], weights, method=method)
        product = merged(kind, [residual.U @ residual.V.T for residual in residuals], weights, method=method)
        got = layer.residual("sum")
        torch.testing.assert_close(got.q, q, rtol=0, atol=1e-14)
        torch.testing.assert_close(got.U @ got.V.T, truncated(product, 4), rtol=0, atol=1e-11)
        assert layer.r["sum"] == 4


@pytest.mark.parametrize(("form", "others"), [("scaled-both", None), ("additive", "multiplicative-input-3")])
@pytest.mark.parametrize(("kind", "method"), sign_methods(["svd", *(f"{kind}_svd" for kind in PRUNING)]))
def test_by_svd_of_any_forms(kind, method, form, others):
    """The dense updates are pruned, and their sum is truncated."""
    model = three(form, others)
    combine(model, kind, majority_sign_method=method, svd_rank=5)
    assert model.peft_config["sum"].mode == "additive"
    for layer in layers(model).values():
        deltas = [layer.get_delta_weight(name) for name in NAMES]
        want = truncated(merged(kind, deltas, WEIGHTS, method=method), 5)
        torch.testing.assert_close(layer.get_delta_weight("sum"), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", ["additive", "scaled-both", "scaled-none", "multiplicative"])
def test_linear_of_one_adapter_with_weight_1_is_that_adapter(form):
    model = adapted("llama", form)
    model.add_weighted_adapter(["default"], [1.0], "same", combination_type="linear")
    for layer in layers(model).values():
        for name in ("dlor_diag", "dlor_diag_in", "dlor_U", "dlor_V"):
            if "default" in getattr(layer, name):
                same, default = getattr(layer, name)["same"].weight, getattr(layer, name)["default"].weight
                assert torch.equal(same, default)


@pytest.mark.parametrize("weight", [-1.0, 0.3])
@pytest.mark.parametrize("form", ["additive", "scaled", "multiplicative-input-3"])
def test_linear_of_one_adapter_is_exact(form, weight):
    model = adapted("llama", form)
    model.add_weighted_adapter(["default"], [weight], "sum", combination_type="linear")
    for layer in layers(model).values():
        assert distance(layer.get_delta_weight("sum"), weight * layer.get_delta_weight("default")) < 1e-5


@pytest.mark.parametrize("form", ["scaled-both", "scaled-both-scalar-r0"])
def test_what_linear_adds_to_the_sum_with_side_both(form):
    """(a W + W b + a W b) is exact in a W and W b; the cross terms are products of two diagonals."""
    model = three(form, r=0)
    combine(model, "linear")
    for layer in layers(model).values():
        residuals, weights = parts(layer)
        W = layer.get_base_weight()

        def outer(left, right, shape=W.shape):
            return left.expand(shape[0])[:, None] * right.expand(shape[1])

        q, q_in = (sum(w * r[i] for w, r in zip(weights, residuals, strict=True)) for i in (0, 3))
        cross = outer(q, q_in) - sum(w * outer(r.q, r.q_in) for w, r in zip(weights, residuals, strict=True))
        exact = sum(w * layer.get_delta_weight(name) for w, name in zip(WEIGHTS, NAMES, strict=True))
        torch.testing.assert_close(layer.get_delta_weight("sum"), exact + cross * W, rtol=0, atol=1e-14)
        assert cross.abs().max() < 0.2


@pytest.mark.parametrize("kind", ["ties", "magnitude_prune", "dare_linear", "magnitude_prune_svd"])
def test_a_scalar_diagonal_is_not_pruned(kind):
    model = three("scaled-output-scalar")
    combine(model, kind, density=0.1)
    for layer in layers(model).values():
        residuals, weights = parts(layer)
        want = merged("ties" if kind == "ties" else "linear", [r.q for r in residuals], weights, density=1)
        torch.testing.assert_close(layer.residual("sum").q, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"])
@pytest.mark.parametrize("third", ["additive-scalar", "additive-none"])
def test_diagonals_of_several_kinds_and_on_different_layers(kind, third):
    """None is a vector of zeros; next to a scalar nothing is pruned."""
    model = adapted("llama", "additive-none", target_modules=["q_proj", "up_proj"]).double()
    add(model, "second", "llama", "additive", target_modules=["up_proj", "down_proj"])
    add(model, "third", "llama", third, target_modules=["up_proj"])
    combine(model.double(), kind)
    for key, layer in layers(model).items():
        here = [(w, layer.residual(name).q) for w, name in zip(WEIGHTS, NAMES, strict=True) if name in layer.form]
        size = min(layer.in_features, layer.out_features)
        qs = [torch.zeros(size).double() if q is None else q.expand(size) for _, q in here]
        density = 1 if "up_proj" in key and third == "additive-scalar" else DENSITY
        want = merged(kind, qs, [w for w, _ in here], density)
        torch.testing.assert_close(layer.residual("sum").q, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["ties", "dare_linear_svd", "magnitude_prune_svd", "svd"])
def test_diagonals_alone(kind):
    model = three("multiplicative-r0-2")
    combine(model, kind)
    assert model.peft_config["sum"].r == 0
    for layer in layers(model).values():
        residuals, weights = parts(layer)
        want = merged(kind, [residual.q for residual in residuals], weights)
        torch.testing.assert_close(layer.residual("sum").q, want, rtol=0, atol=1e-14)


def test_a_density_of_1_prunes_nothing_and_says_nothing():
    model = three("additive")
    for kind in ("magnitude_prune", "dare_linear"):
        model.add_weighted_adapter(NAMES, WEIGHTS, kind, combination_type=kind, density=1)
    combine(model, "linear")
    for layer in layers(model).values():
        for kind in ("magnitude_prune", "dare_linear"):
            assert distance(layer.get_delta_weight(kind), layer.get_delta_weight("sum")) < 1e-12


@pytest.mark.parametrize("kind", ["linear", "dare_ties", "magnitude_prune_svd"])
@pytest.mark.parametrize("form", ["scaled-both", "multiplicative-output-3"])
def test_the_combination_runs_trains_and_merges(form, kind):
    model = three(form).float()
    combine(model, kind)
    model.set_adapter("sum")
    want = logits(model, "llama")
    model.merge_adapter()
    assert distance(logits(model, "llama"), want) < 1e-5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(9, 6), nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, ids):
        return self.down(self.up(self.embed(ids)))


@pytest.mark.parametrize("weights", [[0.5, 1.5], [-0.8, 0.3]])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cat", {}),
        ("linear", {}),
        ("svd", {"svd_rank": 2}),
        ("svd", {}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.4, "majority_sign_method": "frequency"}),
        ("ties_svd", {"density": 0.4, "svd_rank": 2}),
        ("magnitude_prune", {"density": 0.4}),
        ("magnitude_prune_svd", {"density": 0.4, "svd_full_matrices": False}),
    ],
)
def test_without_a_diagonal_it_is_what_lora_makes_of_it(kind, options, weights):
    torch.manual_seed(0)
    targets = ["embed", "up", "down"]
    ours = DLoRConfig(r=3, mode="additive", diagonal="none", target_modules=targets, init_weights=False)
    theirs = LoraConfig(r=3, lora_alpha=3, target_modules=targets)
    dlor, lora = get_peft_model(Net(), ours), get_peft_model(Net(), theirs)
    dlor.add_adapter("second", ours)
    lora.add_adapter("second", theirs)
    pairs = [(layer, lora.get_submodule(key)) for key, layer in layers(dlor).items()]
    for ours, theirs in pairs:
        for name in ("default", "second"):
            U, V = (factor[name].weight.data[0] for factor in (ours.dlor_U, ours.dlor_V))
            if name in theirs.lora_A:
                theirs.lora_A[name].weight.data, theirs.lora_B[name].weight.data = V.T.clone(), U.clone()
            else:
                theirs.lora_embedding_A[name].data, theirs.lora_embedding_B[name].data = V.T.clone(), U.clone()
    for model in (dlor, lora):
        model.add_weighted_adapter(["default", "second"], weights, "sum", combination_type=kind, **options)
    for ours, theirs in pairs:
        want = theirs.get_delta_weight("sum")
        assert distance(ours.get_delta_weight("sum"), want) < 1e-5
        assert ours.r["sum"] == theirs.r["sum"]
