"""The five operations in Triton against a dense float64 computation: on a GPU where there is one, else interpreted."""

import importlib
import itertools
from math import nan
from pathlib import Path
from random import Random

import pytest
import torch
from interpreted import DEVICE, WHY_NOT, kernels
from torch import Tensor

from dlor_peft.kernels import launch
from dlor_peft.kernels.launch import Config, Key

if WHY_NOT:
    pytest.skip(WHY_NOT, allow_module_level=True)

# relative to the largest entry of the float64 result; the interpreter truncates to bfloat16 instead of rounding
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}

# small enough that every loop has several steps
BLOCKS = Config(16, 16, 4, 2)

TOKENS = (0, 1, 7, 63, 100, 257)
RANKS = (0, 1, 3, 8, 16, 64)
WIDTHS = ((33, 17), (17, 40), (24, 24), (1, 5))
# every T, r and dtype within twelve in a row
SHAPES = [
    (TOKENS[i % 6], *WIDTHS[i // 2 % 4], RANKS[(5 * i + i // 6) % 6], list(TOLERANCE)[(i + i // 6) % 3])
    for i in range(30)
]
LAYOUTS = ("contiguous", "strided", "transposed")
DIAGONALS = (None, "scalar", "vector")


ops = kernels()


@pytest.fixture(autouse=True)
def _unwritten_is_nan(monkeypatch):
    monkeypatch.setattr(ops, "_new", lambda *args, new=ops._new, **options: new(*args, **options).fill_(nan))


@pytest.fixture
def _small_blocks():
    with (
        launch.forced("down", BLOCKS),
        launch.forced("expand", BLOCKS),
        launch.forced("mul", BLOCKS),
        launch.forced("bwd_rows", BLOCKS),
        launch.forced("bwd_cols", BLOCKS),
    ):
        yield


def covering(*flags):
    """All shapes, each with two of the flags' combinations."""
    combinations = list(itertools.product(*flags))
    Random(0).shuffle(combinations)
    pairs = zip(2 * SHAPES, itertools.cycle(combinations), strict=False)
    return [(*shape, *combination) for shape, combination in pairs]


class Draw:
    """Random tensors of one dtype and layout; those that do not fill their memory have NaN around them."""

    def __init__(self, dtype, layout="contiguous"):
        self.generator = torch.Generator().manual_seed(0)
        self.dtype, self.layout = dtype, layout

    def __call__(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self.generator).to(DEVICE, self.dtype)
        if self.layout == "contiguous":
            return values
        if self.layout == "transposed":
            return values.mT.contiguous().mT if len(shape) == 2 else values
        around = torch.full([2 * size + 3 for size in shape], nan, dtype=self.dtype, device=DEVICE)
        inside = around[tuple(slice(1, 2 * size, 2) for size in shape)]
        return inside.copy_(values)

    def diagonal(self, kind: str | None, m: int) -> Tensor | None:
        return None if kind is None else self(1 if kind == "scalar" else m)


def check(got: Tensor | None, expected: Tensor | None, dtype: torch.dtype) -> None:
    """Of that dtype, the expected shape and values; None where None is expected."""
    if expected is None:
        assert got is None
        return
    assert got is not None
    assert got.dtype is dtype
    assert got.shape == expected.shape
    assert got.isfinite().all()
    if got.numel():
        error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
        assert error.item() < TOLERANCE[dtype]


def wide(*tensors: Tensor | None) -> list:
    return [None if t is None else t.double() for t in tensors]


def dense(acc: Tensor | None, x: Tensor | None, q: Tensor | None, t: Tensor, U: Tensor) -> Tensor:
    """acc + q * x + t U^T in float64."""
    acc, x, q, t, U = wide(acc, x, q, t, U)
    out = t @ U.T
    if acc is not None:
        out = out + acc
    if q is not None:
        diagonal = torch.eye(x.shape[1], out.shape[1], dtype=x.dtype, device=x.device)
        out = out + x @ (diagonal * (q if q.numel() == 1 or q.numel() == out.shape[1] else q[:, None]))
    return out


def sum_of_products(g: Tensor, x: Tensor, q: Tensor | None) -> Tensor | None:
    if q is None:
        return None
    m = min(g.shape[1], x.shape[1])
    columns = (g[:, :m].double() * x[:, :m].double()).sum(0)
    return columns if q.numel() == m else columns.sum(0, keepdim=True)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(("T", "I", "O", "r", "dtype", "q", "layout"), covering(DIAGONALS, LAYOUTS))
def test_down(T, I, O, r, dtype, q, layout):
    draw = Draw(dtype, layout)
    x, V, q = draw(T, I), draw(I, r), draw.diagonal(q, I)
    t, z = ops.down(x, V, q)
    check(t, x.double() @ V.double(), dtype)
    if q is None:
        assert z is x
    else:
        check(z, x.double() * (1 + q.double()), dtype)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(
    ("T", "I", "O", "r", "dtype", "acc", "q", "has_bias", "inplace", "layout"),
    covering((None, "other", "x"), DIAGONALS, (False, True), (False, True), LAYOUTS),
)
def test_expand(T, I, O, r, dtype, acc, q, has_bias, inplace, layout):
    draw = Draw(dtype, layout)
    I = O if acc == "x" else I
    t, U, x, q = draw(T, r), draw(O, r), draw(T, I), draw.diagonal(q, min(I, O))
    acc = {None: None, "other": draw(T, O), "x": x}[acc]
    bias = draw(O) if has_bias else None
    expected = dense(acc, x, q, t, U) + (0 if bias is None else bias.double())
    before = None if acc is None else acc.clone()
    out = ops.expand(t, U, acc, x, q, bias, inplace)
    check(out, expected, dtype)
    assert (out is acc) is (inplace and acc is not None)
    if acc is not None and not inplace:
        assert acc.equal(before)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(
    ("T", "I", "O", "r", "dtype", "acc", "q", "fused", "layout"),
    covering((None, "other", "x"), DIAGONALS, (True, True, False), LAYOUTS),
)
def test_mul(T, I, O, r, dtype, acc, q, fused, layout):
    draw = Draw(dtype, layout)
    I = O if acc == "x" else I
    x, q, U, V = draw(T, I), draw.diagonal(q, min(I, O)), draw(O, r), draw(I, r)
    acc = {None: None, "other": draw(T, O), "x": x}[acc]
    with launch.forced("mul", BLOCKS if fused else None):
        out, t = ops.mul(acc, x, q, U, V)
    check(t, x.double() @ V.double(), dtype)
    check(out, dense(acc, x, q, x.double() @ V.double(), U), dtype)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(
    ("T", "I", "O", "r", "dtype", "has_t", "q", "has_y", "fused", "layout"),
    covering((True, True, False), DIAGONALS, (True, False), (True, True, False), LAYOUTS),
)
def test_bwd_rows(T, I, O, r, dtype, has_t, q, has_y, fused, layout):
    draw = Draw(dtype, layout)
    g, U, q = draw(T, O), draw(O, r), draw.diagonal(q, O)
    t, y = draw(T, r) if has_t else None, draw(T, O) if has_y else None
    with launch.forced("bwd_rows", BLOCKS if fused else None):
        h, dU, scaled, dq = ops.bwd_rows(g, U, t, q, y)
    check(h, g.double() @ U.double(), dtype)
    check(dU, None if t is None else g.double().T @ t.double(), torch.float32)
    check(scaled, g.double() * (1 if q is None else 1 + q.double()), dtype)
    check(dq, None if y is None else sum_of_products(g, y, q), torch.float32)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(
    ("T", "I", "O", "r", "dtype", "acc", "q", "has_x", "inplace", "needs_dx", "layout"),
    covering((None, "other", "g"), DIAGONALS, (True, True, False), (False, True), (True, True, False), LAYOUTS),
)
def test_bwd_cols(T, I, O, r, dtype, acc, q, has_x, inplace, needs_dx, layout):
    draw = Draw(dtype, layout)
    O = I if acc == "g" else O
    g, h, V, q = draw(T, O), draw(T, r), draw(I, r), draw.diagonal(q, min(I, O))
    acc = {None: None, "other": draw(T, I), "g": g}[acc]
    x = draw(T, I) if has_x else None
    expected = dense(acc, g, q, h, V) if needs_dx else None
    expected_dq = None if x is None else sum_of_products(g, x, q)
    dx, dV, dq = ops.bwd_cols(acc, None if q is None else g, h, V, x, q, inplace, needs_dx)
    check(dx, expected, dtype)
    check(dV, None if x is None else x.double().T @ h.double(), torch.float32)
    check(dq, expected_dq, torch.float32)
    assert (dx is acc) is (acc is not None and inplace and needs_dx) or acc is None


@pytest.mark.parametrize(("kernel", "key", "config"), list(launch.configurations()), ids=str)
def test_every_entry_of_the_table(kernel, key, config):
    draw = Draw(torch.bfloat16 if key.itemsize == 2 else torch.float32)
    T, I, r = 150, min(config.columns + 21, 300), key.rank - 3
    x, y, q, U, V, t = draw(T, I), draw(T, I), draw(I), draw(I, r), draw(I, r), draw(T, r)
    with launch.forced(kernel, config):
        if kernel == "down":
            check(ops.down(x, V)[0], x.double() @ V.double(), x.dtype)
        elif kernel == "expand":
            check(ops.expand(t, U, y, x, q), dense(y, x, q, t, U), x.dtype)
        elif kernel == "mul":
            check(ops.mul(y, x, q, U, V)[0], dense(y, x, q, x.double() @ V.double(), U), x.dtype)
        elif kernel == "bwd_rows":
            h, dU, _, dq = ops.bwd_rows(x, U, t, q, y)
            check(h, x.double() @ U.double(), x.dtype)
            check(dU, x.double().T @ t.double(), torch.float32)
            check(dq, sum_of_products(x, y, q), torch.float32)
        else:
            dx, dV, dq = ops.bwd_cols(y, y, t, V, x, q)
            check(dx, dense(y, y, q, t, V), x.dtype)
            check(dV, x.double().T @ t.double(), torch.float32)
            check(dq, sum_of_products(x, y, q), torch.float32)


def test_an_expanded_gradient():
    g = Draw(torch.float32)(1, 1).expand(100, 24)
    U, t, x = (Draw(torch.float32)(*shape) for shape in ((24, 3), (100, 3), (100, 24)))
    h, dU, _, _ = ops.bwd_rows(g, U, t)
    check(h, g.double() @ U.double(), torch.float32)
    check(dU, g.double().T @ t.double(), torch.float32)
    dx, dV, _ = ops.bwd_cols(g, None, h, U, x)
    check(dx, dense(g, None, None, h, U), torch.float32)
    check(dV, x.double().T @ h.double(), torch.float32)


@pytest.mark.usefixtures("_small_blocks")
def test_gradients_are_the_same_every_time():
    draw = Draw(torch.bfloat16)
    g, y, x, q, U, t = draw(257, 33), draw(257, 33), draw(257, 33), draw(33), draw(33, 8), draw(257, 8)
    for operation in (lambda: ops.bwd_rows(g, U, t, q, y), lambda: ops.bwd_cols(g, g, t, U, x, q)):
        for first, second in zip(operation(), operation(), strict=True):
            assert first.equal(second)


def test_no_output_of_a_token_depends_on_another():
    draw = Draw(torch.float32)
    x, U, V, q = draw(63, 24), draw(24, 3), draw(24, 3), draw(24)
    x[5] = nan
    out, t = ops.mul(x, x, q, U, V)
    rows = torch.arange(63) != 5
    assert out[rows].isfinite().all()
    assert t[rows].isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="4 GiB, which the interpreter would copy")
def test_offsets_beyond_32_bits():
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    x = memory.as_strided((2, 64), (2**31, 1)).normal_()
    V = Draw(torch.bfloat16)(64, 8)
    check(ops.down(x, V)[0], x.double() @ V.double(), torch.bfloat16)
    check(ops.down(x.T, V[:2])[0], x.T.double() @ V[:2].double(), torch.bfloat16)
    check(ops.expand(V[:2], V, x), dense(x, None, None, V[:2], V), torch.bfloat16)


@pytest.fixture
def precisions(monkeypatch):
    """Those that products have been launched with, which then do not run."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: launched.append(constants["PRECISION"])

    monkeypatch.setattr(ops, "down_kernel", Kernel())
    return launched


@pytest.mark.parametrize("where", [torch.backends, torch.backends.cuda.matmul], ids=["all", "matmul"])
def test_float32_products_follow_the_setting_of_torch(precisions, where):
    before = where.fp32_precision
    try:
        for where.fp32_precision in ("ieee", "tf32"):
            for dtype in (torch.float32, torch.bfloat16):
                ops.down(Draw(dtype)(7, 24), Draw(dtype)(24, 3))
    finally:
        where.fp32_precision = before
    assert precisions == ["ieee", "ieee", "tf32", "ieee"]


def test_float32_products_follow_the_older_setting_of_torch(precisions):
    try:
        for setting in ("high", "medium", "highest"):
            torch.set_float32_matmul_precision(setting)
            ops.down(Draw(torch.float32)(7, 24), Draw(torch.float32)(24, 3))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert precisions == ["tf32", "tf32", "ieee"]


def test_the_table():
    for kernel, entries in launch.TABLE.items():
        assert len({config for config in entries.values() if config}) <= 6
        for capability, itemsize, rank, width in itertools.product(
            (None, (9, 0), (8, 0)), (2, 4), (0, 1, 16, 17, 64, 128), (1, 2048, 14336)
        ):
            config = launch.choose(kernel, capability, itemsize, rank, width)
            assert config or kernel in ("mul", "bwd_rows")
    for _, _, config in launch.configurations():
        assert launch.CHUNK % config.tokens == 0


def test_a_rank_beyond_the_table():
    with pytest.raises(ValueError, match=r"dlor_peft\.kernels\.launch: rank 129.*at most 128"):
        launch.choose("down", None, 2, 129, 64)


@pytest.mark.parametrize("width", [1, 1024, 14336, 10**6])
@pytest.mark.parametrize("T", [1, 127, 129, 8192, 10**6])
def test_chunks_cover_all_tokens(T, width):
    chunk, number = launch.chunks(T, width)
    assert chunk % launch.CHUNK == 0
    assert (number - 1) * chunk < T <= number * chunk
    assert launch.chunks(0, width)[1] == 0


@pytest.fixture
def sweep(monkeypatch):
    module = importlib.import_module("sweep_launch")
    monkeypatch.setattr(module, "ops", ops)
    return module


def test_the_sweep_prints_the_table_as_it_stands(sweep):
    assert sweep.source(launch.TABLE) in Path(launch.__file__).read_text(encoding="utf-8")
    entries = {kernel: sweep.merged(entries, {}) for kernel, entries in launch.TABLE.items()}
    assert entries == launch.TABLE


def test_the_sweep_takes_the_fastest_and_a_narrow_entry_only_where_it_is_faster(sweep, monkeypatch):
    narrow, other = Config(16, 32, 4, 2), Config(32, 16, 4, 2)
    costs = {
        BLOCKS: {17: 1.0, 24: 1.0},
        narrow: {17: 0.9, 24: 2.0},
        other: {17: 0.99, 24: 3.0},
        None: {17: 4.0, 24: 4.0},
    }
    monkeypatch.setattr(sweep, "TOKENS", 7)
    monkeypatch.setattr(sweep, "WIDTHS", {2048: (17,), None: (24,)})
    assert None in sweep.candidates("mul")
    monkeypatch.setattr(sweep, "candidates", lambda kernel: costs)

    def timer(run):
        out, _ = run()
        return costs[launch.choose("mul", None, 2, 16, 1)][out.shape[1]]

    found = sweep.entries((9, 0), "mul", Draw(torch.bfloat16), 2, timer)
    assert list(found.items()) == [
        (Key((9, 0), 2, rank, width), config)
        for rank in (16, 64)
        for width, config in ((2048, narrow), (None, BLOCKS))
    ]
    del costs[narrow]
    assert set(sweep.entries((9, 0), "mul", Draw(torch.bfloat16), 2, timer).values()) == {BLOCKS}
