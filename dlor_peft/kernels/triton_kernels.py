"""The kernels behind `triton.py`, which says what they compute and hands them their pointers and strides.

Shapes as in `reference`; a tile's name ends in its dimensions, K being those of a block that a loop steps through.
R is the rank r padded to a power of two, or 0; m the number of columns that q has, or stands for. A pointer that is
None leaves its term out. Loads outside of a tensor give 0, so that nothing from there reaches a sum.

INTERPRETED upcasts the operands of products: Triton's interpreter multiplies bfloat16 as if its bits were integers.
Sums and zeros are spelled with builtins, because tl.sum and tl.zeros are jitted functions, which the interpreter can
only call where it was asked for before triton was imported.
"""

# what is bound and what is not depends on constants and on pointers that are None
# pyright: reportPossiblyUnboundVariable=false, reportUnboundVariable=false

import triton
import triton.language as tl
from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def _load(ptr, rows, cols, row_stride, col_stride, num_rows, num_cols):
    # a token times a width may be beyond 32 bits, and so may a column times the stride of a transposed tensor
    offsets = rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    return tl.load(ptr + offsets, mask=(rows < num_rows)[:, None] & (cols < num_cols)[None, :], other=0.0)


@triton.jit
def _load_row(ptr, cols, stride, num_cols):
    return tl.load(ptr + cols.to(tl.int64) * stride, mask=cols < num_cols, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store(ptr, tile, rows, cols, row_stride, col_stride, num_rows, num_cols):
    offsets = rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        acc += tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["T"])
