"""Building blocks of the terminal tables."""

from rich import box
from rich.table import Table


def new_table(*columns: str) -> Table:
    """An empty table. The first column is aligned left and may wrap; the others are aligned right and do not wrap."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    return table


def megabytes(nbytes: float) -> str:
    """'1,234.5 MB' (10^6 bytes)."""
    return f"{nbytes / 1e6:,.1f} MB"
