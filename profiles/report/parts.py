"""Small pieces of the page: numbers, tables and sections as escaped HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

MIB = 2**20
Cell = str | int | float | None


def number(value: float | None) -> str:
    """About three significant digits, whole numbers as they are, thousands apart; "–" for None."""
    if value is None:
        return "–"
    if value == int(value) or abs(value) >= 99.95:
        return f"{value:,.0f}"
    if abs(value) < 0.01:
        return f"{value:.2g}"
    decimals = 1 if abs(value) >= 9.995 else 2 if abs(value) >= 0.9995 else 3
    return f"{value:.{decimals}f}"


def mib(size: float | None) -> str:
    """Bytes in MiB."""
    return number(None if size is None else size / MIB)


def cell(value: Cell, tag: str = "td", attributes: str = "") -> str:
    """One cell; numbers are formatted, text is escaped and may break after an underscore."""
    text = escape(value if isinstance(value, str) else number(value))
    return f"<{tag}{attributes}>{text.replace('_', '_<wbr>')}</{tag}>"


def table(
    caption: str, header: Sequence[str], rows: Iterable[Sequence[Cell]], text_columns: int = 1
) -> str:
    """A table in a box that scrolls sideways; the first column names its row.

    The first `text_columns` are left-aligned text, the rest numbers.
    """

    def kind(k: int) -> str:
        return "" if k < text_columns else ' class="n"'

    head = "".join(cell(name, "th", f' scope="col"{kind(k)}') for k, name in enumerate(header))
    body = "".join(
        "<tr>"
        + cell(row[0], "th", ' scope="row"')
        + "".join(cell(value, "td", kind(k)) for k, value in enumerate(row[1:], start=1))
        + "</tr>"
        for row in rows
    )
    label = escape(caption, quote=True)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<caption><span>{escape(caption)}</span></caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def section(name: str, title: str, *parts: str) -> str:
    """A section with its heading."""
    return (
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{escape(title)}</h2>'
        + "".join(parts)
        + "</section>"
    )


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of escaped text."""
    return f"<p{f' class={kind!r}' if kind else ''}>{escape(text)}</p>"


def items(values: Iterable[str]) -> str:
    """A list of escaped lines, nothing when empty."""
    lines = "".join(f"<li>{escape(value)}</li>" for value in values)
    return f"<ul>{lines}</ul>" if lines else ""
