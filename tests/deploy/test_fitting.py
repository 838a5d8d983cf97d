"""Which form an update gets: the nearest, where parameters count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlor_peft.deploy.fitting import Wanted, fit
from dlor_peft.maths import alignment_index
from dlor_peft.nearest import lora_residuals, nearest


def random(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def noisy(update, share=0.05):
    noise = random(update.shape, seed=9)[0]
    return update + share * noise * update.norm() / noise.norm()


def test_scaled_rows_and_columns():
    W, rows, columns = random((40, 30), (40, 1), (30,))
    delta = noisy(0.1 * rows * W)
    assert fit(delta, W, Wanted(2)).form == "scaled output"
    assert fit(delta.mT, W.mT, Wanted(2)).form == "scaled input"
    assert fit(noisy(0.1 * (rows + columns) * W), W, Wanted(2)).form == "scaled both"


def test_an_identity():
    W = random((40, 40))[0]
    assert fit(noisy(torch.eye(40)), W, Wanted(2)).form == "additive"


@pytest.mark.parametrize(("shape", "form"), [((60, 20), "multiplicative input"), ((20, 60), "multiplicative output")])
def test_a_product_with_the_smaller_side_has_fewer_parameters(shape, form):
    W, U, V, q = random(shape, (20, 2), (20, 2), (20,))
    P = torch.diag(q) + U @ V.mT
    delta = W @ P if shape[0] > shape[1] else P @ W
    found = fit(noisy(delta, 0.01), W, Wanted(2))
    assert found.form == form
    assert found.num_parameters == 20 * (2 * 2 + 1)
    # what leaves the span of W is not
    assert fit(noisy(delta, 0.3), W, Wanted(2)).mode == "scaled"


def test_a_second_diagonal_must_bring_more_than_its_parameters_bring_lora():
    W, noise = random((32, 64), (32, 64), seed=4)
    found = fit(noise, W, Wanted(2))
    both = nearest(noise, W, 2, "scaled", "both")
    assert both.residual < found.residual
    assert found.side != "both"
    assert fit(noise, W, Wanted(2, side="both")).residual == pytest.approx(both.residual)


def test_what_is_told_of_a_layer():
    W, delta = random((12, 20), (12, 20))
    found = fit(0.5 * delta, W, Wanted(20, mode="scaled", side="output"))
    assert found.r == 12
    assert found.shape == (12, 20)
    assert found.size == pytest.approx(0.5 * delta.norm().item())
    assert found.change == pytest.approx((0.5 * delta.norm() / W.norm()).item())
    assert found.row_alignment == pytest.approx(alignment_index(delta, W).item(), rel=1e-5)
    assert found.column_alignment == pytest.approx(alignment_index(delta.mT, W.mT).item(), rel=1e-5)
    assert {name: tuple(t.shape) for name, t in found.tensors.items()} == {
        "dlor_diag": (1, 12), "dlor_U": (1, 12, 12), "dlor_V": (1, 20, 12),
    }  # fmt: skip


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(2, 12), st.integers(0, 5))
def test_no_sum_does_better_beside_lora(seed, O, I, r):
    W, delta = random((O, I), (O, I), seed=seed)
    found = fit(delta, W, Wanted(r))
    if found.mode == "multiplicative":
        return
    gain = found.lora_residual**2 - found.residual**2
    for mode, side in Wanted(r).candidates(O, I):
        if mode != "multiplicative":
            other = nearest(delta, W, min(r, O, I), mode, side)
            (lora,) = lora_residuals(delta, [other.num_parameters])
            assert gain >= lora**2 - other.residual**2 - 1e-5
