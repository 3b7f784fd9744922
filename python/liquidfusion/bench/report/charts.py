"""Line and dot charts as SVG: for a page in light or dark, and alone for papers.

Drawn here and not by a library, because a page must need nothing else: Vega-Lite puts 0.8 MB of script into each page
and draws nothing on paper or without scripts, plotly 4.7 MB; a chart of these is about 6 kB, follows light and dark by
itself, prints, and is read aloud by its label. What scripts add, hiding lines, is a dozen lines in the page.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

# Okabe and Ito's palette, told apart by the colour-blind, with lighter tones for a dark page.
COLOURS = {
    "ink": ("#1c1e21", "#e6e6e6"),
    "soft": ("#5f6670", "#a2a9b3"),
    "grid": ("#e3e6ea", "#333840"),
    "paper": ("#ffffff", "#16181c"),
    "c0": ("#0072b2", "#56b4e9"),
    "c1": ("#c24e00", "#ff9d5c"),
    "c2": ("#00795a", "#3fd2a8"),
    "c3": ("#a13d78", "#f29ac4"),
    "c4": ("#7a5c00", "#f0cf4a"),
    "c5": ("#4b4fb0", "#a8adff"),
    "c6": ("#5f6670", "#b8bec7"),
    "c7": ("#a32020", "#ff8f8f"),
    "c8": ("#3d7a00", "#a9db6b"),
}
"""Name → colour on light and on dark."""

_MARKERS = "osd^vx+OS"
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "10 4", "4 2", "12 3 3 3", "3 6")
LOOKS = len(_MARKERS)
"""Colours and markers that differ; a look beyond them has the dashes of another."""
_WIDTH, _HEIGHT = 400.0, 310.0  # about a phone's width, so that letters keep their size there
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 14.0, 44.0, 46.0
_FONTS = "system-ui, Helvetica, Arial, DejaVu Sans, Liberation Sans, Noto Sans, sans-serif"
_EDGE, _LETTER = 12.0, 0.56
"""Where titles and legends begin, and the width of a letter by its size."""


@dataclass(frozen=True, slots=True)
class Point:
    """A value at `x`, with its interval if there is one.

    Attributes
    ----------
    told
        What stands in its tooltip instead of the figures.
    ring
        Whether it is marked.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    told: str = ""
    ring: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """A named line.

    Attributes
    ----------
    look
        Number of its colour and marker, the same for a strategy in every chart.
    dash
        Number of its dashes; None: that of its look.
    step
        Whether it is a staircase without markers: what is the best up to each x.
    """

    name: str
    points: list[Point]
    look: int = 0
    dash: int | None = None
    step: bool = False

    @property
    def colour(self) -> str:
        """The CSS variable of its colour."""
        return "var(--soft)" if self.step else f"var(--c{self.look % LOOKS})"

    @property
    def stroke(self) -> str:
        """The attributes of its stroke."""
        dashes = _DASHES[(self.look if self.dash is None else self.dash) % LOOKS]
        return f'stroke="{self.colour}" stroke-width="{1.2 if self.step else 2}" stroke-dasharray="{dashes}"'


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over a common axis.

    Attributes
    ----------
    title, x_label, y_label
        What is drawn.
    series
        The lines; each has its colour, its marker and its dashes.
    reference
        The full cache's value, drawn as a horizontal line, and its name.
    log
        Whether the x axis is logarithmic.
    zero
        Whether the y axis begins at 0.
    categories
        Names of the places on the x axis, if it has no scale.
    note
        A line under the title.
    """

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    reference: tuple[str, Point] | None = None
    log: bool = True
    zero: bool = False
    categories: list[str] = field(default_factory=list)
    note: str = ""

    def svg(self) -> str:
        """Return the chart for a page that defines the colours as CSS variables."""
        return _draw(self)

    def standalone(self) -> str:
        """Return the chart as a file of its own, on white."""
        return re.sub(r"var\(--(\w+)\)", lambda match: COLOURS[match[1]][0], _draw(self))


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report: charts, and a table with the same figures.

    Attributes
    ----------
    title, subject
        What was measured, and of which model.
    summary
        A sentence, or nothing.
    charts
        File stem → chart.
    caption, header, body
        The table: what its figures are, its first line, its lines.
    more
        A second table, shown on demand: its caption, its first line, its lines.
    """

    title: str
    subject: str
    summary: str
    charts: dict[str, Chart]
    caption: str
    header: list[str]
    body: list[list[str]]
    more: tuple[str, list[str], list[list[str]]] | None = None


