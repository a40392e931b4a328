"""Rows of text in columns."""

from collections.abc import Mapping, Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line a row: the first column to the left, the others, numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        numbers = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *numbers]))
    return lines


def table_title(model: str, shape: Mapping[str, Any]) -> str:
    """The line above a table: what was measured, at which sizes."""
    return f"{model}: " + ", ".join(f"{name} {value}" for name, value in shape.items())
