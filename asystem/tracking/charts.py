"""Line charts and a busy strip as SVG text: no library, no script, sharp at any size, legible in light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby, pairwise

COLORS = ("#2f6fde", "#d9622b", "#2a9d6f", "#9a4fcf", "#b8860b", "#c2185b", "#0e8a9a", "#7a7f87")

WIDTH, HEIGHT = 420, 206
LEFT, RIGHT, TOP, BOTTOM = 52, 410, 8, 166  # of the plot within it
DOTS = 60  # a curve of at most so many points shows each
SMOOTHED = 200  # a curve of more points is drawn faint, with its moving mean over it
HOVER_COLUMNS = 120  # at most so many steps tell their values to the pointer
MAX_POINTS = 600  # of a curve; of more, each stretch keeps its lowest and its highest

Points = Sequence[tuple[float, float | None]]


def line_chart(title: str, curves: Mapping[str, Points], bounds: tuple[float, float] | None = None) -> str:
    """A chart of named curves over optimizer steps, with axes, ticks and the last values.

    Args:
        curves: (step, value) pairs in order of steps; None leaves a gap. bounds: of the y axis; None = from the data.
    """
    values = [(x, y) for points in curves.values() for x, y in points if y is not None]
    if not values:
        return ""
    x_ticks = ticks(min(x for x, _ in values), max(x for x, _ in values), 6, whole=True, inside=True)
    y_ticks = ticks(*(bounds or _with_zero(min(y for _, y in values), max(y for _, y in values))), 5)
    low, high = min(x for x, _ in values), max(x for x, _ in values)
    x_scale = _Scale(low, high, LEFT, RIGHT)
    y_scale = _Scale(y_ticks[0], y_ticks[-1], BOTTOM, TOP)
    parts = [_y_tick(tick, y_scale(tick), y_ticks[1] - y_ticks[0]) for tick in y_ticks]
    parts += [_x_tick(tick, x_scale(tick)) for tick in x_ticks]
    parts.append(f'<text x="{(LEFT + RIGHT) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">optimizer step</text>')
    for color, points in zip(_palette(len(curves)), curves.values(), strict=True):
        is_long = len(points) > SMOOTHED
        parts.append(_curve(thin(points), color, x_scale, y_scale, "curve faint" if is_long else "curve"))
        parts += [_curve(thin(smooth(points)), color, x_scale, y_scale)] if is_long else []
    parts += _hover(curves, x_scale)
    keys = "".join(_key(color, name, points) for color, (name, points) in zip(COLORS * 9, curves.items(), strict=False))
    return (
        f"<figure><figcaption><b>{escape(title)}</b></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f"<figcaption>{keys}</figcaption></figure>"
    )


def busy_strip(rows: Mapping[str, Sequence[tuple[str, float, float]]], seconds: float, main: Sequence[str] = ()) -> str:
    """One row a worker: (method, start, end) in seconds from the strip's left edge; a colour for each method.

    ``main`` are methods whose colours are the same on every page.
    """
    methods = [*main, *sorted({method for calls in rows.values() for method, _, _ in calls} - set(main))]
    colors = dict(zip(methods, _palette(len(methods)), strict=True))
    lines = []
    for name, calls in rows.items():
        bars = "".join(_bar(*call, colors[call[0]], seconds) for call in calls)
        lines.append(f'<div class="who">{escape(name)}</div><svg class="strip" role="img">{bars}</svg>')
    axis = "".join(_strip_tick(tick, seconds) for tick in ticks(0, seconds, 6, inside=True))
    keys = "".join(f"<span>{_swatch(color)}{escape(method)}</span>" for method, color in colors.items())
    return (
        f'<figure><div class="strips">{"".join(lines)}<div></div><svg class="strip axis">{axis}</svg></div>'
        f"<figcaption>{keys}</figcaption></figure>"
    )


def ticks(low: float, high: float, count: int, *, whole: bool = False, inside: bool = False) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten apart) around [low, high], or within it."""
    if not high > low:
        low, high = (low, low) if whole else (low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2)
    rough = max((high - low) / count, 1e-12)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    step = max(1.0, step) if whole else step
    first, last = low / step, high / step
    first, last = (math.ceil(first - 1e-9), math.floor(last + 1e-9)) if inside else (
        math.floor(first + 1e-9), math.ceil(last - 1e-9)
    )  # fmt: skip
    return [index * step for index in range(first, last + 1)]


