"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, text to the left and numbers to the right; the first row is the header."""
    columns = list(zip(*rows, strict=True))
    numeric = [all(cell in ("-", "inf") or cell[0].isdigit() for cell in column[1:]) for column in columns]
    widths = [max(map(len, column)) for column in columns]

    def line(cells: Iterable[str]) -> str:
        aligned = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(cells, widths, numeric, strict=True)
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(rows[0]), *(line(row) for row in rows[1:])])


def without_common_start(names: Sequence[str]) -> tuple[str, list[str]]:
    """The leading parts that all dotted names share, and what is left of each: at least its last part.

    What is left does not start with a number.
    """
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(name) > shared + 1 and name[shared] == parts[0][shared] for name in parts):
        shared += 1
    while shared and any(name[shared][:1].isdigit() for name in parts):
        shared -= 1
    return ".".join([*parts[0][:shared], ""]) if shared else "", [".".join(name[shared:]) for name in parts]
