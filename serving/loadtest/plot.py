"""Small charts as inline SVG, so that a report is one file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#0072b2", "#d55e00")  # told apart with any colour vision
WIDTH, HEIGHT = 420, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 34, 44
Points = Sequence[tuple[float, float]]


def chart(
    title: str, x_label: str, y_label: str, series: Mapping[str, Points], line: bool = False
) -> str:
    """An SVG element: one colour per series, both axes from 0.

    Args:
        series: points by name, at least one.
        line: draws lines through the points of a series instead of dots.
    """
    every = [point for points in series.values() for point in points]
    x_ticks, y_ticks = (ticks(max(point[axis] for point in every)) for axis in (0, 1))

    def place(x: float, y: float) -> tuple[str, str]:
        return (
            f"{LEFT + x / x_ticks[-1] * (WIDTH - LEFT - RIGHT):.1f}",
            f"{HEIGHT - BOTTOM - y / y_ticks[-1] * (HEIGHT - TOP - BOTTOM):.1f}",
        )

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" overflow="visible" role="img" '
        f'aria-label="{escape(title)}" font-family="sans-serif" font-size="11">',
        _text(LEFT, 14, title, "start", 'font-weight="bold"'),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle"),
        _text(14, HEIGHT / 2, y_label, "middle", f'transform="rotate(-90 14 {HEIGHT / 2})"'),
    ]
    for x in x_ticks:
        at, bottom = place(x, 0)
        parts.append(_text(at, HEIGHT - BOTTOM + 14, f"{x:,g}", "middle"))
        parts.append(f'<path d="M{at} {bottom}V{TOP}" stroke="#ddd"/>')
    for y in y_ticks:
        left, at = place(0, y)
        parts.append(_text(LEFT - 6, float(at) + 4, f"{y:,g}", "end"))
        parts.append(f'<path d="M{left} {at}H{WIDTH - RIGHT}" stroke="#ddd"/>')
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        placed = [place(*point) for point in points]
        if line:
            path = "L".join(f"{x} {y}" for x, y in placed)
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        else:
            parts += [
                f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}" fill-opacity="0.6"/>'
                for x, y in placed
            ]
        parts.append(_text(WIDTH - RIGHT - 70 * number, 28, name, "end", f'fill="{colour}"'))
    return "".join([*parts, "</svg>"])


def ticks(largest: float) -> list[float]:
    """Three to seven round numbers from 0 to the first that is not below ``largest``."""
    if largest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(largest / 3))
    step = next(power * n for n in (1, 2, 5, 10) if largest / (power * n) <= 6)
    return [step * n for n in range(math.ceil(largest / step - 1e-9) + 1)]


def shares(values: Sequence[float]) -> list[tuple[float, float]]:
    """The points of a cumulative distribution: a value, and the percentage of values up to it."""
    ordered = sorted(values)
    return [(value, 100 * (n + 1) / len(ordered)) for n, value in enumerate(ordered)]


def _text(x: object, y: object, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {more}>{escape(text)}</text>'
