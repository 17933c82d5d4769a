"""Line charts as inline SVG: text and a few shapes, coloured by the page's own CSS."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 12, 48

Points = Sequence[tuple[float, float]]


def line_chart(points: Points, *, x_label: str, y_label: str, markers: bool = False) -> str:
    """Draw y over x as one line with axes, ticks and labels; return an ``<svg>`` element.

    Points that are not finite are left out and interrupt the line. Few points get markers anyway,
    so that a single one can be seen. The colours are those of the CSS classes line, dot, grid and
    of the text around.

    Args:
        points: (x, y) in drawing order.
        x_label: Text under the horizontal axis.
        y_label: Name of the values, read out by screen readers and shown on hovering.
        markers: Whether to mark every point.
    """
    runs = _finite_runs(points)
    finite = [point for run in runs for point in run]
    if not finite:
        return f'<p class="empty">{escape(y_label)}: no values</p>'
    x_ticks = ticks(min(x for x, _ in finite), max(x for x, _ in finite))
    y_ticks = ticks(min(y for _, y in finite), max(y for _, y in finite))
    x_low, x_high = _span(x_ticks, [x for x, _ in finite])
    y_low, y_high = _span(y_ticks, [y for _, y in finite])

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)}">',
        f"<title>{escape(y_label)} over {escape(x_label)}</title>",
    ]
    for value in y_ticks:
        _, y = place(x_low, value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick_text(value)}</text>'
        )
    for value in x_ticks:
        x, _ = place(value, y_low)
        parts.append(f'<path class="grid" d="M{x:.1f} {HEIGHT - BOTTOM}v5"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 19}" text-anchor="middle">'
            f"{tick_text(value)}</text>"
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    for run in runs:
        placed = [place(x, y) for x, y in run]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        parts.append(f'<path class="line" d="M{path}"/>')
        if markers or len(finite) <= 3:
            parts += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in placed]
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Return about `count` round values that span [low, high]: multiples of 1, 2 or 5 times 10^k.

    Example:
        >>> ticks(0.0, 0.93)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        >>> ticks(3, 3)
        [3]
    """
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def tick_text(value: float) -> str:
    """Write a tick as short as it can be told apart: 1200, 0.25, 5e-05."""
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e7 else f"{value:.4g}"


def _span(marks: list[float], values: list[float]) -> tuple[float, float]:
    """Return the ends of an axis; never equal, since positions divide by their difference."""
    low, high = min([*marks, *values]), max([*marks, *values])
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    return low, high


def _finite_runs(points: Points) -> list[list[tuple[float, float]]]:
    """Cut the points where one is not finite."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
