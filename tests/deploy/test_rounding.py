"""Stochastic rounding is right on average and never further than the next value; what survives is counted."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlor_peft.blocks import Block
from dlor_peft.deploy.rounding import Survival, round_stochastically

NUM_DRAWS = 20000


def rounded(values, dtype, seed=0):
    wide = torch.as_tensor(values, dtype=torch.float32)
    out = torch.full(wide.shape, torch.nan, dtype=dtype)
    round_stochastically(Block((0, 0, 0), wide, wide, out), seed)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(value=st.floats(-60000, 60000, width=32), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_mean_is_the_value_and_each_draw_a_neighbour(dtype, value, seed):
    draws = rounded([value] * NUM_DRAWS, dtype, seed).double()
    found = draws.unique()
    assert len(found) <= 2
    if len(found) == 1:
        # a value of the type, or one so near to it that the other was not drawn
        nearest = torch.tensor(value).to(dtype).double()
        limits = torch.finfo(dtype)
        step = max(abs(nearest.item()), limits.smallest_normal) * limits.eps
        assert found.item() == nearest.item()
        assert abs(nearest.item() - value) < 4e-3 * step
        return
    low, high = found.tolist()
    assert low < value < high
    # nothing of the type lies between the two
    middle = torch.tensor((low + high) / 2, dtype=torch.float64).to(dtype).double().item()
    assert middle in (low, high)
    error = draws.mean().item() - value
    assert abs(error) < 6 * (high - low) / 2 / math.sqrt(NUM_DRAWS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_of_the_type_stay(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 60000.0, 6e-8, math.inf, -math.inf]).to(dtype)
    assert torch.equal(rounded(values.float(), dtype), values)
    assert rounded([math.nan], dtype).isnan().all()


def test_a_wide_type_is_not_rounded():
    values = torch.randn(100)
    assert torch.equal(rounded(values, torch.float32), values)


def test_draws_are_those_of_seed_and_place():
    wide = torch.randn(1000)

    def draw(seed, at):
        out = torch.empty(1000, dtype=torch.bfloat16)
        round_stochastically(Block(at, wide, wide, out), seed)
        return out

    assert torch.equal(draw(0, (0, 0, 0)), draw(0, (0, 0, 0)))
    assert not torch.equal(draw(0, (0, 0, 0)), draw(1, (0, 0, 0)))
    assert not torch.equal(draw(0, (0, 0, 0)), draw(0, (0, 64, 0)))


def test_survival_by_hand():
    before = torch.tensor([3.0, 4.0])
    adapted, stored = before + torch.tensor([0.5, 0.5]), before + torch.tensor([0.5, 0.0])
    found = Survival.of_block(Block((0, 0, 0), before, adapted, stored))
    assert found.update_ratio == pytest.approx(math.sqrt(0.5) / 5)
    assert found.survived == pytest.approx(0.5)
    assert found.rounding_error == pytest.approx(math.sqrt(0.5))
    twice = found + found
    assert (twice.update_ratio, twice.survived) == pytest.approx((found.update_ratio, found.survived))
    assert (Survival().update_ratio, Survival().survived, Survival().rounding_error) == (0, 1, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad):
    before = torch.ones(3)
    adapted = torch.tensor([1.0, bad, 1.0])
    assert not Survival.of_block(Block((0, 0, 0), before, adapted, adapted)).is_finite
    assert Survival.of_block(Block((0, 0, 0), before, before, before)).is_finite
