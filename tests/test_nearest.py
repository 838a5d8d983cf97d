import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlor_peft import DLoRConfig
from dlor_peft.form import Form, Residual
from dlor_peft.nearest import DIAGONALS, SIDES, Nearest, lora_residuals, nearest

MODES = [(mode, side) for mode, sides in SIDES.items() for side in sides]
# up to rounding
EXACT = {torch.float64: 1e-10, torch.float32: 2e-5}

seeds = st.integers(0, 2**31)
modes = st.sampled_from(MODES)
diagonals = st.sampled_from(DIAGONALS)
dtypes = st.sampled_from([torch.float64, torch.float32])
sizes = st.integers(1, 8)
law = settings(deadline=None, max_examples=40)


def random(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def form_of(mode: str, side: str | None, diagonal: str, r: int, O: int, I: int) -> Form:
    sided = mode == "multiplicative" or diagonal != "none"
    config = DLoRConfig(r=max(r, 1), mode=mode, side=(side if sided else None) or "auto", diagonal=diagonal)
    return Form.resolve(config, r, 1, I, O)


def given_to(form: Form, fit: Nearest, W: Tensor) -> Tensor:
    """W' - W as the adapted layer has it, of tensors that have the shapes that it stores."""
    stored = {"dlor_diag": fit.q, "dlor_diag_in": fit.q_in, "dlor_U": fit.U, "dlor_V": fit.V}
    shapes = {name: (1, *t.shape) for name, t in stored.items() if t is not None and 0 not in t.shape}
    assert shapes == form.shapes
    return form.delta_weight(Residual(*fit[:4]), W)


def planted(seed: int, form: Form, W: Tensor, size: float = 0.3) -> Tensor:
    """An update that the form can express."""
    shapes = [*form.shapes.values()]
    tensors = dict(zip(form.shapes, random(seed, *shapes, dtype=W.dtype), strict=True))
    return form.delta_weight(form.residual({name: size * tensor for name, tensor in tensors.items()}), W)


@settings(deadline=None, max_examples=60)
@given(
    seeds,
    modes,
    diagonals,
    st.sampled_from([(24, 24), (24, 33), (35, 24)]),
    st.integers(1, 2),
    st.sampled_from([0.3, 3]),
    dtypes,
)
def test_an_update_that_is_diagonal_plus_low_rank_is_recovered(seed, mode, diagonal, shape, r, size, dtype):
    mode, side = mode
    form = form_of(mode, side, diagonal, r, *shape)
    W = random(seed, shape, dtype=dtype)[0]
    delta = planted(seed + 1, form, W, size)
    fit = nearest(delta, W, r, mode, side, diagonal, sweeps=300, tolerance=0)
    assert fit.U.dtype == dtype
    assert fit.residual < 50 * EXACT[dtype]
    assert (given_to(form, fit, W) - delta).norm() <= 50 * EXACT[dtype] * delta.norm()


@law
@given(seeds, modes, diagonals, sizes, sizes, st.integers(0, 10), dtypes)
def test_the_residual_is_that_of_the_tensors(seed, mode, diagonal, O, I, r, dtype):
    mode, side = mode
    r = max(r, 1) if diagonal == "none" else r
    delta, W = random(seed, (O, I), (O, I), dtype=dtype)
    fit = nearest(delta, W, r, mode, side, diagonal)
    form = form_of(mode, side, diagonal, r, O, I)
    error = (given_to(form, fit, W) - delta).norm() / delta.norm()
    assert fit.residual == pytest.approx(error.item(), abs=1e4 * EXACT[dtype] if mode == "multiplicative" else 1e-4)
    assert fit.num_parameters == sum(math.prod(shape) for shape in form.shapes.values())


@law
@given(seeds, modes, diagonals, sizes, sizes)
def test_no_worse_than_low_rank_alone_or_the_diagonal_alone(seed, mode, diagonal, O, I):
    mode, side = mode
    delta, W = random(seed, (O, I), (O, I))
    diagonal_alone = nearest(delta, W, 0, mode, side, diagonal).residual
    spectrum = torch.linalg.svdvals(delta)
    for r in range(min(O, I) + 2):
        residual = nearest(delta, W, r, mode, side, diagonal).residual
        assert residual <= diagonal_alone + 1e-12
        if mode != "multiplicative":
            assert residual <= (spectrum[r:].norm() / spectrum.norm()).item() + 1e-12
    if mode != "multiplicative":
        assert residual < 1e-12


@law
@given(seeds, st.sampled_from(["input", "output"]), diagonals, st.integers(2, 9), st.integers(2, 9), st.integers(0, 3))
def test_multiplicative_is_scaled_within_the_span_of_W(seed, side, diagonal, O, I, r):
    delta, W = random(seed, (O, I), (O, I))
    product = nearest(delta, W, r, "multiplicative", side, diagonal, tolerance=1e-9, sweeps=500)
    scaled = nearest(delta, W, r, "scaled", side, diagonal, tolerance=1e-9, sweeps=500)
    if (O <= I) == (side == "input") or O == I:
        # W has full rank on that side, which makes the two one problem
        assert product.residual == pytest.approx(scaled.residual, abs=1e-6)
    else:
        beyond = (
            delta - W @ torch.linalg.lstsq(W, delta).solution
            if side == "input"
            else delta - (torch.linalg.lstsq(W.mT, delta.mT).solution.mT @ W)
        )
        assert product.residual >= (beyond.norm() / delta.norm()).item() - 1e-9


@pytest.mark.parametrize(("mode", "side"), MODES)
@pytest.mark.parametrize("exact", [True, False])
def test_more_sweeps_never_make_it_worse(mode, side, exact, monkeypatch):
    if not exact:
        monkeypatch.setattr("dlor_peft.nearest._EXACT", 0)
    delta, W = random(5, (29, 37), (29, 37))
    residuals = [nearest(delta, W, 2, mode, side, sweeps=i, tolerance=0).residual for i in (1, 2, 3, 4, 8, 16, 64)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < residuals[0]


@pytest.mark.parametrize(("mode", "side"), MODES)
@pytest.mark.parametrize("diagonal", DIAGONALS)
def test_the_limit_is_a_stationary_point(mode, side, diagonal):
    delta, W = random(6, (9, 7), (9, 7))
    fit = nearest(delta, W, 2, mode, side, diagonal, sweeps=5000, tolerance=0)
    leaves = [t.clone().requires_grad_() for t in fit[:4] if t is not None]
    slots = iter(leaves)
    residual = Residual(*(None if t is None else next(slots) for t in fit[:4]))
    form = form_of(mode, side, diagonal, 2, 9, 7)
    loss = (form.delta_weight(residual, W) - delta).square().sum()
    # the descent may be slow, with norms that grow
    assert all(grad.norm() < 1e-2 * delta.norm() for grad in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(("mode", "side"), MODES)
@pytest.mark.parametrize("shape", [(300, 420), (410, 290)])
def test_subspace_iteration_finds_what_the_full_svd_finds(mode, side, shape, monkeypatch):
    """A spectrum as flat as those of fine-tuning, with scaled rows and noise."""
    W, noise, gain = random(0, shape, shape, (shape[0], 1), dtype=torch.float32)
    left, _, right = torch.linalg.svd(noise, full_matrices=False)
    sizes = torch.arange(1, min(shape) + 1) ** -0.5
    delta = (left * sizes) @ right + 0.01 * gain * W
    iterated = nearest(delta, W, 8, mode, side)
    monkeypatch.setattr("dlor_peft.nearest._EXACT", 1000)
    exact = nearest(delta, W, 8, mode, side)
    assert iterated.residual == pytest.approx(exact.residual, rel=2e-3)


@pytest.mark.parametrize(("mode", "side"), MODES)
def test_subspace_iteration_recovers_a_planted_update(mode, side):
    W = random(0, (300, 290))[0]
    delta = planted(1, form_of(mode, side, "vector", 4, 300, 290), W)
    assert nearest(delta, W, 4, mode, side, sweeps=300, tolerance=0).residual < 1e-10


@pytest.mark.parametrize(("mode", "side"), MODES)
@pytest.mark.parametrize("r", [0, 2, 20])
def test_zero_rows_and_columns_and_missing_rank(mode, side, r):
    delta, W = random(0, (6, 8), (6, 8))
    W[2], W[:, 5], W[3] = 0, 0, W[4]
    fit = nearest(delta, W, r, mode, side)
    assert all(t.isfinite().all() for t in fit[:4] if t is not None)
    assert fit.residual <= 1
    if mode != "additive":
        q = fit.q if side != "both" else fit.q_in
        assert q[2 if side == "output" else 5] == 0
    if (mode, side) == ("multiplicative", "input"):
        # rank 4 of 6 rows: two directions are out of reach
        basis = torch.linalg.svd(W)[0][:, :4]
        unreachable = ((delta - basis @ basis.mT @ delta).norm() / delta.norm()).item()
        assert fit.residual == pytest.approx(unreachable) if r == 20 else fit.residual >= unreachable


@pytest.mark.parametrize(("mode", "side"), MODES)
@pytest.mark.parametrize("diagonal", DIAGONALS)
def test_no_update_and_no_weight(mode, side, diagonal):
    W = random(0, (4, 5))[0]
    fit = nearest(torch.zeros_like(W), W, 2, mode, side, diagonal)
    assert fit.residual == 0
    assert not any(t.any() for t in fit[:4] if t is not None)
    of_nothing = nearest(W, torch.zeros_like(W), 2, mode, side, diagonal)
    assert of_nothing.residual == 1 if mode == "multiplicative" else of_nothing.residual < 1


def test_the_better_of_two_starts_counts():
    """A large diagonal traps the descent that starts from the singular vectors."""
    W, noise, gain = random(3, (48, 40), (48, 40), (48, 1))
    delta = 5 * gain * W + 0.1 * noise
    assert nearest(delta, W, 4, "scaled", "output").residual < 0.03


@law
@given(seeds, sizes, sizes, st.lists(st.integers(0, 100), min_size=1, max_size=3))
def test_lora_with_as_many_parameters(seed, O, I, numbers):
    delta = random(seed, (O, I))[0]
    squares = torch.linalg.svdvals(delta).square()
    got = lora_residuals(delta, numbers)
    for number, residual in zip(numbers, got, strict=True):
        rank = number / (O + I)
        rest = squares[math.floor(rank) :]
        want = (rest.sum() - (rank % 1) * rest[:1].sum()) / squares.sum()
        assert residual == pytest.approx(math.sqrt(max(want.item(), 0)), abs=1e-7)


def test_lora_of_large_matrices_is_found_by_subspace_iteration():
    noise = random(0, (300, 420))[0]
    left, _, right = torch.linalg.svd(noise, full_matrices=False)
    sizes = torch.arange(1, 301, dtype=torch.float64) ** -0.5
    numbers = [720 * 4, 720 * 8 + 300]
    squares = sizes.square().flip(0).cumsum(0).flip(0) / sizes.square().sum()
    want = [squares[4], squares[8] - 300 / 720 * (squares[8] - squares[9])]
    for residual, square in zip(lora_residuals((left * sizes) @ right, numbers), want, strict=True):
        assert residual == pytest.approx(square.sqrt().item(), rel=2e-3)


def test_lora_of_no_update():
    assert lora_residuals(torch.zeros(3, 4), [3]) == [0]
    assert lora_residuals(torch.ones(3, 4), [0]) == [1]


BAD = [
    ({"mode": "row"}, ValueError, "mode 'row' is none of 'additive', 'scaled', 'multiplicative'"),
    ({"side": "auto"}, ValueError, "'scaled' has no side 'auto'; pass one of 'output', 'input', 'both'"),
    ({"mode": "additive", "side": "input"}, ValueError, "'additive' has no side 'input'; pass one of None"),
    ({"mode": "multiplicative", "side": "both"}, ValueError, "has no side 'both'"),
    ({"diagonal": "vectors"}, ValueError, "diagonal 'vectors' is none of"),
    ({"r": -1}, ValueError, "r = -1; .* at least 0"),
    ({"W": torch.ones(3, 4)}, ValueError, r"delta \(3, 3\) and W \(3, 4\)"),
    ({"W": torch.ones(3, 3).half()}, TypeError, "got torch.float16.*convert first"),
    ({"delta": torch.full((3, 3), math.nan)}, ValueError, "delta holds a NaN"),
    ({"W": torch.full((3, 3), math.inf)}, ValueError, "W holds a NaN or an infinite"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_arguments_are_refused(change, error, message):
    good = {"delta": torch.ones(3, 3), "W": torch.ones(3, 3), "r": 1, "mode": "scaled", "side": "output"}
    with pytest.raises(error, match=message):
        nearest(**{**good, **change})


@pytest.mark.parametrize(("mode", "side"), MODES)
def test_arguments_and_the_random_state_are_not_changed(mode, side, monkeypatch):
    monkeypatch.setattr("dlor_peft.nearest._EXACT", 0)
    delta, W = random(0, (30, 31), (30, 31))
    copies, state = (delta.clone(), W.clone()), torch.get_rng_state()
    nearest(delta, W, 1, mode, side)
    assert torch.equal(delta, copies[0])
    assert torch.equal(W, copies[1])
    assert torch.equal(torch.get_rng_state(), state)