def down_kernel(
    x,
    V,
    q,
    t,
    z,
    T,
    I,
    r,
    x_stride_T,
    x_stride_I,
    V_stride_I,
    V_stride_R,
    q_stride,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A program owns BLOCK_T tokens, and steps through the columns."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    if R > 0:
        ranks = tl.arange(0, R)
        t_TR = tl.full([BLOCK_T, R], 0.0, tl.float32)
    for start in range(0, I, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        x_TK = _load(x, tokens, cols, x_stride_T, x_stride_I, T, I)
        if R > 0:
            V_KR = _load(V, cols, ranks, V_stride_I, V_stride_R, I, r)
            t_TR = _dot(x_TK, V_KR, t_TR, PRECISION, INTERPRETED)
        if q is not None:
            wide_TK = x_TK.to(tl.float32)
            _store(z, wide_TK + _load_row(q, cols, q_stride, I) * wide_TK, tokens, cols, I, 1, T, I)
    if R > 0:
        _store(t, t_TR, tokens, ranks, r, 1, T, r)


@triton.jit(do_not_specialize=["T"])
def expand_kernel(
    t,
    U,
    acc,
    x,
    q,
    bias,
    out,
    T,
    O,
    m,
    r,
    t_stride_T,
    t_stride_R,
    U_stride_O,
    U_stride_R,
    acc_stride_T,
    acc_stride_O,
    x_stride_T,
    x_stride_I,
    q_stride,
    bias_stride,
    out_stride_T,
    out_stride_O,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A program owns one tile of the result. q without x multiplies acc."""
    # neighbours in a row of the result run at the same time
    blocks = (O + BLOCK_K - 1) // BLOCK_K
    tokens = tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    out_TO = tl.full([BLOCK_T, BLOCK_K], 0.0, tl.float32)
    if R > 0:
        ranks = tl.arange(0, R)
        t_TR = _load(t, tokens, ranks, t_stride_T, t_stride_R, T, r)
        U_OR = _load(U, cols, ranks, U_stride_O, U_stride_R, O, r)
        out_TO = _dot(t_TR, tl.trans(U_OR), out_TO, PRECISION, INTERPRETED)
    if acc is not None:
        acc_TO = _load(acc, tokens, cols, acc_stride_T, acc_stride_O, T, O).to(tl.float32)
        out_TO += acc_TO
    if q is not None:
        x_TO = acc_TO if x is None else _load(x, tokens, cols, x_stride_T, x_stride_I, T, m).to(tl.float32)
        out_TO += _load_row(q, cols, q_stride, m) * x_TO
    if bias is not None:
        out_TO += _load_row(bias, cols, bias_stride, O)
    _store(out, out_TO, tokens, cols, out_stride_T, out_stride_O, T, O)


@triton.jit(do_not_specialize=["T"])
def mul_kernel(
    acc,
    x,
    q,
    U,
    V,
    t,
    out,
    T,
    I,
    O,
    m,
    r,
    acc_stride_T,
    acc_stride_O,
    x_stride_T,
    x_stride_I,
    q_stride,
    U_stride_O,
    U_stride_R,
    V_stride_I,
    V_stride_R,
    ACC_IS_X: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A program owns BLOCK_T tokens: their x V stays in registers between the columns of x and those of the result."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, R)
    t_TR = tl.full([BLOCK_T, R], 0.0, tl.float32)
    for start in range(0, I, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        x_TK = _load(x, tokens, cols, x_stride_T, x_stride_I, T, I)
        V_KR = _load(V, cols, ranks, V_stride_I, V_stride_R, I, r)
        t_TR = _dot(x_TK, V_KR, t_TR, PRECISION, INTERPRETED)
    _store(t, t_TR, tokens, ranks, r, 1, T, r)
    rounded_TR = t_TR.to(t.dtype.element_ty)
    for start in range(0, O, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        U_KR = _load(U, cols, ranks, U_stride_O, U_stride_R, O, r)
        out_TK = tl.full([BLOCK_T, BLOCK_K], 0.0, tl.float32)
        out_TK = _dot(rounded_TR, tl.trans(U_KR), out_TK, PRECISION, INTERPRETED)
        if ACC_IS_X or q is not None:
            leading_TK = _load(x, tokens, cols, x_stride_T, x_stride_I, T, m).to(tl.float32)
        if ACC_IS_X:
            out_TK += leading_TK
        elif acc is not None:
            out_TK += _load(acc, tokens, cols, acc_stride_T, acc_stride_O, T, O).to(tl.float32)
        if q is not None:
            out_TK += _load_row(q, cols, q_stride, m) * leading_TK
        _store(out, out_TK, tokens, cols, O, 1, T, O)


@triton.jit(do_not_specialize=["T", "chunk"])
def bwd_rows_kernel(
    g,
    U,
    t,
    q,
    y,
    h_parts,
    scaled,
    parts,
    T,
    O,
    r,
    chunk,
    parts_stride,
    g_stride_T,
    g_stride_O,
    U_stride_O,
    U_stride_R,
    t_stride_T,
    t_stride_R,
    q_stride,
    y_stride_T,
    y_stride_O,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A program owns BLOCK_K columns of a chunk of tokens.

    It writes their share of h to h_parts (blocks, T, r), of dU (O, r) and then dq (O,) to its chunk's row of `parts`.
    """
    blocks = (O + BLOCK_K - 1) // BLOCK_K
    block = tl.program_id(0) % blocks
    first = tl.program_id(0) // blocks * chunk
    cols = block * BLOCK_K + tl.arange(0, BLOCK_K)
    parts += (tl.program_id(0) // blocks).to(tl.int64) * parts_stride
    if R > 0:
        ranks = tl.arange(0, R)
        U_OR = _load(U, cols, ranks, U_stride_O, U_stride_R, O, r)
        dU_OR = tl.full([BLOCK_K, R], 0.0, tl.float32)
        h_parts += block.to(tl.int64) * T * r
    if q is not None:
        q_1O = _load_row(q, cols, q_stride, O)
    if y is not None:
        dq_O = tl.full([BLOCK_K], 0.0, tl.float32)
    for start in range(first, min(first + chunk, T), BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        g_TO = _load(g, tokens, cols, g_stride_T, g_stride_O, T, O)
        if R > 0:
            t_TR = _load(t, tokens, ranks, t_stride_T, t_stride_R, T, r)
            dU_OR = _dot(tl.trans(g_TO), t_TR, dU_OR, PRECISION, INTERPRETED)
            h_TR = tl.full([BLOCK_T, R], 0.0, tl.float32)
            h_TR = _dot(g_TO, U_OR, h_TR, PRECISION, INTERPRETED)
            _store(h_parts, h_TR, tokens, ranks, r, 1, T, r)
        if q is not None:
            wide_TO = g_TO.to(tl.float32)
            _store(scaled, wide_TO + q_1O * wide_TO, tokens, cols, O, 1, T, O)
            if y is not None:
                y_TO = _load(y, tokens, cols, y_stride_T, y_stride_O, T, O).to(tl.float32)
                dq_O += tl.reduce(wide_TO * y_TO, 0, add)
    if R > 0:
        _store(parts, dU_OR, cols, ranks, r, 1, O, r)
    if y is not None:
        tl.store(parts + O * r + cols, dq_O, mask=cols < O)


@triton.jit(do_not_specialize=["T", "chunk"])
def bwd_cols_kernel(
    acc,
    g,
    h,
    V,
    x,
    q,
    dx,
    parts,
    T,
    I,
    m,
    r,
    chunk,
    parts_stride,
    acc_stride_T,
    acc_stride_I,
    g_stride_T,
    g_stride_O,
    h_stride_T,
    h_stride_R,
    V_stride_I,
    V_stride_R,
    x_stride_T,
    x_stride_I,
    q_stride,
    dx_stride_T,
    dx_stride_I,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A program owns BLOCK_K columns of a chunk of tokens. q without g multiplies acc.

    It writes their share of dV (I, r) and then dq (m,) to its chunk's row of `parts`.
    """
    blocks = (I + BLOCK_K - 1) // BLOCK_K
    first = tl.program_id(0) // blocks * chunk
    cols = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    parts += (tl.program_id(0) // blocks).to(tl.int64) * parts_stride
    if R > 0:
        ranks = tl.arange(0, R)
        dV_IR = tl.full([BLOCK_K, R], 0.0, tl.float32)
        if dx is not None:
            V_IR = _load(V, cols, ranks, V_stride_I, V_stride_R, I, r)
    if q is not None:
        dq_I = tl.full([BLOCK_K], 0.0, tl.float32)
        if dx is not None:
            q_1I = _load_row(q, cols, q_stride, m)
    for start in range(first, min(first + chunk, T), BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        x_TI = _load(x, tokens, cols, x_stride_T, x_stride_I, T, I)
        dx_TI = tl.full([BLOCK_T, BLOCK_K], 0.0, tl.float32)
        if R > 0:
            h_TR = _load(h, tokens, ranks, h_stride_T, h_stride_R, T, r)
            dV_IR = _dot(tl.trans(x_TI), h_TR, dV_IR, PRECISION, INTERPRETED)
            if dx is not None:
                dx_TI = _dot(h_TR, tl.trans(V_IR), dx_TI, PRECISION, INTERPRETED)
        if acc is not None:
            acc_TI = _load(acc, tokens, cols, acc_stride_T, acc_stride_I, T, I).to(tl.float32)
            dx_TI += acc_TI
        if q is not None:
            g_TI = acc_TI if g is None else _load(g, tokens, cols, g_stride_T, g_stride_O, T, m).to(tl.float32)
            dq_I += tl.reduce(g_TI * x_TI.to(tl.float32), 0, add)
            if dx is not None:
                dx_TI += q_1I * g_TI
        if dx is not None:
            _store(dx, dx_TI, tokens, cols, dx_stride_T, dx_stride_I, T, I)
    if R > 0:
        _store(parts, dV_IR, cols, ranks, r, 1, I, r)
    if q is not None:
        tl.store(parts + I * r + cols, dq_I, mask=cols < m)


@triton.jit(do_not_specialize=["num_parts"])
def sum_kernel(parts, out, num_parts, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the rows of parts (num_parts, size), always in the same order."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sum_N = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, num_parts, PARTS):
        rows = start + tl.arange(0, PARTS)
        sum_N += tl.reduce(_load(parts, rows, cols, size, 1, num_parts, size), 0, add)
    tl.store(out + cols, sum_N.to(out.dtype.element_ty), mask=cols < size)
