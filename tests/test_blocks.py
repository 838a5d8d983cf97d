"""Blocks are of no consequence: every form against its formula, however small they are, in any layout and order."""

import itertools

import pytest
import torch
from test_form import FORMS, formula, make

from dlor_peft import blocks
from dlor_peft.blocks import Part, round_to_nearest, write_adapted


def poisoned(*shape, dtype=torch.float64):
    return torch.full(shape, torch.nan, dtype=dtype)


@pytest.fixture(params=[1, 10, 10**6])
def small_blocks(request, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", request.param)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("mode", "side", "depth", "diagonal", "r"), FORMS)
def test_every_form(mode, side, depth, diagonal, r, is_transposed, small_blocks):
    for I, O in ((7, 5), (5, 7), (130, 3)):
        form, tensors = make(mode, side, depth, diagonal, r, I, O)
        W = torch.randn(O, I, dtype=torch.float64)
        out = poisoned(I, O).T if is_transposed else poisoned(O, I)
        write_adapted(W, [Part("a", form, form.residual(tensors), 0.7)], out)
        torch.testing.assert_close(out, formula(form, tensors, W, 0.7), rtol=1e-12, atol=1e-12)


def test_several_in_order(small_blocks):
    made = [
        make(mode, side, 1, "vector", 2, 6, 8)
        for mode, side in (("multiplicative", "input"), ("scaled", "both"), ("multiplicative", "output"))
    ]
    for some in itertools.permutations(made, 2):
        W, out = torch.randn(8, 6, dtype=torch.float64), poisoned(8, 6)
        write_adapted(W, [Part("a", form, form.residual(tensors)) for form, tensors in some], out)
        for form, tensors in some:
            W = formula(form, tensors, W, 1.0)
        torch.testing.assert_close(out, W, rtol=1e-12, atol=1e-12)


def test_experts(small_blocks):
    form, _ = make("multiplicative", "output", 2, "vector", 2, 6, 8)
    form = form.of_experts(3)
    tensors = {name: 0.3 * torch.randn(shape, dtype=torch.float64) for name, shape in form.shapes.items()}
    W, out = torch.randn(3, 8, 6, dtype=torch.float64), poisoned(3, 8, 6)
    write_adapted(W, [Part("a", form, form.residual(tensors))], out)
    for e in range(3):
        of_expert = {name: tensor[:, e] for name, tensor in tensors.items()}
        torch.testing.assert_close(out[e], formula(form, of_expert, W[e], 1.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_rounding(dtype, small_blocks):
    form, tensors = make("scaled", "output", 1, "vector", 2, 6, 8, torch.float32)
    W, out = torch.randn(8, 6).to(dtype), poisoned(8, 6, dtype=dtype)

    def finish(block):
        round_to_nearest(block)
        return block

    seen = write_adapted(W, [Part("a", form, form.residual(tensors))], out, finish)
    wide = torch.cat([block.adapted for block in seen])
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), formula(form, _double(tensors), W.double(), 1.0), rtol=1e-5, atol=1e-6)
    assert torch.equal(out, wide.to(dtype))
    assert torch.equal(torch.cat([block.before for block in seen]), W.float())
    assert len({block.at for block in seen}) == len(seen)


def test_what_is_not_finite_is_refused_by_name(small_blocks):
    form, tensors = make("scaled", "output", 1, "vector", 2)
    W = torch.randn(5, 7, dtype=torch.float64)
    bad = {**tensors, "dlor_U": tensors["dlor_U"].detach().clone().index_fill_(1, torch.tensor([4]), torch.nan)}
    parts = [Part("good", form, form.residual(tensors)), Part("bad", form, form.residual(bad))]
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter bad"):
        write_adapted(W, parts, torch.empty_like(W), is_safe=True)


def _double(tensors):
    return {name: tensor.double() for name, tensor in tensors.items()}
