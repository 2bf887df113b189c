"""Plots as inline SVG: no library, no address, colours from the page's style so that they follow its theme.

Marks carry a `<title>`, which a browser shows where the pointer rests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

PARTS = ("draft", "verify", "sample", "other")
SHAPES = 5


@dataclass(slots=True)
class Svg:
    """An image of `width` x `height`, in user units; it scales with the page."""

    width: float
    height: float
    label: str
    body: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, text: str, anchor: str = "start", cls: str = "") -> None:
        self.body.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{cls}">{escape(text)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, cls: str = "grid") -> None:
        self.body.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{cls}"/>')

    def rect(self, x: float, y: float, w: float, h: float, cls: str, title: str) -> None:
        self.body.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(w, 0):.1f}" height="{h:.1f}" class="{cls}">'
            f"<title>{escape(title)}</title></rect>"
        )

    def path(self, points: Sequence[tuple[float, float]], cls: str, title: str) -> None:
        d = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.body.append(f'<path d="{d}" class="{cls}"><title>{escape(title)}</title></path>')

    def mark(self, x: float, y: float, number: int, title: str) -> None:
        """A shape and colour of its own for each number, so that they differ without colour too."""
        r, cls = 4.5, f"mark c{number % 8}"
        shapes = (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" class="{cls}">',
            f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}" class="{cls}">',
            _polygon([(x, y - 6), (x + 6, y), (x, y + 6), (x - 6, y)], cls),
            _polygon([(x, y - 6), (x + 5.5, y + 4.5), (x - 5.5, y + 4.5)], cls),
            _polygon([(x, y + 6), (x + 5.5, y - 4.5), (x - 5.5, y - 4.5)], cls),
        )
        shape = shapes[number % SHAPES]
        self.body.append(f"{shape}<title>{escape(title)}</title></{shape[1 : shape.index(' ')]}>")

    def __str__(self) -> str:
        size = f"0 0 {self.width:.0f} {self.height:.0f}"
        label = escape(self.label, quote=True)
        width = f'style="max-width:{self.width:.0f}px"'
        return f'<svg viewBox="{size}" {width} role="img" aria-label="{label}">{"".join(self.body)}</svg>'


def _polygon(points: Sequence[tuple[float, float]], cls: str) -> str:
    return f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{cls}">'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True, slots=True)
class Dot:
    value: float
    low: float | None
    high: float | None
    title: str


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a chart with a line for each method puts things. `above`: names stand over their lines, not beside."""

    width: float
    left: float
    right: float
    each: float  # height of a method
    above: bool = False

    def name(self, svg: Svg, y: float, name: str) -> None:
        if self.above:
            svg.text(self.left, y - 8, name)
        else:
            svg.text(self.left - 12, y + 4, name if len(name) <= 24 else name[:23] + "…", "end")

    def legend(self, svg: Svg, names: Sequence[str], y: float, mark: Callable[[float, float, int], None]) -> float:
        """In as many lines as it takes; returns the height of the last one."""
        at = self.left
        for number, name in enumerate(names):
            size = 26 + 7.2 * len(name)
            if at > self.left and at + size > self.width:
                at, y = self.left, y + 20
            mark(at, y, number)
            svg.text(at + 10, y + 4, name, cls="small")
            at += size
        return y


WIDE, NARROW = Frame(860.0, 190.0, 24.0, 24.0), Frame(350.0, 14.0, 14.0, 40.0, above=True)