def _draw(chart: Chart) -> str:
    values = [point for line in chart.series for point in line.points]
    heights = [v for point in values for v in (point.y, point.low, point.high) if v is not None]
    if chart.reference is not None:
        heights += [v for v in (chart.reference[1].y, chart.reference[1].low, chart.reference[1].high) if v is not None]
    legend = [line.name for line in chart.series] + ([chart.reference[0]] if chart.reference else [])
    widest = 38 + 12 * _LETTER * max(map(len, legend), default=0)
    columns = max(1, min(3, int((_WIDTH - _EDGE) / widest)))
    height = _HEIGHT + 18 * -(-len(legend) // columns)
    bottom = _HEIGHT - _BOTTOM
    xs = sorted({point.x for point in values})
    x_at = _scale(xs, _LEFT + 12, _WIDTH - _RIGHT - 12, log=chart.log)
    y_ticks = ticks(0.0 if chart.zero else min(heights), max(heights))
    y_at = _scale([y_ticks[0], y_ticks[-1]], bottom, _TOP, log=False)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {height:g}" role="img" '
        f'aria-label="{escape(_describe(chart))}" font-family="{_FONTS}" font-size="12">',
        f'<rect width="{_WIDTH:g}" height="{height:g}" fill="var(--paper)"/>',
        _text(_EDGE, 18, chart.title, weight="600", size=min(14, int((_WIDTH - 2 * _EDGE) / 0.6 / len(chart.title)))),
    ]
    for tick in y_ticks:
        y = y_at(tick)
        parts.append(f'<path d="M{_LEFT:g} {y:.1f}H{_WIDTH - _RIGHT:g}" stroke="var(--grid)"/>')
        parts.append(_text(_LEFT - 7, y + 4, short(tick), anchor="end", fill="soft"))
    for x, label in _x_labels(chart, xs, x_at):
        parts.append(f'<path d="M{x:.1f} {bottom:g}v4" stroke="var(--soft)"/>')
        parts.append(_text(x, bottom + 17, label, anchor="middle", fill="soft"))
    parts.append(f'<path d="M{_LEFT:g} {bottom:g}H{_WIDTH - _RIGHT:g}" stroke="var(--soft)" fill="none"/>')
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 36, chart.x_label, anchor="middle"))
    middle = (_TOP + bottom) / 2
    parts.append(f'<g transform="rotate(-90 14 {middle:g})">{_text(14, middle, chart.y_label, anchor="middle")}</g>')
    if chart.reference is not None:
        parts.append(_reference(chart.reference, y_at))
    if chart.note:
        parts.append(_text(_EDGE, 34, chart.note, fill="soft", size=11))
    for index, line in enumerate(chart.series):
        parts.append(f'<g data-line="{index}">{_line(line, x_at, y_at)}</g>')
    for index, name in enumerate(legend):
        x = _EDGE + (index % columns) * (_WIDTH - _EDGE) / columns
        y = _HEIGHT + 10 + 18 * (index // columns)
        own = index < len(chart.series)
        key = _key(chart.series[index] if own else None, x, y) + _text(x + 32, y + 4, name)
        parts.append(f'<g data-key="{index}">{key}</g>' if own else key)
    return "".join([*parts, "</svg>"])


def _x_labels(chart: Chart, xs: list[float], x_at: "_Scale") -> list[tuple[float, str]]:
    """Return labels: on a logarithmic axis at the measured points, those left out that would overlap the last ones."""
    if chart.categories:
        return [(x_at(x), chart.categories[int(x)]) for x in xs]
    if not chart.log and xs[0] < xs[-1]:  # speeds and the like: round numbers within what was measured
        return [(x_at(x), short(x)) for x in ticks(xs[0], xs[-1], 4) if xs[0] <= x <= xs[-1]]
    placed: list[tuple[float, str]] = []
    for x in reversed(xs):
        label = short(x) if x == int(x) else f"{x:.3g}"
        if not placed or placed[-1][0] - x_at(x) > 8 * len(label) + 6:
            placed.append((x_at(x), label))
    return placed[::-1]


class _Scale:
    """Maps a value to a coordinate."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool) -> None:
        self._log = log
        self._low, self._high = (math.log(low), math.log(high)) if log else (low, high)
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        value = math.log(value) if self._log else value
        if self._high == self._low:
            return (self._start + self._end) / 2
        return self._start + (value - self._low) / (self._high - self._low) * (self._end - self._start)


def _scale(values: Sequence[float], start: float, end: float, *, log: bool) -> _Scale:
    return _Scale(min(values), max(values), start, end, log=log and min(values) > 0)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers that enclose `low` and `high`."""
    if high <= low:
        low, high = (0.0, 1.0) if low == 0 else (low - abs(low) / 10, high + abs(high) / 10)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * index for index in range(first, last + 1)]


