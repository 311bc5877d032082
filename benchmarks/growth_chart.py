"""Draws measured points and their fitted lines as an SVG, panel beside panel."""

from collections.abc import Sequence
from typing import NamedTuple

COLOURS = ("#1f6fb2", "#d1622b", "#3a8f4d", "#8a4fa3")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 360, 300, 52, 44, 34
FONT = 'font-family="sans-serif" font-size="12"'


class Line(NamedTuple):
    label: str
    points: list[tuple[float, float]]
    slope: float
    intercept: float


class Panel(NamedTuple):
    title: str
    x_label: str
    lines: list[Line]


def draw(panels: Sequence[Panel], y_label: str) -> str:
    """Both axes of a panel begin at 0."""
    width = WIDTH * len(panels)
    drawn = [_draw_panel(panel, i * WIDTH, y_label) for i, panel in enumerate(panels)]
    size = f'width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}"'
    body = "\n".join(line for panel in drawn for line in panel)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {FONT}>'
    return f'{head}\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'


def _draw_panel(panel: Panel, offset: int, y_label: str) -> list[str]:
    points = [point for line in panel.lines for point in line.points]
    x_step, y_step = choose_step(max(x for x, _ in points)), choose_step(max(y for _, y in points))
    x_max, y_max = (
        step * -(-max(p[i] for p in points) // step) for i, step in enumerate((x_step, y_step))
    )
    right, low = WIDTH - 16, HEIGHT - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return offset + LEFT + (right - LEFT) * x / x_max, low - (low - TOP) * y / y_max

    def text(x: float, y: float, content: str, anchor: str = "middle", more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{content}</text>'

    def stroke(a: tuple[float, float], b: tuple[float, float], colour: str) -> str:
        ends = f'x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}"'
        return f'<line {ends} stroke="{colour}"/>'

    made = [text(offset + (LEFT + right) / 2, 18, panel.title, more='font-weight="bold"')]
    for i in range(round(y_max / y_step) + 1):
        made.append(stroke(at(0, i * y_step), at(x_max, i * y_step), "#dddddd" if i else "#444444"))
        made.append(text(at(0, 0)[0] - 6, at(0, i * y_step)[1] + 4, f"{i * y_step:g}", "end"))
    for i in range(round(x_max / x_step) + 1):
        made.append(text(at(i * x_step, 0)[0], low + 16, f"{i * x_step:g}"))
    made.append(stroke(at(0, 0), at(0, y_max), "#444444"))
    made.append(text(offset + (LEFT + right) / 2, low + 34, panel.x_label))
    middle = (TOP + low) / 2
    made.append(
        text(offset + 14, middle, y_label, more=f'transform="rotate(-90 {offset + 14} {middle})"')
    )
    for i, line in enumerate(panel.lines):
        colour = COLOURS[i % len(COLOURS)]
        end = max(x for x, _ in line.points)
        made.append(
            stroke(
                at(0, max(line.intercept, 0)), at(end, line.intercept + line.slope * end), colour
            )
        )
        for x, y in line.points:
            made.append(
                f'<circle cx="{at(x, y)[0]:.1f}" cy="{at(x, y)[1]:.1f}" r="3.5" fill="{colour}"/>'
            )
        made.append(
            text(offset + LEFT + 8, TOP + 14 + 16 * i, line.label, "start", f'fill="{colour}"')
        )
    return made


def choose_step(largest: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides an axis into at most six parts."""
    power = 1e-9
    while True:
        for factor in (1, 2, 5):
            if largest / (factor * power) <= 6:
                return factor * power
        power *= 10