def doublings(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis of ratios: 0.25, 0.5, 1, 2, 4 and so on."""
    return [2.0**k for k in range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1)]


def dots(rows: Mapping[str, Mapping[str, Dot]], groups: Sequence[str], label: str, frame: Frame = WIDE) -> str:
    """A line for each method and a mark for each group (a workload), on a logarithmic axis of ratios to plain; the bar
    at a mark is its interval."""
    values = [v for row in rows.values() for d in row.values() for v in (d.value, d.low or d.value, d.high or d.value)]
    if not values:
        return ""
    least, most = min([*values, 0.5]) / 1.06, max([*values, 2.0]) * 1.06
    svg = Svg(frame.width, 0.0, label)

    def x(value: float) -> float:
        share = math.log2(max(value, 1e-6) / least) / math.log2(most / least)
        return frame.left + share * (frame.width - frame.left - frame.right)

    top = 36 + frame.legend(svg, groups, 12, lambda at, y, number: svg.mark(at, y, number, groups[number]))
    bottom = top + frame.each * len(rows)
    svg.height = bottom + 24
    for value in doublings(least, most):
        svg.line(x(value), top - 8, x(value), bottom, "one" if value == 1 else "grid")
        svg.text(x(value), bottom + 16, f"{value:g}x", "middle", "small")
    svg.text(x(1), top - 12, "plain", "middle", "small")
    for i, (name, row) in enumerate(rows.items()):
        y = top + frame.each * (i + (0.72 if frame.above else 0.5))
        frame.name(svg, y, name)
        svg.line(frame.left, y, frame.width - frame.right, y, "grid")
        for number, group in enumerate(groups):
            if (dot := row.get(group)) is not None:
                if dot.low is not None and dot.high is not None:
                    svg.line(x(dot.low), y, x(dot.high), y, f"whisker c{number % 8}")
                svg.mark(x(dot.value), y, number, dot.title)
    return str(svg)


@dataclass(frozen=True, slots=True)
class Series:
    """`number` chooses its colour; None: in the background, without a name."""

    name: str
    points: tuple[tuple[float, float], ...]
    number: int | None = None


def lines(
    series: Sequence[Series], label: str, title: str, x_name: str, *, log_x: bool = False, one: bool = False,
    percent: bool = False,
) -> str:  # fmt: skip
    """Lines over x from zero upwards. `one`: of ratios, on a logarithmic axis, with a line at 1, where a method is as
    fast as plain."""
    points = [p for s in series for p in s.points]
    if not points:
        return ""
    width, height, left, right, top, bottom = 390.0, 250.0, 46.0, 112.0, 30.0, 40.0
    svg = Svg(width, height, label)
    across = [math.log2(px) if log_x else px for px, _ in points]
    x_low, x_high = min(across), max(across)
    most = 1.0 if percent else max(max(py for _, py in points) * 1.05, 2.0 if one else 0.0, 1e-9)
    least = min(0.5, *(py for _, py in points if py > 0)) / 1.05 if one else 0.0

    def x(value: float) -> float:
        value = math.log2(value) if log_x else value
        return left + (value - x_low) / ((x_high - x_low) or 1) * (width - left - right)

    def y(value: float) -> float:
        share = math.log(max(value, least) / least) / math.log(most / least) if one else value / most
        return top + (1 - share) * (height - top - bottom)

    svg.text(left, 16, title, cls="head")
    for value in doublings(least, most) if one else ticks(0, most):
        svg.line(left, y(value), width - right, y(value))
        unit = f"{value:.0%}" if percent else f"{value:g}x" if one else f"{value:g}"
        svg.text(left - 6, y(value) + 4, unit, "end", "small")
    if one:
        svg.line(left, y(1), width - right, y(1), "one")
    xs = sorted({px for px, _ in points})
    for value in xs if log_x or len(xs) <= 8 else xs[:: -(-len(xs) // 8)]:
        svg.text(x(value), height - bottom + 16, f"{value:g}", "middle", "small")
    svg.text((left + width - right) / 2, height - 6, x_name, "middle", "small")
    ends: list[tuple[float, Series]] = []
    for s in sorted(series, key=lambda s: s.number is not None):  # the named ones on top
        label = f"{s.name}: " + ", ".join(
            f"{px:g}: {py:.0%}" if percent else f"{px:g}: {py:.3g}" for px, py in s.points
        )
        cls = "line other" if s.number is None else f"line c{s.number % 8}"
        places = [(x(px), y(py)) for px, py in s.points]
        svg.path(places if len(places) > 1 else [(places[0][0] - 3, places[0][1]), places[0]], cls, label)
        if s.number is not None:
            for px, py in places if len(places) <= 6 else places[:1]:
                svg.mark(px, py, s.number, label)
            ends.append((y(s.points[-1][1]), s))
    _names(svg, ends, width - right + 10, top, height - bottom)
    return str(svg)


def _names(svg: Svg, ends: Sequence[tuple[float, Series]], x: float, top: float, bottom: float) -> None:
    """The names of lines beside their ends, moved apart where they would overlap."""
    at = top - 8
    placed: list[tuple[float, Series]] = []
    for y, s in sorted(ends, key=lambda end: end[0]):
        at = max(y + 4, at + 13)
        placed.append((at, s))
    over = placed[-1][0] - bottom - 4 if placed else 0
    for y, s in placed:
        name = s.name if len(s.name) <= 16 else s.name[:15] + "…"
        svg.text(x, y - max(over, 0), name, cls=f"small name c{(s.number or 0) % 8}")


def bars(rows: Mapping[str, Mapping[str, float]], label: str, title: str, frame: Frame = WIDE) -> str:
    """Milliseconds a token, one bar for each method, made of PARTS."""
    if not rows:
        return ""
    svg = Svg(frame.width, 0.0, label)
    above = 14 if frame.above else 0
    svg.text(frame.left, 16, title, cls="head")

    def part(at: float, y: float, number: int) -> None:
        svg.rect(at - 6, y - 6, 12, 12, f"part c{number}", PARTS[number])

    top = 20 + frame.legend(svg, PARTS, 36, part)
    svg.height = top + frame.each * len(rows) + 10
    most = max(sum(row.values()) for row in rows.values()) or 1.0
    for i, (name, row) in enumerate(rows.items()):
        y, at, total = top + frame.each * i + above, frame.left, sum(row.values())
        frame.name(svg, y + (5 if frame.above else 9), name)
        for number, name_of in enumerate(PARTS):
            size = row.get(name_of, 0.0) / most * (frame.width - frame.left - 70.0)
            share = row.get(name_of, 0.0) / total if total else 0.0
            said = f"{name}: {name_of} {row.get(name_of, 0):.2f} ms, {share:.0%}"
            svg.rect(at, y, size, 16, f"part c{number}", said)
            at += size
        svg.text(at + 6, y + 13, f"{total:.2f} ms", cls="small")
    return str(svg)
