"""add_weighted_adapter, "svd": full rank is the exact sum, less is the best low-rank part; and what is refused."""

import pytest
import torch
from tiny_models import adapted, add, distance, layers, logits

MIXED = [
    ("scaled-both", "scaled-both"),
    ("scaled-both", "multiplicative-output-3"),
    ("additive", "multiplicative-input-3"),
    ("scaled-input", "scaled-output"),
    ("multiplicative-input-3", "multiplicative-output-3"),
    ("additive-r0", "scaled-both-scalar-r0"),
]
WEIGHTS = [0.7, -0.4]


def pair(kind, first, second, **changes):
    model = adapted(kind, first, **changes)
    add(model, "second", kind, second)
    return model


def wanted(layer):
    return sum(w * layer.get_delta_weight(n) for n, w in zip(["default", "second"], WEIGHTS, strict=True))


def combine(model, rank, name="sum"):
    model.add_weighted_adapter(["default", "second"], WEIGHTS, name, combination_type="svd", svd_rank=rank)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("first", "second"), MIXED)
def test_full_rank_is_the_exact_sum_of_any_forms(kind, first, second):
    model = pair(kind, first, second)
    combine(model, 48)
    assert model.peft_config["sum"].mode == "additive"
    for layer in layers(model).values():
        assert distance(layer.get_delta_weight("sum"), wanted(layer)) < 1e-5


@pytest.mark.parametrize("form", ["additive", "scaled", "multiplicative-output-3"])
def test_full_rank_equals_cat_for_one_form(form):
    model = pair("llama", form, form)
    combine(model, 48)
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "cat", combination_type="cat")
    for layer in layers(model).values():
        assert distance(layer.get_delta_weight("sum"), layer.get_delta_weight("cat")) < 1e-5


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize(("first", "second"), MIXED)
def test_truncation_of_mixed_forms_is_the_best_of_its_rank(first, second, rank):
    model = pair("llama", first, second)
    combine(model, rank)
    for layer in layers(model).values():
        want, got = wanted(layer), layer.get_delta_weight("sum")
        assert torch.linalg.matrix_rank(got, rtol=1e-5) <= rank
        best = torch.linalg.svdvals(want)[rank:].square().sum().sqrt()
        assert torch.linalg.matrix_norm(got - want).item() == pytest.approx(best.item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("form", ["additive", "scaled", "multiplicative-output-3"])
def test_truncation_of_one_form_keeps_the_diagonal_and_the_best_low_rank_part(form):
    model = pair("llama", form, form)
    combine(model, 2)
    for layer in layers(model).values():
        residuals = [layer.residual(name) for name in ("default", "second")]
        parts = [w * residual.U @ residual.V.T for w, residual in zip(WEIGHTS, residuals, strict=True)]
        diagonal = sum(w * residual.q for w, residual in zip(WEIGHTS, residuals, strict=True))
        low_rank, got = sum(parts), layer.residual("sum")
        best = torch.linalg.svdvals(low_rank)[2:].square().sum().sqrt()
        assert distance(got.q, diagonal) < 1e-5
        assert got.U.shape[1] == 2
        assert torch.linalg.matrix_norm(got.U @ got.V.T - low_rank).item() == pytest.approx(best.item(), rel=1e-3)


def test_the_rank_is_the_largest_of_the_adapters_by_default():
    model = pair("llama", "additive", "multiplicative-input-3")
    combine(model, None)
    assert model.peft_config["sum"].r == 9
    assert {layer.r["sum"] for layer in layers(model).values()} == {9}


def test_the_sum_runs_and_merges():
    model = pair("llama", "scaled-both", "multiplicative-input-3")
    combine(model, 5)
    model.set_adapter("sum")
    want = logits(model, "llama")
    model.merge_adapter()
    assert distance(logits(model, "llama"), want) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"r": 3, "rank_pattern": {".*": 0}}], ids=["r", "rank_pattern"])
def test_diagonals_alone_have_no_default_rank(changes):
    """Two diagonal-only adapters of different modes have rank 0 together, their sum has not."""
    model = pair("llama", "additive-r0", "scaled-both-scalar-r0", **changes)
    with pytest.raises(ValueError, match="svd_rank"):
        combine(model, None)
    combine(model, 2)


def test_the_default_rank_counts_rank_pattern():
    model = pair("llama", "additive-r0", "scaled-both-scalar-r0", rank_pattern={"q_proj": 5})
    combine(model, None)
    assert model.peft_config["sum"].r == 5


@pytest.mark.parametrize("name", ["a.b", "half"])
def test_a_name_that_torch_refuses_leaves_no_config(name):
    """No module name holds a dot, and "half" is a method of every module."""
    model = pair("llama", "additive", "additive")
    with pytest.raises(KeyError):
        model.add_weighted_adapter(["default", "second"], WEIGHTS, name, combination_type="cat")
    assert list(model.peft_config) == ["default", "second"]


REFUSED = [
    ({"adapters": ["default", "nobody"]}, "must name existing adapters.*'default', 'second'"),
    ({"adapters": [], "weights": []}, "must name existing adapters"),
    ({"weights": [1.0]}, "2 adapters need as many weights, but got 1"),
    ({"combination_type": "ties"}, "combination_type must be one of 'cat', 'svd'.*'ties'"),
    ({"adapter_name": "second"}, "'second' exists already: choose another"),
    ({"svd_rank": 0}, "svd_rank=0 must be at least 1"),
    ({"svd_rank": -2}, "svd_rank=-2 must be at least 1"),
    ({"svd_rank": 4, "combination_type": "cat"}, 'goes with combination_type="svd"'),
    ({"combination_type": "cat"}, '"cat" needs adapters of one mode.*Use combination_type="svd"'),
    ({"adapter_name": "lor"}, "part of the parameter prefix"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=str)
def test_a_refusal_leaves_the_model_as_it_was(arguments, message):
    model = pair("llama", "scaled-both", "additive")
    keys, want = set(model.state_dict()), logits(model, "llama")
    call = {"adapters": ["default", "second"], "weights": WEIGHTS, "adapter_name": "sum", **arguments}
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**call)
    assert list(model.peft_config) == ["default", "second"]
    assert set(model.state_dict()) == keys
    assert distance(logits(model, "llama"), want) == 0


def test_trained_biases_are_refused_without_a_trace():
    model = adapted("llama", "additive", bias="dlor_only")
    add(model, "second", "llama", "additive")
    with pytest.raises(ValueError, match="bias"):
        model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", combination_type="cat")
    assert list(model.peft_config) == ["default", "second"]


def test_trained_tokens_and_twice_saved_modules_are_refused():
    model = adapted("llama", trainable_token_indices=[1, 2])
    with pytest.raises(ValueError, match="trainable_token_indices cannot be combined"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    model = adapted("bert", modules_to_save=["classifier"])
    add(model, "second", "bert", "scaled", modules_to_save=["classifier"])
    with pytest.raises(ValueError, match=r"save the same module in full .*: default, second"):
        model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum")
