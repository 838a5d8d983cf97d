"""add_weighted_adapter: what is refused, in which words, and that the model is left as it was."""

import pytest
from peft import get_peft_model
from tiny_models import adapted, add, build, distance, layers, logits

from dlor_peft import DLoRConfig

WEIGHTS = [0.7, -0.4]
SVD_TYPES = "'svd', 'ties_svd', 'dare_ties_svd', 'dare_linear_svd', 'magnitude_prune_svd'"

REFUSED = [
    ({"adapters": ["default", "nobody"]}, "must name existing adapters.*'default', 'second'"),
    ({"adapters": [], "weights": []}, "must name existing adapters"),
    ({"weights": [1.0]}, "2 adapters need as many weights, but got 1"),
    ({"adapter_name": "second"}, "'second' exists already: choose another"),
    ({"adapter_name": "lor"}, "part of the parameter prefix"),
    ({"combination_type": "tie"}, "must be one of 'svd', 'linear', 'cat', 'ties'.*'tie'. Did you mean 'ties'"),
    ({"combination_type": None}, "must be one of .*None. Use"),
    ({"combination_type": "cat"}, '"cat" needs adapters of one mode.*Use combination_type="svd"'),
    ({"combination_type": "linear"}, '"linear" acts on .* one mode and one side.*Use combination_type="svd"'),
    ({"combination_type": "ties", "density": 0.5}, '"ties" acts on .*Use combination_type="ties_svd"'),
    ({"svd_rank": 0}, "svd_rank=0 .* must be at least 1"),
    ({"svd_rank": -2}, "svd_rank=-2 .* must be at least 1"),
    (
        {"svd_rank": 4, "combination_type": "cat"},
        f"svd_rank=4 .*'cat': it goes with combination_type {SVD_TYPES} only",
    ),
    ({"svd_clamp": 0.99, "combination_type": "linear"}, f"svd_clamp=0.99 .*goes with .*{SVD_TYPES} only"),
    ({"svd_clamp": 0.5}, "svd_clamp=0.5 .* above 0.5 and up to 1"),
    ({"svd_clamp": 99}, "svd_clamp=99 .* above 0.5 and up to 1"),
    ({"svd_driver": "gesvd", "combination_type": "cat"}, "svd_driver='gesvd' .*goes with"),
    ({"svd_driver": "qr"}, "svd_driver='qr' .* must be one of 'gesvd', 'gesvdj', 'gesvda'"),
    ({"svd_driver": "gesvd"}, "svd_driver='gesvd' names a method of CUDA.* Leave svd_driver out"),
    ({"combination_type": "ties"}, "density=None with combination_type 'ties'.*Pass 0.5"),
    ({"combination_type": "dare_linear_svd", "density": 0}, "density=0 .* above 0 and up to 1"),
    ({"combination_type": "magnitude_prune", "density": 1.5}, "density=1.5 .* above 0 and up to 1"),
    (
        {"combination_type": "ties_svd", "density": 0.5, "majority_sign_method": "most"},
        "majority_sign_method='most' .* must be one of 'total', 'frequency'",
    ),
    (
        {"majority_sign_method": "frequency"},
        "majority_sign_method='frequency' .*'ties', 'dare_ties', 'ties_svd', 'dare_ties_svd' only",
    ),
]


def refused(model, message, adapters=("default", "second"), weights=WEIGHTS, adapter_name="sum", **arguments):
    keys, known = set(model.state_dict()), list(model.peft_config)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(list(adapters), weights, adapter_name, **arguments)
    assert list(model.peft_config) == known
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=str)
def test_a_refusal_leaves_the_model_as_it_was(arguments, message):
    model = adapted("llama", "scaled-both")
    add(model, "second", "llama", "additive")
    want = logits(model, "llama")
    refused(model, message, **arguments)
    assert distance(logits(model, "llama"), want) == 0


@pytest.mark.parametrize("name", ["a.b", "half"])
def test_a_name_that_torch_refuses_leaves_no_config(name):
    """No module name holds a dot, and "half" is a method of every module."""
    model = adapted("llama", "additive")
    with pytest.raises(KeyError):
        model.add_weighted_adapter(["default"], [1.0], name, combination_type="cat")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_tensors_of_different_ranks_are_not_combined(kind):
    model = adapted("llama", "scaled", r=2)
    add(model, "second", "llama", "scaled", r=2, rank_pattern={"layers.1.self_attn.k_proj": 5})
    remedy = "svd" if kind == "linear" else f"{kind}_svd"
    message = rf'one rank .*layers.1.self_attn.k_proj\' it is 2 \(default\), 5 \(second\).*combination_type="{remedy}"'
    refused(model, message, combination_type=kind, density=None if kind == "linear" else 0.5)


def test_tensors_of_different_sides_are_not_combined():
    model = adapted("llama", "scaled-input")
    add(model, "second", "llama", "scaled-both")
    refused(model, "one mode and one side", combination_type="linear")


def test_a_density_that_is_not_needed_is_reported_to_the_caller():
    model = adapted("llama", "scaled")
    with pytest.warns(UserWarning, match="density=0.5 has no effect, as combination_type 'cat'") as warned:
        model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="cat", density=0.5)
    assert warned[0].filename == __file__


def test_trained_biases_are_refused():
    model = adapted("llama", "additive", bias="dlor_only")
    add(model, "second", "llama", "additive")
    refused(model, "bias", combination_type="cat")


def test_modules_that_two_adapters_save_in_full_are_refused():
    model = adapted("bert", modules_to_save=["classifier"])
    add(model, "second", "bert", "scaled", modules_to_save=["classifier"])
    refused(model, r"same module with modules_to_save, but found 1 such instance\(s\)\. Of default, second, one")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_layers_that_only_some_adapters_tie_are_refused():
    def config(**changes):
        return DLoRConfig(r=2, target_modules=["embed_tokens", "lm_head"], **changes)

    model = get_peft_model(build("llama", tie_word_embeddings=True), config(ensure_weight_tying=True))
    model.add_adapter("second", config())
    refused(model, "'lm_head' shares .* in some of default, second .* Train all of them tied")


def test_adapters_of_rank_0_and_of_different_modes_suggest_no_rank():
    model = adapted("llama", "additive-r0")
    add(model, "second", "llama", "scaled-both-scalar-r0")
    refused(model, "pass svd_rank", combination_type="svd")
    refused(model, "pass svd_rank", combination_type="ties_svd", density=0.5)


def test_the_first_config_is_not_changed():
    model = adapted("llama", "scaled")
    before = model.peft_config["default"].to_dict()
    model.add_weighted_adapter(["default"], [0.5], "sum")
    assert model.peft_config["default"].to_dict() == before
    assert {layer.r["sum"] for layer in layers(model).values()} == {3}