def thin(points: Points) -> Points:
    """At most about `MAX_POINTS` points with the same peaks and dips."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(2 * len(points) / MAX_POINTS)
    kept: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        known = [(x, y) for x, y in points[start : start + size] if y is not None]
        extremes = {min(known, key=lambda point: point[1]), max(known, key=lambda point: point[1])} if known else set()
        kept += sorted(extremes) or [(points[start][0], None)]
    return kept


def smooth(points: Points) -> Points:
    """The mean of each point and its neighbours, a fiftieth of the curve in all; gaps stay."""
    half = len(points) // 100
    result: list[tuple[float, float | None]] = []
    for index, (x, y) in enumerate(points):
        near = [value for _, value in points[max(0, index - half) : index + half + 1] if value is not None]
        result.append((x, None if y is None else sum(near) / len(near)))
    return result


def short(value: float, step: float | None = None) -> str:
    """A number as a reader wants it: 12,345, 0.031 or 2.4e-06; ``step`` (between two ticks) says how precisely."""
    if value == 0:
        return "0"
    if step is None:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if step < 1e-4:
        return f"{value:.1e}"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


class _Scale:
    """Maps a range of values onto a range of pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._start = low, start
        self._factor = (end - start) / (high - low) if high > low else 0.0

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) * self._factor


def _with_zero(low: float, high: float) -> tuple[float, float]:
    """An axis shows zero, unless the curve would be flat then."""
    if low > 0 and low < 0.6 * high:
        return 0.0, high
    return (low, 0.0) if high < 0 and high > 0.6 * low else (low, high)


def _curve(points: Points, color: str, x: _Scale, y: _Scale, look: str = "curve") -> str:
    parts = []
    for known, stretch in groupby(points, key=lambda point: point[1] is not None):
        if known:
            pairs = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in stretch if value is not None)
            parts.append(f'<polyline class="{look}" stroke="{color}" points="{pairs}"/>')
    if len(points) <= DOTS:
        parts += [
            f'<circle cx="{x(at):.1f}" cy="{y(value):.1f}" r="2.2" fill="{color}"/>'
            for at, value in points
            if value is not None
        ]
    return "".join(parts)


def _hover(curves: Mapping[str, Points], x: _Scale) -> Iterator[str]:
    """Columns over the plot, not drawn, that tell the pointer their step and each curve's value there."""
    values = {name: {at: value for at, value in points if value is not None} for name, points in curves.items()}
    steps = sorted({at for known in values.values() for at in known})
    count = min(len(steps), HOVER_COLUMNS)
    chosen = [steps[round(index * (len(steps) - 1) / max(count - 1, 1))] for index in range(count)]
    edges = [LEFT, *((x(a) + x(b)) / 2 for a, b in pairwise(chosen)), RIGHT]
    for at, left, right in zip(chosen, edges, edges[1:], strict=False):
        lines = [f"step {at:,.0f}", *(f"{name} {short(known[at])}" for name, known in values.items() if at in known)]
        yield (
            f'<rect class="column" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{BOTTOM - TOP}">'
            f"<title>{'&#10;'.join(map(escape, lines))}</title></rect>"
        )


def _y_tick(tick: float, y: float, step: float) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick, step)}</text>'
    )


def _x_tick(tick: float, x: float) -> str:
    place, anchor = (WIDTH, "end") if x > RIGHT - 12 else (x, "middle")
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>'
        f'<text x="{place:.1f}" y="{BOTTOM + 18}" text-anchor="{anchor}">{tick:,.0f}</text>'
    )


def _strip_tick(tick: float, seconds: float) -> str:
    place = 100 * tick / seconds
    anchor = "start" if place < 3 else "end" if place > 97 else "middle"
    return f'<text x="{place:.2f}%" y="14" text-anchor="{anchor}">{short(tick)} s</text>'


def _bar(method: str, start: float, end: float, color: str, seconds: float) -> str:
    left, width = 100 * start / seconds, max(100 * (end - start) / seconds, 0.05)
    return (
        f'<rect x="{left:.2f}%" y="2" width="{width:.2f}%" height="18" fill="{color}">'
        f"<title>{escape(method)}: {1000 * (end - start):,.1f} ms</title></rect>"
    )


def _key(color: str, name: str, points: Points) -> str:
    last = next((value for _, value in reversed(points) if value is not None), None)
    value = "" if last is None else f" <b>{short(last)}</b>"
    return f"<span>{_swatch(color)}{escape(name)}{value}</span>"


def _swatch(color: str) -> str:
    return f'<i class="swatch" style="background:{color}"></i>'


def _palette(count: int) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(count)]
