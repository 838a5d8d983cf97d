"""In which blocks the Triton kernels run: a table, since nothing is tuned at run time.

Every kernel is bound by memory. With e bytes an element it moves, where C = `chunks` and B = `Config.columns`:

    down      e T (I + r), and with q another e T I
    expand    e T (O + r), and another e T O for acc, e T m for an x that is not acc
    mul       e T (I + O + r), and another e T O for an acc that is not x; x is read twice, from L2 the second time
    bwd_rows  e T (O + 2 r), and e T O each with q and for y; partial sums, written and read: 8 r O (T / B + C)
    bwd_cols  e T (2 I + r), and e T I for acc, e T m for a g that is not acc; partial sums: 8 C (r I + m)

A factor is read once a block of tokens, from L2: r / `Config.tokens` of the bytes of the operand that it meets. There
are partial sums of h for every block of columns, so that bwd_rows takes wide blocks where there is shared memory for
them, and has no entry (two passes: `down`, then `bwd_cols` without dx) where they would outweigh a second read of g.
mul has no entry where the factors would outweigh a second read of x.

The entries for compute capability 9.0 come from these numbers, for 8192 tokens, widths from 1024 to 14336 and ranks 16
and 64, and from what the compiler reports of them (`scripts/kernel_resources.py`: no spills, and how many programs fit
a multiprocessor). What they reach on an H200 is in README.md; no other candidates have been timed yet:
`scripts/sweep_launch.py` does that, and prints the table anew. Other GPUs get what fits 48 KiB of shared memory. Where
a width is no multiple of 16, it is read element by element.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

MAX_RANK = 128
"""Beyond it the products are worth a matrix library, and the kernels do not compile without spilling."""


class Config(NamedTuple):
    """What one program of a kernel works on."""

    tokens: int
    """A power of two, at most `CHUNK`."""
    columns: int
    num_warps: int
    num_stages: int


class Key(NamedTuple):
    """What an entry of the table is for. The first whose bounds hold is taken: of the GPU's, then of those of None."""

    capability: tuple[int, int] | None
    itemsize: int
    """Bytes an element: types of one size share their entries."""
    rank: int
    """Ranks up to it."""
    width: int | None
    """Widths up to it."""


Table = dict[str, dict[Key, Config | None]]

# fmt: off
TABLE: Table = {
    "down": {
        Key((9, 0), 2, 16, None): Config(32, 128, 4, 4),
        Key((9, 0), 2, 64, None): Config(64, 128, 8, 3),
        Key(None, 2, 128, None): Config(32, 64, 4, 2),
        Key(None, 4, 16, None): Config(32, 32, 4, 2),
        Key(None, 4, 128, None): Config(16, 32, 4, 2),
    },
    "expand": {
        Key((9, 0), 2, 16, None): Config(32, 128, 4, 1),
        Key((9, 0), 2, 64, None): Config(64, 128, 8, 1),
        Key(None, 2, 128, None): Config(32, 64, 4, 1),
        Key(None, 4, 16, None): Config(32, 32, 4, 1),
        Key(None, 4, 128, None): Config(16, 32, 4, 1),
    },
    "mul": {
        Key((9, 0), 2, 16, None): Config(32, 256, 8, 3),
        Key(None, 2, 16, None): Config(32, 64, 4, 2),
        Key(None, 4, 16, None): Config(32, 32, 4, 2),
    },
    "bwd_rows": {
        Key((9, 0), 2, 16, 2048): Config(64, 128, 8, 2),
        Key((9, 0), 2, 64, None): Config(64, 256, 8, 2),
        Key(None, 2, 16, None): Config(32, 128, 4, 2),
        Key(None, 4, 16, None): Config(32, 64, 4, 2),
    },
    "bwd_cols": {
        Key((9, 0), 2, 16, None): Config(32, 64, 4, 3),
        Key((9, 0), 2, 64, None): Config(64, 64, 8, 3),
        Key(None, 2, 64, None): Config(32, 64, 4, 2),
        Key(None, 2, 128, None): Config(16, 32, 4, 2),
        Key(None, 4, 16, None): Config(32, 32, 4, 2),
        Key(None, 4, 128, None): Config(16, 32, 4, 2),
    },
}
# fmt: on

CHUNK = 128
"""Tokens that a chunk is a multiple of."""

_forced: dict[str, Config | None] = {}


def choose(kernel: str, capability: tuple[int, int] | None, itemsize: int, rank: int, width: int) -> Config | None:
    """The entry for these, or None where the kernel is not to be used."""
    if kernel in _forced:
        return _forced[kernel]
    return _choose(kernel, capability, itemsize, rank, width)


@cache
def _choose(kernel: str, capability: tuple[int, int] | None, itemsize: int, rank: int, width: int) -> Config | None:
    if rank > MAX_RANK:
        raise ValueError(f"{__name__}: rank {rank}, and the kernels take at most {MAX_RANK}: use `eager` beyond it")
    for owner in (capability, None):
        for key, config in TABLE[kernel].items():
            fits = key.capability == owner and key.itemsize == itemsize and rank <= key.rank
            if fits and (key.width is None or width <= key.width):
                return config
    return None


def configurations() -> Iterator[tuple[str, Key, Config]]:
    """Every entry that names blocks, with its kernel."""
    for kernel, entries in TABLE.items():
        for key, config in entries.items():
            if config is not None:
                yield kernel, key, config


@contextmanager
def forced(kernel: str, config: Config | None) -> Iterator[None]:
    """In it, the kernel runs as `config` says, or as where it has no entry; for checks and measurements."""
    before = dict(_forced)
    _forced[kernel] = config
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def padded(rank: int) -> int:
    """The power of two that tiles have, matrix units taking no less than 16; 0 for no rank at all."""
    return max(16, 1 << (rank - 1).bit_length()) if rank else 0


def chunks(T: int, width: int) -> tuple[int, int]:
    """Tokens in a chunk, and the number of chunks, each of which leaves one partial sum.

    From the shapes alone, so that sums have the same order on every run: 256 programs of 256 columns, or more where
    programs have fewer columns, and never less than `CHUNK` tokens in a chunk.
    """
    number = max(1, min(-(-256 * 256 // width), T // CHUNK))
    chunk = -(-T // (number * CHUNK)) * CHUNK
    return chunk, -(-T // chunk) if T else 0
