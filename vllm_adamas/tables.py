"""Tables for terminals and for documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tabulate import tabulate


def markdown(headers: Sequence[object], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a table in GitHub's Markdown; cells are formatted with ``str``."""
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True, missingval="None")
    return table.splitlines()


def plain(
    headers: Sequence[object],
    rows: Sequence[Sequence[object]],
    align: Literal["left", "right"] = "right",
) -> str:
    """A table for a terminal, its columns padded with spaces.

    Args:
        headers: may be empty.
        align: alignment of all columns except the first, which is aligned left.
    """
    columns = len(headers) or max(map(len, rows), default=0)
    alignment = ("left", *(align for _ in range(columns - 1)))[:columns]
    return tabulate(
        rows,
        headers,
        tablefmt="plain",
        disable_numparse=True,
        colalign=alignment,
        missingval="None",
    )
