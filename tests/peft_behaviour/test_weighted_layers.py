"""add_weighted_adapter on every kind of layer, on tied layers, and on trained tokens."""

import pytest
import torch
from golden.net import IDS, LAYERS, Net
from peft import PeftModel, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from tiny_models import adapted, add, build, distance, layers, logits
from torch import nn

from dlor_peft import DLoRConfig

NAMES, WEIGHTS = ["default", "second"], [0.7, -0.4]
FORMS = {
    "scaled": {},
    "additive": {"mode": "additive"},
    "additive-none": {"mode": "additive", "diagonal": "none"},
    "multiplicative": {"mode": "multiplicative", "side": "output", "depth": 2},
}
KINDS = ["linear", "ties", "dare_ties", "dare_linear", "magnitude_prune"]


def net():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.eval()


def config(form, **changes):
    targets = {"target_modules": LAYERS, "target_parameters": ["experts.weight"]}
    return DLoRConfig(**{"r": 2, "init_weights": False, **targets, **FORMS[form], **changes})


def two(first, second=None, **changes):
    model = get_peft_model(net(), config(first))
    model.add_adapter("second", config(second or first, **changes))
    return model.eval()


def sums(layer):
    return sum(w * layer.get_delta_weight(n) for n, w in zip(NAMES, WEIGHTS, strict=True) if n in layer.form)


def check_exact(model, tolerance=1e-5):
    for key, layer in layers(model).items():
        assert distance(layer.get_delta_weight("sum"), sums(layer)) < tolerance, key


