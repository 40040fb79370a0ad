"""Charts as inline SVG that keeps its text readable at any width.

Bars place everything in per cent of the width and text in pixels. Lines stretch with the box
(`preserveAspectRatio="none"`) with strokes that don't; their labels are HTML around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from profiles.report.parts import MIB, number

ROW, BAR, LABEL = 54, 28, 17
INSIDE, INSIDE_PHONE = 11.0, 30.0  # per cent of the width that a segment needs to hold its label
DASHES = ("", "7 4", "2 3", "10 3 2 3", "5 2")

Segment = tuple[str, str, float]  # css class, label, value
Bar = tuple[str, str, Sequence[Segment]]  # name, note, segments


def stacked(title: str, bars: Sequence[Bar], unit: str, share: bool = False) -> str:
    """Horizontal stacked bars, one row each; with `share` every bar fills the width."""
    longest = max((sum(v for _, _, v in segments) for _, _, segments in bars), default=0) or 1
    ident, rows, spoken = slug(title), [], []
    for row, (name, note, segments) in enumerate(bars):
        whole = sum(value for _, _, value in segments)
        scale = 100 / ((whole or 1) if share else longest)
        y = row * ROW
        rows.append(
            f'<text x="0" y="{y + LABEL - 4}" class="name">{escape(name)}'
            f'<tspan class="note" dx="8">{escape(note)}</tspan></text>'
        )
        rows.append(_segments(segments, y + LABEL, scale, share, whole, unit))
        told = ", ".join(f"{label} {number(value)}" for _, label, value in segments)
        spoken.append(f"{name}: {told}.")
    height = ROW * len(bars)
    return (
        f'<svg class="bars" width="100%" height="{height}" role="img" '
        f'aria-labelledby="{ident}t {ident}d"><title id="{ident}t">{escape(title)}</title>'
        f'<desc id="{ident}d">In {escape(unit)}. {escape(" ".join(spoken))}</desc>'
        f"{''.join(rows)}</svg>"
    )


def slug(title: str) -> str:
    """An id from a chart's title, which is unique on its page."""
    return "chart-" + "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


def _segments(
    segments: Sequence[Segment], y: int, scale: float, share: bool, whole: float, unit: str
) -> str:
    at, parts = 0.0, []
    for kind, label, value in segments:
        width = value * scale
        shown = f"{value / (whole or 1) * 100:.0f} %" if share else number(value)
        parts.append(
            f'<rect x="{at:.3f}%" y="{y}" width="{width:.3f}%" height="{BAR}" class="seg {kind}">'
            f"<title>{escape(label)}: {number(value)} {escape(unit)}</title></rect>"
        )
        if width >= INSIDE:
            narrow = "" if width >= INSIDE_PHONE else " roomy"
            parts.append(
                f'<text x="{at:.3f}%" y="{y + 18}" dx="6" class="in{narrow}" aria-hidden="true">'
                f"{escape(label)} {shown}</text>"
            )
        at += width
    return "".join(parts)


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Swatches with their names, in the order of the segments."""
    lines = "".join(
        f'<li><svg width="16" height="12" aria-hidden="true"><rect width="16" height="12" '
        f'class="seg {kind}"/></svg> {escape(label)}</li>'
        for kind, label in entries
    )
    return f'<ul class="legend">{lines}</ul>'


def ticks(top: float, wanted: int = 4) -> list[float]:
    """Round numbers from 0 to at least `top`."""
    if top <= 0:
        return [0.0, 1.0]
    step = 10 ** math.floor(math.log10(top / wanted))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if m * step * wanted >= top)
    return [k * step for k in range(math.ceil(top / step - 1e-9) + 1)]


def lines(title: str, curves: Sequence[tuple[str, Sequence[Sequence[float]]]]) -> str:
    """Bytes over a step, one step-shaped line each, told apart by colour and dashes."""
    top = max((value for _, curve in curves for _, value in curve), default=0) / MIB
    marks = ticks(top)
    high, ident = marks[-1], slug(title)
    grid = "".join(
        f'<line x1="0" x2="100" y1="{y:.2f}" y2="{y:.2f}" class="grid"/>'
        for y in (100 - mark / high * 100 for mark in marks)
    )
    drawn, keys, spoken = [], [], []
    for k, (name, curve) in enumerate(curves):
        dash = f' stroke-dasharray="{DASHES[k % len(DASHES)]}"' if k % len(DASHES) else ""
        path = " ".join(f"{at:.2f},{100 - max(v, 0) / MIB / high * 100:.2f}" for at, v in curve)
        drawn.append(f'<polyline points="{path}" class="line l{k}"{dash}/>')
        peak = max((value for _, value in curve), default=0) / MIB
        keys.append(
            f'<li><svg width="34" height="12" aria-hidden="true"><line x1="0" x2="34" y1="6" '
            f'y2="6" class="line l{k}"{dash}/></svg> {escape(name)}, highest '
            f"{number(peak)} MiB</li>"
        )
        spoken.append(f"{name} rises to {number(peak)} MiB.")
    labels = "".join(f"<span>{number(mark)}</span>" for mark in reversed(marks))
    return (
        f'<div class="plot"><div class="y" aria-hidden="true">{labels}</div>'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-labelledby="{ident}t {ident}d"><title id="{ident}t">{escape(title)}</title>'
        f'<desc id="{ident}d">{escape(" ".join(spoken))}</desc>{grid}{"".join(drawn)}</svg>'
        '<div class="x" aria-hidden="true"><span>start</span><span>half the step</span>'
        f'<span>end</span></div></div><ul class="legend">{"".join(keys)}</ul>'
    )
