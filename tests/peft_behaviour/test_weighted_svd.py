"""add_weighted_adapter, "svd": full rank is the exact sum, less is the best low-rank part."""

import pytest
import torch
from tiny_models import adapted, add, distance, layers, logits

from dlor_peft.weighted import Combination

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


def test_the_rank_asked_for_is_the_rank_even_where_less_would_do():
    model = pair("llama", "scaled", "scaled")
    combine(model, 10)
    assert model.peft_config["sum"].r == 10
    assert {layer.r["sum"] for layer in layers(model).values()} == {10}


@pytest.mark.parametrize(("first", "second"), [("scaled", "scaled"), ("scaled-both", "multiplicative-output-3")])
def test_clamped_factors(first, second):
    """The entries of U and V beyond the quantile are cut off there; full or reduced matrices make no difference."""
    model = pair("llama", first, second)
    names = ["default", "second"]
    for name, options in [("plain", {}), ("reduced", {"svd_full_matrices": False}), ("clamped", {"svd_clamp": 0.9})]:
        model.add_weighted_adapter(names, WEIGHTS, name, svd_rank=4, **options)
    for layer in layers(model).values():
        plain, reduced, clamped = (layer.residual(name) for name in ("plain", "reduced", "clamped"))
        assert distance(reduced.U @ reduced.V.T, plain.U @ plain.V.T) < 1e-5
        entries = torch.cat([plain.U.flatten(), plain.V.flatten()])
        bound = torch.quantile(torch.cat([entries, -entries]), 0.9)
        largest = max(clamped.U.abs().max(), clamped.V.abs().max())
        assert largest.item() == pytest.approx(bound.item(), rel=0.05)
        want = plain.U.clamp(-largest, largest) @ plain.V.clamp(-largest, largest).T
        assert distance(clamped.U @ clamped.V.T, want) < 1e-4


def test_all_is_clamped_at_the_largest_where_nothing_has_to_be_truncated():
    model = pair("llama", "scaled", "scaled")
    combine(model, 6, "plain")
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", svd_rank=6, svd_clamp=0.75)
    for layer in layers(model).values():
        got, plain = layer.residual("sum"), layer.residual("plain")
        kept = torch.cat([got.U.flatten(), got.V.flatten()]).abs()
        assert (kept == kept.max()).float().mean().item() == pytest.approx(0.5, abs=0.02)
        assert distance(got.U @ got.V.T, plain.U @ plain.V.T) > 0.05


def test_the_options_reach_the_decomposition(monkeypatch):
    given, svd = [], torch.linalg.svd

    def recorded(matrix, **options):
        given.append(options)
        return svd(matrix, full_matrices=options["full_matrices"])

    monkeypatch.setattr(torch.linalg, "svd", recorded)
    how = Combination("svd", svd_full_matrices=False, svd_driver="gesvdj")
    how.of_updates([torch.randn(4, 5)], [1.0], rank=2)
    assert given == [{"full_matrices": False, "driver": "gesvdj"}]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="svd_driver is for CUDA")
@pytest.mark.parametrize("driver", [None, "gesvd", "gesvdj", "gesvda"])
def test_drivers_agree(driver):
    model = pair("llama", "scaled", "scaled").cuda()
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", svd_rank=2, svd_driver=driver)
    on_cpu = pair("llama", "scaled", "scaled")
    combine(on_cpu, 2)
    for got, want in zip(layers(model).values(), layers(on_cpu).values(), strict=True):
        assert distance(got.get_delta_weight("sum").cpu(), want.get_delta_weight("sum")) < 1e-4
