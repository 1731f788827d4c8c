"""A line chart as SVG, written by hand: no plotting library is among what is installed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, TOP, LINE = 330, 220, 44, 34, 15  # pixels of a panel, of what is around it, and of a line of text
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6d1f", "#000000")  # Okabe & Ito, 2008


@dataclass(frozen=True)
class Line:
    """Shares by count."""

    name: str
    points: Sequence[tuple[int, float]]
    dashed: bool = False


def chart(panels: Sequence[tuple[str, Sequence[Line]]], unit: str, mark: float) -> str:
    """Panels of (title, lines) side by side: shares over counts of `unit`, on a logarithmic axis, and a line across at `mark`."""
    names = list(dict.fromkeys((line.name, line.dashed) for _, lines in panels for line in lines))
    height = TOP + HEIGHT + 3 * LINE + LINE * max(len(lines) for _, lines in panels)
    width = len(panels) * (WIDTH + LEFT) + 2 * LINE
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, (title, lines) in enumerate(panels):
        drawn.append(f'<g transform="translate({LEFT + i * (WIDTH + LEFT)},{TOP})">')
        drawn += [_text(0, -LINE, title, 'font-weight="bold"'), *_panel(lines, names, unit, mark)]
        for row, line in enumerate(lines):
            y = HEIGHT + (3 + row) * LINE
            drawn += [f'<path d="M0,{y}h24" {_stroke(names, (line.name, line.dashed))}/>', _text(30, y + 4, line.name)]
        drawn.append("</g>")
    return "\n".join([*drawn, "</svg>", ""])


def _panel(lines: Sequence[Line], names: list[tuple[str, bool]], unit: str, mark: float) -> list[str]:
    counts = sorted({count for line in lines for count, _ in line.points})
    low, high = math.log2(counts[0]), math.log2(counts[-1])

    def at(count: float, share: float) -> tuple[float, float]:
        return round((math.log2(count) - low) / (high - low) * WIDTH, 1), round((1 - share) * HEIGHT, 1)

    drawn = []
    for share in (0, 0.25, 0.5, 0.75, 1, mark):
        y = at(counts[0], share)[1]
        style = 'stroke="#888" stroke-dasharray="2 3"' if share == mark else 'stroke="#ddd"'
        drawn += [f'<path d="M0,{y}h{WIDTH}" {style}/>', _text(-4, y + 4, f"{share:.0%}", 'text-anchor="end"')]
    drawn += [_text(at(count, 0)[0], HEIGHT + LINE, f"{count:,}", 'text-anchor="middle"') for count in counts]
    drawn.append(_text(WIDTH, HEIGHT + 2 * LINE - 3, unit, 'text-anchor="end"'))
    for line in lines:
        path = " ".join(f"{x},{y}" for x, y in (at(*point) for point in line.points))
        drawn.append(f'<polyline points="{path}" {_stroke(names, (line.name, line.dashed))}/>')
    return drawn


def _stroke(names: list[tuple[str, bool]], name: tuple[str, bool]) -> str:
    dashes = ' stroke-dasharray="5 3"' * name[1]
    return f'fill="none" stroke-width="1.8" stroke="{COLOURS[names.index(name) % len(COLOURS)]}"{dashes}'


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x}" y="{y}" {style}>{escape(text)}</text>'
