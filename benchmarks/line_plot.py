"""Line plots as SVG, labelled at the lines' right ends, for results that need no more."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 64, 500, 48, 404
COLOURS = ("#555555", "#c1272d", "#0868ac", "#3b8f4f", "#8a5fb0", "#999999", "#b8860b", "#d2691e")
COLOURS += ("#20808d", "#5b3a1e")
#: Vertical room of a label.
LINE = 17.0


@dataclass(frozen=True)
class Line:
    """Points (x, y), and how the line is drawn."""

    name: str
    points: list[tuple[float, float]]
    bold: bool = False
    dashed: bool = False


def ticks(low: float, high: float) -> list[float]:
    """Round numbers that cover a range, four to ten of them."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if (high - low) / s <= 8)
    first, last = int(low // step), int(-(-high // step))
    return [float(step * i) for i in range(first, last + 1)]


def spread(wanted: list[float]) -> list[float]:
    """Heights of labels near the wanted ones, at least ``LINE`` apart, in the plot."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    least = float(TOP)
    for i in order:
        placed[i] = max(wanted[i], least)
        least = placed[i] + LINE
    most = float(BOTTOM)
    for i in reversed(order):
        placed[i] = min(placed[i], most)
        most = placed[i] - LINE
    return placed


def line_plot(lines: list[Line], title: str, x_label: str, y_label: str) -> str:
    """The text of an SVG file."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))

    def across(x: float) -> float:
        return LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (RIGHT - LEFT)

    def up(y: float) -> float:
        return BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (BOTTOM - TOP)

    parts = [_text(LEFT, 26, title, size=15, weight="bold")]
    for x in x_ticks:
        parts.append(_rule(across(x), TOP, across(x), BOTTOM))
        parts.append(_text(across(x), BOTTOM + 18, f"{x:g}", anchor="middle"))
    for y in y_ticks:
        parts.append(_rule(LEFT, up(y), RIGHT, up(y)))
        parts.append(_text(LEFT - 8, up(y) + 4, f"{y:g}", anchor="end"))
    parts.append(_text((LEFT + RIGHT) / 2, BOTTOM + 42, x_label, anchor="middle"))
    middle = (TOP + BOTTOM) / 2
    turned = f' transform="rotate(-90 18 {middle})"'
    parts.append(_text(18, middle, y_label, anchor="middle", more=turned))
    heights = spread([up(line.points[-1][1]) for line in lines])
    for line, colour, height in zip(lines, COLOURS, heights, strict=False):
        points = [(across(x), up(y)) for x, y in line.points]
        parts += _line(line, points, colour, height)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, Arial, sans-serif" '
        'font-size="13">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _line(line: Line, points: list[tuple[float, float]], colour: str, height: float) -> list[str]:
    """A line, its points, and its name with a thin leader."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="6 4"' if line.dashed else ""
    width = 3.2 if line.bold else 1.8
    (x, y), label = points[-1], RIGHT + 26
    parts = [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>',
        f'<path d="M{x + 5:.1f} {y:.1f} L{label - 5} {height:.1f}" stroke="{colour}" '
        'stroke-width="0.7" fill="none"/>',
    ]
    parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in points]
    weight = "bold" if line.bold else "normal"
    return [*parts, _text(label, height + 4, line.name, weight=weight, fill=colour)]


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f} L{x2:.1f} {y2:.1f}" stroke="#e3e3e3"/>'


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str = "start",
    size: int = 13,
    weight: str = "normal",
    fill: str = "#222222",
    more: str = "",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}" fill="{fill}"{more}>{escape(text)}</text>'
    )