def check_merged_and_reloaded(model, folder, fresh):
    """The new adapter is the same when it is active, merged, and reloaded from disk."""
    model.set_adapter("sum")
    want = model(IDS)
    model.save_pretrained(folder, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(fresh, folder / "sum").eval()
    assert distance(loaded(IDS), want) < 1e-5
    assert distance(model.merge_and_unload()(IDS), want) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_cat_and_svd_are_exact_on_every_kind_of_layer(form, tmp_path):
    model = two(form, r=3)
    assert {type(layer).__name__ for layer in layers(model).values()} == {
        *("Embedding", "Conv", "MultiheadAttention", "UncalledLinear", "Linear", "ParamWrapper"),
    }
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", combination_type="cat")
    check_exact(model)
    model.delete_adapter("sum")
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", svd_rank=10)
    check_exact(model)
    check_merged_and_reloaded(model, tmp_path, net())


@pytest.mark.parametrize("kind", ["svd", "magnitude_prune_svd"])
def test_forms_that_differ(kind, tmp_path):
    model = two("multiplicative", "additive", r=3)
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", kind, svd_rank=18, density=None if kind == "svd" else 1.0)
    check_exact(model)
    check_merged_and_reloaded(model, tmp_path, net())


@pytest.mark.parametrize("kind", [*KINDS, *(f"{kind}_svd" for kind in KINDS[1:])])
@pytest.mark.parametrize("form", ["scaled", "multiplicative"])
def test_pruning_runs_on_every_kind_of_layer(form, kind, tmp_path):
    model = two(form)
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", kind, density=None if kind == "linear" else 0.5)
    if kind == "ties_svd":
        model.add_weighted_adapter(NAMES, WEIGHTS, "clamped", kind, density=0.5, svd_clamp=0.9)
    for layer in layers(model).values():
        assert layer.r["sum"] == layer.form["default"].r * layer.form["default"].depth
        assert layer.get_delta_weight("sum").norm() > 0
    check_merged_and_reloaded(model, tmp_path, net())


def test_each_expert_is_truncated_and_clamped_by_itself():
    model = two("scaled")
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", svd_rank=1)
    model.add_weighted_adapter(NAMES, WEIGHTS, "clamped", svd_rank=1, svd_clamp=0.8)
    layer = model.base_model.model.experts
    (_, U1, V1, _), (_, U2, V2, _) = (layer.residual(name) for name in NAMES)
    for expert in range(2):
        product = WEIGHTS[0] * U1[expert] @ V1[expert].T + WEIGHTS[1] * U2[expert] @ V2[expert].T
        left, S, right = torch.linalg.svd(product)
        U, V = layer.residual("sum")[1:3]
        assert distance(U[expert] @ V[expert].T, S[0] * left[:, :1] @ right[:1]) < 1e-5
        clamped = torch.cat([part[expert].flatten() for part in layer.residual("clamped")[1:3]]).abs()
        assert (clamped == clamped.max()).sum() == 6  # of 12 entries, 60 % are below the bound or on it


def test_expert_weights_of_one_adapter_only():
    model = get_peft_model(net(), config("scaled", target_parameters=None))
    model.add_adapter("second", config("scaled", target_modules=["up"]))
    model.add_adapter("third", config("scaled", target_modules=[]))
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", combination_type="cat")
    check_exact(model)
    model.add_weighted_adapter(["third"], [0.5], "part", combination_type="cat")
    adapted_by_it = [layer for layer in layers(model).values() if "part" in layer.form]
    assert [type(layer).__name__ for layer in adapted_by_it] == ["ParamWrapper"]


def test_dropout_is_left_out_where_a_layer_could_not_have_it():
    model = get_peft_model(net(), config("scaled", target_modules=["up"], target_parameters=None, dlor_dropout=0.1))
    model.add_adapter("second", config("scaled"))
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", combination_type="cat")
    assert model.peft_config["sum"].dlor_dropout == 0


class Gated(nn.Module):
    """A module with an adapted parameter and, inside of it, an adapted layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 6, 6))
        self.gate = nn.Linear(6, 2)

    def forward(self, x):
        return torch.einsum("bi,eoi,be->bo", x, self.weight, self.gate(x))


@pytest.mark.filterwarnings("ignore:target_modules=.* no module was matched:RuntimeWarning")
def test_a_layer_inside_of_an_adapted_module(tmp_path):
    def fresh():
        torch.manual_seed(0)
        return nn.ModuleDict({"experts": Gated()})

    def output(model):
        return model.get_submodule("base_model.model.experts")(torch.linspace(-1, 1, 12).view(2, 6))

    model = get_peft_model(fresh(), config("scaled", target_modules=["gate"]))
    model.add_weighted_adapter(["default"], [0.5], "sum", combination_type="cat")
    assert len(layers(model)) == 2
    for layer in layers(model).values():
        assert distance(layer.get_delta_weight("sum"), 0.5 * layer.get_delta_weight("default")) < 1e-5
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(fresh(), tmp_path / "sum")
    assert distance(output(loaded), output(model)) < 1e-6


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("kind", ["cat", "svd", "linear", "ties_svd"])
@pytest.mark.parametrize("form", FORMS)
def test_tied_layers_stay_tied(form, kind, tmp_path):
    def fresh():
        return build("llama", tie_word_embeddings=True)

    tied = {"target_modules": ["q_proj", "embed_tokens"], "target_parameters": None, "ensure_weight_tying": True}
    model = get_peft_model(fresh(), config(form, **tied))
    model.add_adapter("second", config(form, **tied))
    base = model.base_model.model
    embedding, head = base.model.embed_tokens, base.lm_head
    if "second" not in head.tied_to:
        # PEFT 0.21 ties no layer that is adapted already
        head.update_layer("second", 2, FORMS[form].get("depth", 1), model.peft_config["second"], tied_to=embedding)
    model.eval().add_weighted_adapter(NAMES, WEIGHTS, "sum", kind, density=0.5 if "ties" in kind else None)
    assert head.tied_to["sum"] is embedding
    torch.testing.assert_close(head.get_delta_weight("sum"), embedding.get_delta_weight("sum"))
    if kind == "cat":
        check_exact(model)
    model.set_adapter("sum")
    want = logits(model, "llama")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(fresh(), tmp_path / "sum").eval()
    assert loaded.base_model.model.lm_head.tied_to
    assert distance(logits(loaded, "llama"), want) < 1e-5
    model.merge_adapter()
    assert distance(logits(model, "llama"), want) < 1e-5


def trained_tokens(model):
    return next(module for module in model.modules() if isinstance(module, TrainableTokensLayer))


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning")
@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")
def test_trained_tokens_are_summed(kind, tmp_path):
    """Each token moves by the weighted sum of its moves; one that an adapter does not train does not move there."""
    model = adapted(kind, "additive", trainable_token_indices=[5, 1, 2])
    add(model, "second", kind, "additive", trainable_token_indices=[7, 5])
    tokens = trained_tokens(model)
    E = tokens.base_layer.weight.detach().clone()
    with torch.no_grad():
        for rows in tokens.trainable_tokens_delta.values():
            rows.add_(torch.randn(rows.shape))
    for name, combination_type in [("sum", "cat"), ("other", "svd")]:
        model.add_weighted_adapter(NAMES, WEIGHTS, name, combination_type)
        moves = [tokens.get_merged_weights([name]) - E for name in (*NAMES, name)]
        assert distance(moves[2], WEIGHTS[0] * moves[0] + WEIGHTS[1] * moves[1]) < 1e-5
        assert moves[2].norm(dim=-1).nonzero().flatten().tolist() == [1, 2, 5, 7]
    model.set_adapter("sum")
    want = logits(model, kind)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert distance(logits(PeftModel.from_pretrained(build(kind), tmp_path / "sum").eval(), kind), want) < 1e-6
    model.merge_adapter()
    # what it replaces are the base model's tokens, though others are in the weight by now
    model.add_weighted_adapter(NAMES, WEIGHTS, "while merged", "cat")
    assert distance(logits(model, kind), want) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(tokens.base_layer.weight, E)
    model.set_adapter("while merged")
    assert distance(logits(model, kind), want) < 1e-5
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(tokens.base_layer.weight, E)
