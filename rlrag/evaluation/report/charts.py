"""Static SVG charts as HTML text, for light and dark pages.

Colours are classes, `c0` to `c7` and `cn` for lines, `f0` to `f7` and `fn` for areas, which the
page's style sheet defines. Nothing runs in the browser. Drawn by hand, since the package needs no
plotting library otherwise, and since a page without scripts can be kept and mailed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 480.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 456.0, 12.0, 186.0
"""Edges of the area where lines are drawn."""

NUM_COLOURS = 8
NEUTRAL = -1
"""The colour of a series that belongs to no run."""
MARKED_POINTS = 40
"""Up to this many points are marked one by one; longer series get a running mean instead."""
MAX_DRAWN_POINTS = 800

_DASHES = ("", "6 3", "2 3")
_BAR_HEIGHT, _BAR_PITCH = 18.0, 44.0


@dataclass(frozen=True)
class Series:
    """Points by rising x. `colour` is the place of its run, the same in every figure."""

    label: str
    points: Sequence[Point]
    colour: int = 0


@dataclass(frozen=True)
class Scale:
    """A straight line from values to places on the page.

    Example:
        >>> scale = Scale(0.0, 10.0, 100.0, 200.0)
        >>> scale(0.0), scale(5.0), scale(10.0)
        (100.0, 150.0, 200.0)
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def extent(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest value; equal ones are spread, so that a scale exists.

    Example:
        >>> extent([3.0, 1.0]), extent([0.0]), extent([-2.0, -2.0])
        ((1.0, 3.0), (0.0, 1.0), (-2.2, -1.8))
    """
    low, high = min(values), max(values)
    # Neighbouring floats leave no room for ticks between them.
    if high - low > 1e-12 * max(abs(low), abs(high)):
        return low, high
    return (low, low + 1) if low == 0 else (low - abs(low) / 10, low + abs(low) / 10)


def nice_ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Round values within [low, high], about `count` of them; whole numbers only if asked.

    Example:
        >>> nice_ticks(0.0, 1.0), nice_ticks(0.0, 3.0, whole=True)
        ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 1.0, 2.0, 3.0])
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(nice for nice in (1, 2, 5, 10) if nice * power >= 0.7 * raw)
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, last + 1)]


def tick_label(value: float, ticks: Sequence[float]) -> str:
    """As many decimals as the distance of the ticks needs.

    Example:
        >>> tick_label(0.2, [0.0, 0.2, 0.4]), tick_label(2000, [0, 2000]), tick_label(5e6, [0, 5e6])
        ('0.2', '2,000', '5M')
    """
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    power = math.floor(math.log10(step) + 1e-9)
    if value == 0:
        return "0"
    if step >= 1e5:
        return f"{value / 1e6:.10g}M"
    greatest = max(map(abs, ticks))
    if greatest < 1e-3:
        return f"{value:.{math.floor(math.log10(greatest)) - power + 1}g}"
    return f"{value:,.{max(0, -power)}f}"


def path_of(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """Path data of a line that is broken where a value is not finite.

    A point without neighbours becomes a line of no length, which round caps draw as a dot.
    """
    words = []
    for segment in _segments(points):
        words += [
            f"{'L' if i else 'M'}{x(px):.1f} {y(py):.1f}" for i, (px, py) in enumerate(segment)
        ]
        if len(segment) == 1:
            words.append("h0")
    return "".join(words)


def running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """Mean of each point and its neighbours, `window` in all, fewer at the ends and at gaps."""
    found: list[Point] = []
    for segment in _segments(points):
        for i, (x, _) in enumerate(segment):
            near = segment[max(0, i - window // 2) : i + window // 2 + 1]
            found.append((x, sum(y for _, y in near) / len(near)))
        found.append((segment[-1][0], math.nan))
    return found


def thinned(points: Sequence[Point], limit: int = MAX_DRAWN_POINTS) -> list[Point]:
    """At most about `limit` points: of each stretch the least and the greatest, gaps kept."""
    if len(points) <= limit:
        return list(points)
    stretch = math.ceil(2 * len(points) / limit)
    found: list[Point] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        known = [point for point in part if math.isfinite(point[1])]
        ends = {min(known, key=_value), max(known, key=_value)} if known else set()
        found += sorted(ends)
        if len(known) < len(part):
            found.append((part[-1][0], math.nan))
    return found


def line_chart(title: str, series: Sequence[Series], x_label: str) -> str:
    """A figure with one line a series, axes with round ticks, and a legend where there are several.

    Long series are drawn faintly, with their running mean on top. A series without a finite value
    is left out; without any the figure says so.
    """
    drawn = [(s, thinned(s.points)) for s in series if any(math.isfinite(y) for _, y in s.points)]
    if not drawn:
        return _figure(title, '<p class="empty">Nothing to draw: no run recorded this.</p>')
    finite = [p for s, _ in drawn for p in s.points if math.isfinite(p[1])]
    x = Scale(*extent([px for px, _ in finite]), LEFT, RIGHT)
    y = Scale(*extent([py for _, py in finite]), BOTTOM, TOP)
    whole = all(float(px).is_integer() for px, _ in finite)
    parts = [_axes(x, y, x_label, whole)]
    parts += [_line(s, points, x, y) for s, points in drawn]
    smoothed = [s for s, _ in drawn if len(s.points) > MARKED_POINTS]
    note = ""
    if smoothed:
        widths = sorted({_window(len(s.points)) for s in smoothed})
        steps = f"{widths[0]} to {widths[-1]}" if len(widths) > 1 else f"{widths[0]}"
        note = f"Thin: every step. Thick: running mean of {steps} steps."
    svg = _svg(title, HEIGHT, "".join(parts))
    legend = [(s.label, s.colour) for s, _ in drawn] if len(series) > 1 else []
    return _figure(title, svg, _legend(legend), note)


def stacked_bars(title: str, rows: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """A figure with one bar a row, divided into named parts that share one scale.

    Parts of zero are not drawn. Without any part above zero the figure says so.
    """
    totals = {label: sum(parts.values()) for label, parts in rows.items()}
    longest = max(totals.values(), default=0.0)
    if longest <= 0:
        return _figure(title, '<p class="empty">Nothing to draw: no run recorded this.</p>')
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    drawn = []
    for i, (label, parts) in enumerate(rows.items()):
        top, start = 18.0 + i * _BAR_PITCH, 4.0
        drawn.append(
            f'<text class="row" x="4" y="{top - 5:.1f}">{escape(_shortened(label))}</text>'
            f'<text class="tick end" x="{WIDTH - 4}" y="{top - 5:.1f}">'
            f"{totals[label]:,.0f} {escape(unit)}</text>"
        )
        for name, amount in parts.items():
            if amount <= 0:
                continue
            width = amount / longest * (WIDTH - 8)
            share = 100 * amount / totals[label]
            drawn.append(
                f'<rect class="f{names.index(name) % NUM_COLOURS}" x="{start:.1f}" y="{top:.1f}" '
                f'width="{width:.1f}" height="{_BAR_HEIGHT}"><title>{escape(label)}, '
                f"{escape(name)}: {amount:,.1f} {escape(unit)} ({share:.1f} %)</title></rect>"
            )
            start += width
    svg = _svg(title, len(rows) * _BAR_PITCH, "".join(drawn))
    return _figure(title, svg, _legend([(name, i) for i, name in enumerate(names)]))


def _line(series: Series, points: Sequence[Point], x: Scale, y: Scale) -> str:
    colour, style = _look(series.colour)
    if len(series.points) > MARKED_POINTS:
        mean = thinned(running_mean(series.points, _window(len(series.points))))
        return (
            f'<path class="raw c{colour}" d="{path_of(points, x, y)}"/>'
            f'<path class="line c{colour}"{style} d="{path_of(mean, x, y)}"/>'
        )
    marks = "".join(
        f'<circle class="f{colour}" cx="{x(px):.1f}" cy="{y(py):.1f}" r="3">'
        f"<title>{escape(series.label)}: {py:.5g} at {px:.5g}</title></circle>"
        for px, py in points
        if math.isfinite(py)
    )
    return f'<path class="line c{colour}"{style} d="{path_of(points, x, y)}"/>{marks}'


def _axes(x: Scale, y: Scale, x_label: str, whole: bool) -> str:
    x_ticks = nice_ticks(x.low, x.high, 6, whole)
    y_ticks = nice_ticks(y.low, y.high)
    parts = [
        f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{RIGHT}"/>'
        f'<text class="tick end" x="{LEFT - 7}" y="{y(tick) + 4:.1f}">'
        f"{tick_label(tick, y_ticks)}</text>"
        for tick in y_ticks
    ]
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>')
    parts += [
        f'<path class="axis" d="M{x(tick):.1f} {BOTTOM}v4"/>'
        f'<text class="tick middle" x="{x(tick):.1f}" y="{BOTTOM + 17}">'
        f"{tick_label(tick, x_ticks)}</text>"
        for tick in x_ticks
    ]
    middle = (LEFT + RIGHT) / 2
    parts.append(
        f'<text class="tick middle" x="{middle}" y="{HEIGHT - 8}">{escape(x_label)}</text>'
    )
    return "".join(parts)


def _svg(title: str, height: float, content: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"{content}</svg>"
    )


def _figure(title: str, content: str, legend: str = "", note: str = "") -> str:
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    caption = f"<figcaption>{escape(title)}</figcaption>"
    return f"<figure>{caption}{legend}{content}{below}</figure>\n"


def _legend(entries: Sequence[tuple[str, int]]) -> str:
    """Names beside the stroke that they are drawn with; the dash matters beyond eight series."""
    if not entries:
        return ""
    items = []
    for label, colour in entries:
        name, style = _look(colour)
        items.append(
            '<li><svg class="key" viewBox="0 0 18 8" aria-hidden="true">'
            f'<path class="line c{name}"{style} d="M1 4H17"/></svg>'
            f"{escape(label)}</li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _look(colour: int) -> tuple[str, str]:
    """The end of a colour's class names, and the dash that tells colour 8 from colour 0."""
    if colour == NEUTRAL:
        return "n", ""
    dash = _DASHES[colour // NUM_COLOURS % len(_DASHES)]
    return str(colour % NUM_COLOURS), f' stroke-dasharray="{dash}"' if dash else ""


def _segments(points: Sequence[Point]) -> list[list[Point]]:
    """Stretches of points with finite values."""
    found: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            found[-1].append(point)
        elif found[-1]:
            found.append([])
    return [segment for segment in found if segment]


def _window(num_points: int) -> int:
    """An odd number of points, about a twentieth of all."""
    return max(5, num_points // 20) | 1


def _value(point: Point) -> float:
    return point[1]


def _shortened(label: str, limit: int = 48) -> str:
    return label if len(label) <= limit else f"{label[: limit - 1]}…"
