"""Loss curves as an SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

WIDTH, HEIGHT = 900, 480
LEFT, RIGHT, TOP, BOTTOM = 56, 250, 20, 44
COLOURS = ("#1b6ca8", "#c8553d", "#3d8b37", "#7b4ea3", "#b8860b", "#444444", "#0f9d9d", "#d0417e")


def draw(curves: Mapping[str, Sequence[float]], faint: Sequence[str]) -> str:
    """The curves, from step 1 on; those named in `faint` are drawn thin and grey, behind the others."""
    steps = max(len(values) for values in curves.values())
    every = [value for values in curves.values() for value in values]
    low, high = math.floor(2 * min(every)) / 2, math.ceil(2 * max(every)) / 2
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *_axes(steps, low, high),
    ]
    order = [name for name in curves if name in faint] + [name for name in curves if name not in faint]
    bold = iter(COLOURS)
    for row, name in enumerate(order):
        colour, width = ("#b0b0b0", 1.0) if name in faint else (next(bold), 1.6)
        points = " ".join(f"{_x(i + 1, steps):.1f},{_y(value, low, high):.1f}" for i, value in enumerate(curves[name]))
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        x, y = WIDTH - RIGHT + 16, TOP + 14 + 20 * row
        lines.append(f'<line x1="{x}" x2="{x + 24}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>')
        lines.append(f'<text x="{x + 32}" y="{y}">{name}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _axes(steps: int, low: float, high: float) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    every = 0.5 if high - low <= 4 else 1.0
    for index in range(int((high - low) / every) + 1):
        value = low + index * every
        y = _y(value, low, high)
        yield f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    for step in range(0, steps + 1, max(1, steps // 10)):
        yield f'<text x="{_x(step, steps):.1f}" y="{bottom + 18}" text-anchor="middle">{step}</text>'
    yield f'<line x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="black"/>'
    yield f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">step</text>'
    yield f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})">loss</text>'


def _x(step: float, steps: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * step / steps


def _y(value: float, low: float, high: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)