def short(value: float) -> str:
    """Return a number for an axis: 15k, 32Ki, 20, 0.25."""
    if value >= 8192 and value % 1024 == 0:
        return f"{value / 1024:g}Ki" if value < 2**20 else f"{value / 2**20:.4g}Mi"
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    return f"{value:.4g}"


def _line(line: Series, x_at: _Scale, y_at: _Scale) -> str:
    places = [(x_at(point.x), y_at(point.y)) for point in line.points]
    if line.step:
        (x, y), *rest = places
        path = f"M{x:.1f} {y:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in rest) + f"H{_WIDTH - _RIGHT:g}"
        return f'<path d="{path}" fill="none" {line.stroke}/>'
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<path d="{path}" fill="none" {line.stroke}/>']
    for point, (x, y) in zip(line.points, places, strict=True):
        told = f"{line.name}, {point.told or f'{short(point.x)}: {point.y:.4g}'}"
        if point.low is not None and point.high is not None:
            top, end = y_at(point.high), y_at(point.low)
            parts.append(
                f'<path d="M{x:.1f} {top:.1f}V{end:.1f}M{x - 3:.1f} {top:.1f}h6M{x - 3:.1f} {end:.1f}h6" '
                f'stroke="{line.colour}" fill="none"/>'
            )
            told += f" (95 %: {point.low:.4g} to {point.high:.4g})"
        ring = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="none" stroke="var(--ink)"/>' if point.ring else ""
        parts.append(f"<g><title>{escape(told)}</title>{_marker(line.look, x, y)}{ring}</g>")
    return "".join(parts)


def _reference(reference: tuple[str, Point], y_at: _Scale) -> str:
    name, point = reference
    y, band = y_at(point.y), ""
    if point.low is not None and point.high is not None:
        top = y_at(point.high)
        band = (
            f'<rect x="{_LEFT:g}" y="{top:.1f}" width="{_WIDTH - _LEFT - _RIGHT:g}" '
            f'height="{y_at(point.low) - top:.1f}" fill="var(--soft)" opacity="0.15"/>'
        )
    return (
        f"<g><title>{escape(name)}: {point.y:.4g}</title>{band}"
        f'<path d="M{_LEFT:g} {y:.1f}H{_WIDTH - _RIGHT:g}" stroke="var(--ink)" stroke-width="1.5"/></g>'
    )


def _key(line: Series | None, x: float, y: float) -> str:
    if line is None:
        return f'<path d="M{x:g} {y:g}h26" stroke="var(--ink)" stroke-width="1.5"/>'
    marker = "" if line.step else _marker(line.look, x + 13, y)
    return f'<path d="M{x:g} {y:g}h26" {line.stroke}/>{marker}'


def _marker(look: int, x: float, y: float) -> str:
    colour, shape = f"var(--c{look % LOOKS})", _MARKERS[look % LOOKS]
    if shape in "oO":
        fill = colour if shape == "o" else "var(--paper)"
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}" stroke-width="1.5"/>'
    if shape in "x+":
        path = "m-4 -4l8 8m0 -8l-8 8" if shape == "x" else "m-5 0h10m-5 -5v10"
        return f'<path d="M{x:.1f} {y:.1f}{path}" stroke="{colour}" stroke-width="2.5" fill="none"/>'
    path = {
        "s": "m-4 -4h8v8h-8z",
        "S": "m-4 -4h8v8h-8z",
        "d": "m0 -5.5l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
        "^": "m0 -5l5 9h-10z",
        "v": "m0 5l5 -9h-10z",
    }[shape]
    fill = "var(--paper)" if shape == "S" else colour
    return f'<path d="M{x:.1f} {y:.1f}{path}" fill="{fill}" stroke="{colour}" stroke-width="1.5"/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", fill: str = "ink", weight: str = "400", size: int = 12
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="var(--{fill})" font-weight="{weight}" '
        f'font-size="{size}">{escape(text)}</text>'
    )


def _describe(chart: Chart) -> str:
    """Return the chart in words, for who cannot see it."""
    lines = [
        f"{line.name}: " + ", ".join(f"{point.y:.4g} at {_name(chart, point.x)}" for point in line.points)
        for line in chart.series
    ]
    if chart.reference is not None:
        lines.append(f"{chart.reference[0]}: {chart.reference[1].y:.4g}")
    return f"{chart.title}. {chart.y_label} against {chart.x_label}. " + "; ".join(lines)


def _name(chart: Chart, x: float) -> str:
    return chart.categories[int(x)] if chart.categories else short(x)
