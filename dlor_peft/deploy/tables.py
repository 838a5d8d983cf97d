"""Text in aligned columns."""

from collections.abc import Iterable, Sequence


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, text to the left and numbers to the right; the first row is the header."""
    columns = list(zip(*rows, strict=True))
    numeric = [all(cell == "-" or cell[0].isdigit() for cell in column[1:]) for column in columns]
    widths = [max(map(len, column)) for column in columns]

    def line(cells: Iterable[str]) -> str:
        aligned = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(cells, widths, numeric, strict=True)
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(rows[0]), *(line(row) for row in rows[1:])])
