"""What two adapters must have in common to be swapped, and what is swapped beside the adapted layers."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from swapping import assert_refused_without_a_trace, saved, swap
from tiny_models import adapter_parameters, add, build, config_of, distance, layers, logits

from dlor_peft import DLoRConfig

# PEFT, of every embedding that it saves, and of every model whose embeddings are tied
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning"),
]
EMBEDDED = {"target_modules": ["embed_tokens", "q_proj", "lm_head"], "side": "output"}


def make(kind="llama", form="scaled", seed=5, base=0, tied=False, **changes):
    model = build(kind, seed=base, **({"tie_word_embeddings": True} if tied else {}))
    torch.manual_seed(seed)
    model = get_peft_model(model, config_of(kind, form, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.normal_()
    return model


OTHER_FORMS = {
    "mode": ({"mode": "scaled"}, {"mode": "additive"}, "mode='additive'"),
    "side": ({"side": "input"}, {"side": "output"}, "side='input'.*side='output'"),
    "auto on the other side": ({"side": "auto"}, {"side": "output"}, "side='input'.*side='output'"),
    "both sides": ({"side": "both"}, {"side": "output"}, "side='both'.*side='output'"),
    "diagonal": ({}, {"diagonal": "scalar"}, "diagonal='scalar'"),
    "no diagonal": ({}, {"diagonal": "none"}, "diagonal='none'"),
    "dropout": ({}, {"dlor_dropout": 0.1}, "dlor_dropout=0.1"),
    "depth": (
        {"mode": "multiplicative", "side": "input"},
        {"mode": "multiplicative", "side": "input", "depth": 2},
        "largest depth first",
    ),
}


@pytest.mark.parametrize("what", OTHER_FORMS)
@pytest.mark.parametrize("active", [True, False])
def test_another_form_is_refused(what, active, tmp_path):
    """Also of layers whose input is as wide as their output, where the tensors would fit."""
    here, there, match = OTHER_FORMS[what]
    model = make(target_modules=["q_proj"], **here)
    if not active:
        # of the other form, which PEFT's own comparison would be with
        add(model, "active", "llama", "scaled", target_modules=["q_proj"], **there)
        model.set_adapter("active")
    path = saved(make(target_modules=["q_proj"], **there), tmp_path)
    assert_refused_without_a_trace(ValueError, match, model, path)


def test_into_an_inactive_adapter_of_another_form_than_the_active_one(tmp_path):
    model = make(form="additive", seed=1)
    add(model, "second", "llama", "multiplicative-input-3")
    before = logits(model, "llama")
    other = make(form="multiplicative-input-3")
    swap(model, saved(other, tmp_path), "second")
    assert torch.equal(logits(model, "llama"), before)
    model.set_adapter("second")
    assert torch.equal(logits(model, "llama"), logits(other, "llama"))
    assert model.peft_config["second"].mode == "multiplicative"


@pytest.mark.parametrize(("here", "there"), [("auto", "input"), ("input", "auto")])
def test_the_side_that_auto_means_is_the_same(here, there, tmp_path):
    targets = {"target_modules": ["q_proj", "up_proj"]}
    model, other = make(side=here, seed=2, **targets), make(side=there, **targets)
    swap(model, saved(other, tmp_path / "other"))
    assert torch.equal(logits(model, "llama"), logits(other, "llama"))
    again = PeftModel.from_pretrained(build("llama"), saved(model, tmp_path / "again"))
    assert torch.equal(logits(again, "llama"), logits(other, "llama"))


def test_a_form_is_compared_where_both_adapt(tmp_path):
    """ "auto" means the output side on down_proj, which the other one leaves alone."""
    model, other = make(seed=2), make(side="input", target_modules=["q_proj"])
    swap(model, saved(other, tmp_path))
    assert distance(logits(model, "llama"), logits(other, "llama")) < 1e-6


@pytest.mark.parametrize("save_embedding_layers", ["auto", False])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings(tied, save_embedding_layers, tmp_path):
    """PEFT saves their base weights beside the adapter, and in half precision they are rounded."""
    tying = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True} if tied else {}
    changes = {**EMBEDDED, **tying}
    model, other = make(seed=2, tied=tied, **changes, r=2), make(tied=tied, **changes)
    path = saved(other, tmp_path / "other", save_embedding_layers=save_embedding_layers)
    swap(model, path)
    assert torch.equal(logits(model, "llama"), logits(other, "llama"))
    assert all(layer.r["default"] == layer.form["default"].r == 3 for layer in layers(model).values())
    base = build("llama", **({"tie_word_embeddings": True} if tied else {}))
    again = PeftModel.from_pretrained(base, saved(model, tmp_path / "again")).eval()
    assert torch.equal(logits(again, "llama"), logits(other, "llama"))
    half = make(seed=2, tied=tied, **changes).bfloat16()
    swap(half, path)


@pytest.mark.parametrize("r", [0, 2])
def test_tied_layers_share_what_they_grow_to(r, tmp_path):
    changes = {"target_modules": ["embed_tokens", "q_proj"], "side": "output", "ensure_weight_tying": True}
    model, other = make(seed=2, tied=True, r=r, **changes), make(tied=True, r=4, **changes)
    swap(model, saved(other, tmp_path))
    embedding, head = (layers(model)[f"base_model.model.{name}"] for name in ("model.embed_tokens", "lm_head"))
    for part in ("dlor_diag", "dlor_U", "dlor_V"):
        assert getattr(embedding, part)["default"] is getattr(head, part)["default"]
    assert torch.equal(logits(model, "llama"), logits(other, "llama"))
    config = model.peft_config["default"]
    assert (config.r, config.rank_pattern) == (4, {})


def test_embeddings_of_another_base_model_change_nothing(tmp_path):
    path = saved(make(base=1, **EMBEDDED), tmp_path)
    assert_refused_without_a_trace(ValueError, "base_layer.weight, of which this model", make(**EMBEDDED), path)


def test_what_is_trained_in_full_is_swapped(tmp_path):
    changes = {"modules_to_save": ["classifier"], "trainable_token_indices": {"word_embeddings": [1, 3]}}
    model, other = make("bert", seed=2, **changes), make("bert", **changes)
    assert distance(logits(model, "bert"), logits(other, "bert")) > 1e-3
    swap(model, saved(other, tmp_path))
    assert torch.equal(logits(model, "bert"), logits(other, "bert"))


FULL = {
    "modules_to_save": (
        {"modules_to_save": ["classifier"]},
        (RuntimeError, ValueError),
        "classifier.*modules_to_save",
    ),
    "tokens": ({"trainable_token_indices": {"word_embeddings": [1, 3]}}, ValueError, r"tokens .*\[1, 3\]"),
    "biases": ({"bias": "all"}, ValueError, "bias='all'.*trained biases are not swapped"),
}


@pytest.mark.parametrize("what", FULL)
@pytest.mark.parametrize("here", [True, False])
def test_what_only_one_trains_in_full_is_refused(what, here, tmp_path):
    changes, error, match = FULL[what]
    one, none = make("bert", **changes), make("bert")
    model, other = (one, none) if here else (none, one)
    assert_refused_without_a_trace(error, match, model, saved(other, tmp_path))


def test_other_tokens_are_refused(tmp_path):
    model, other = (make("bert", trainable_token_indices={"word_embeddings": ids}) for ids in ([1, 3], [1, 4]))
    assert_refused_without_a_trace(ValueError, r"\[1, 3\].*\[1, 4\]", model, saved(other, tmp_path))


@pytest.mark.parametrize(
    "change", ["without U", "without V", "without the diagonal", "narrow V", "flat", "0-d", "depth 0"]
)
def test_a_damaged_file_changes_nothing(change, tmp_path):
    path = saved(make(), tmp_path)
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if name.endswith("dlor_V.weight"))
    diagonal = key.replace("dlor_V", "dlor_diag")
    if change == "narrow V":
        tensors[key] = tensors[key][..., :2].contiguous()
    elif change == "flat":
        tensors[key] = tensors[key].flatten()
    elif change in ("0-d", "depth 0"):
        tensors[diagonal] = torch.ones(()) if change == "0-d" else tensors[diagonal][:0]
    else:
        part = {"without U": "dlor_U", "without V": "dlor_V"}.get(change, "dlor_diag")
        del tensors[key.replace("dlor_V", part)]
    save_file(tensors, file)
    assert_refused_without_a_trace(ValueError, "does not fit", make(seed=2), path)


def test_a_layer_that_only_the_other_adapts_is_refused(tmp_path):
    path = saved(make(), tmp_path)
    assert_refused_without_a_trace(
        RuntimeError, "unexpected keys.*loaded first", make(target_modules=["q_proj"]), path
    )


def test_an_untied_adapter_into_a_tied_one_is_refused(tmp_path):
    changes = {"target_modules": ["embed_tokens", "q_proj"], "side": "output"}
    other = make(tied=True, **{**changes, "target_modules": ["embed_tokens", "lm_head"]})
    model = make(tied=True, ensure_weight_tying=True, **changes)
    assert_refused_without_a_trace(ValueError, "ties .*lm_head", model, saved(other, tmp_path))


# PEFT looks for patterns of parameters among the modules
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_experts(tmp_path):
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = torch.nn.Parameter(torch.randn(3, 4, 6)), torch.nn.Parameter(torch.randn(3, 6, 4))

        def forward(self, x):
            return torch.einsum("eoh,ehi,bi->bo", self.down, self.up, x)

    def adapted(seed, **changes):
        net = torch.nn.ModuleDict({"experts": Experts()})
        torch.manual_seed(seed)
        config = DLoRConfig(target_parameters=["experts.up", "experts.down"], init_weights=False, **changes)
        return get_peft_model(net, config)

    def answer(model):
        return model.base_model.model["experts"](torch.ones(2, 6))

    model, other = adapted(1, r=1), adapted(2, r=2, rank_pattern={"experts.up": 3})
    swap(model, saved(other, tmp_path / "other"))
    torch.testing.assert_close(answer(model), answer(other))
    config = model.peft_config["default"]
    assert {config.for_layer(f"experts.{name}").r for name in ("up", "down")} == {2, 3}
    again = PeftModel.from_pretrained(torch.nn.ModuleDict({"experts": Experts()}), saved(model, tmp_path / "again"))
    assert torch.equal(answer(again), answer(model))


def test_attention(tmp_path):
    def adapted(seed, **changes):
        torch.manual_seed(0)
        net = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        torch.manual_seed(seed)
        config = DLoRConfig(target_modules=["self_attn", "linear1"], init_weights=False, **changes)
        return get_peft_model(net, config).eval()

    model, other = adapted(1, r=1), adapted(2, r=2, rank_pattern={"self_attn": 3})
    swap(model, saved(other, tmp_path))
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(model(x), other(x))
    config = model.peft_config["default"]
    assert (config.r, config.rank_pattern) in [(3, {"linear1": 2}), (2, {"self_attn": 3})]


def test_nan_and_other_dtypes_are_taken_as_they_are(tmp_path):
    other = make()
    with torch.no_grad():
        next(iter(adapter_parameters(other).values())).fill_(torch.nan)
    model = make(seed=2)
    swap(model, saved(other.half(), tmp_path))
    for name, value in adapter_parameters(model).items():
        torch.testing.assert_close(value, adapter_parameters(other)[name].float(), equal_nan=True)
