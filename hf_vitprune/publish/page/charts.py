"""Geometry of the page's charts: numbers to rectangles, points and ticks, in the units of an SVG's view box."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..report import human

#: view box of every chart, and what its axes leave free: small enough that text can be read on a phone
WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 22, 34
#: bars that would be narrower become lines across the layer's slot, this high
NARROWEST, LINE = 3.0, 2.5
#: letters of a name that fit beside its time
LETTERS = 30


class Mark(NamedTuple):
    """A rectangle or a point; ``series`` is the number of its colour (0: the dense model), ``text`` its tool tip."""

    x: float
    y: float
    width: float
    height: float
    series: int
    text: str


class Tick(NamedTuple):
    at: float
    text: str


@dataclass
class Chart:
    """What the template draws.

    Attributes:
        title: above the chart. x_label: below its axis. summary: for those who hear it read out.
        marks: bars. points: of lines and of single measurements. lines: polylines as ``points`` of SVG, with a series.
        x_ticks, y_ticks: where, and what stands there.
        rules: x of vertical lines between stages. notes: text above the plot (stages).
    """

    title: str
    x_label: str
    summary: str
    marks: list[Mark] = field(default_factory=list)
    points: list[Mark] = field(default_factory=list)
    lines: list[tuple[str, int]] = field(default_factory=list)
    x_ticks: list[Tick] = field(default_factory=list)
    y_ticks: list[Tick] = field(default_factory=list)
    rules: list[float] = field(default_factory=list)
    notes: list[Tick] = field(default_factory=list)
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def bar_chart(
    title: str, dense: Sequence[float], models: Sequence[tuple[str, Sequence[float | None]]], stages: Sequence[int]
) -> Chart:
    """Bars of every layer: the dense size as a wide one behind, those of the models side by side before it.

    Where they would be too narrow, lines across the wide bar say how high they are. ``models``: name and sizes, one a
    layer of the dense model; None: that layer is gone. ``stages``: of every layer.
    """
    chart = Chart(title, "layer, bottom to top", f"{title} of every layer, dense and pruned")
    count = len(dense)
    most = max([*dense, *(size or 0 for _, sizes in models for size in sizes), 1])
    slot = (chart.right - chart.left) / count
    chart.y_ticks = [Tick(_up(chart, value / _top(most)), human(value)) for value in _steps(most)]
    every = 1 if count <= 14 else 2 if count <= 28 else 4
    chart.x_ticks = [Tick(chart.left + (i + 0.5) * slot, str(i)) for i in range(0, count, every)]
    for i, size in enumerate(dense):
        left = chart.left + i * slot
        chart.marks.append(
            _bar(chart, left + 0.06 * slot, 0.88 * slot, size / _top(most), 0, f"layer {i}, dense: {human(size)}")
        )
        inner = 0.68 * slot / len(models)
        for m, (name, sizes) in enumerate(models):
            kept = sizes[i]
            what = "gone" if kept is None else f"{human(kept)} of {human(size)}"
            text, share = f"layer {i}, {name}: {what}", (kept or 0) / _top(most)
            if inner < NARROWEST:
                mark = _bar(chart, left + 0.06 * slot, 0.88 * slot, share, m + 1, text)
                chart.marks.append(mark._replace(height=LINE if kept else 0, y=mark.y - LINE / 2))
            else:
                chart.marks.append(_bar(chart, left + 0.16 * slot + m * inner, 0.92 * inner, share, m + 1, text))
    starts = [i for i in range(count) if not i or stages[i] != stages[i - 1]]
    if len(starts) > 1:
        chart.rules = [chart.left + i * slot for i in starts[1:]]
        ends = [*starts[1:], count]
        chart.notes = [
            Tick(chart.left + (a + b) / 2 * slot, f"stage {stages[a]}" if (b - a) * slot > 44 else str(stages[a]))
            for a, b in zip(starts, ends, strict=True)
        ]
    return chart


def line_chart(
    title: str,
    x_label: str,
    curve: Sequence[tuple[float, float]],
    points: Sequence[tuple[str, float, float]],
    summary: str,
) -> Chart:
    """A falling curve of (share in (0, 1], positive error), on a logarithmic axis, and a point (name, share, error) a
    model; errors of 0 are drawn at the foot.
    """
    chart = Chart(title, x_label, summary)
    errors = [error for _, error in curve if error > 0] + [error for _, _, error in points if error > 0]
    low, high = math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors)))
    high = max(high, low + 1)

    def at(share: float, error: float) -> tuple[float, float]:
        up = (math.log10(max(error, 10.0**low)) - low) / (high - low)
        return chart.left + share * (chart.right - chart.left), _up(chart, up)

    step = max(1, math.ceil((high - low) / 5))
    chart.y_ticks = [Tick(at(0, 10.0**e)[1], _power(e)) for e in range(low, high + 1, step)]
    chart.x_ticks = [Tick(at(share / 100, 1)[0], f"{share}%") for share in range(20, 101, 20)]
    places = [(at(*point), point) for point in curve]
    chart.lines = [(" ".join(f"{x:.1f},{y:.1f}" for (x, y), _ in places), 0)]
    chart.points = [Mark(x, y, 2.5, 2.5, 0, f"{share:.0%} kept: {error:.3g}") for (x, y), (share, error) in places]
    for m, (name, share, error) in enumerate(points):
        x, y = at(share, error)
        chart.points.append(Mark(x, y, 5, 5, m + 1, f"{name}: {share:.0%} kept, error {error:.3g}"))
    return chart


def time_chart(title: str, rows: Sequence[tuple[str, float, float, str]]) -> Chart:
    """Horizontal bars of milliseconds: (name, median, distance between quartiles, text above), dense first."""
    chart = Chart(title, "milliseconds a batch", title, height=56 + 38 * len(rows), left=8)
    chart.bottom, most = chart.height - BOTTOM, max(median + spread / 2 for _, median, spread, _ in rows)
    width = chart.right - chart.left
    chart.x_ticks = [Tick(chart.left + width * value / _top(most), f"{value:g}") for value in _steps(most)]
    for i, (name, median, spread, text) in enumerate(rows):
        y = chart.top + 38 * i + 16
        end = width * median / _top(most)
        chart.marks.append(Mark(chart.left, y, end, 14, i, f"{name}: {text}"))
        chart.notes.append(Tick(y - 4, f"{text} · {_cut(name)}"))
        whisker = width * spread / _top(most)
        chart.lines.append(
            (
                f"{chart.left + end - whisker / 2:.1f},{y + 7} {chart.left + end + whisker / 2:.1f},{y + 7}",
                i,
            )
        )
    return chart


def _cut(name: str) -> str:
    """A name without its middle, where it is long."""
    half = LETTERS // 2
    return name if len(name) <= LETTERS else f"{name[:half]}…{name[-half:]}"


def _power(exponent: int) -> str:
    """``-3`` -> ``10⁻³``."""
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _bar(chart: Chart, x: float, width: float, share: float, series: int, text: str) -> Mark:
    y = _up(chart, share)
    return Mark(round(x, 2), round(y, 2), round(width, 2), round(chart.bottom - y, 2), series, text)


def _up(chart: Chart, share: float) -> float:
    return chart.bottom - share * (chart.bottom - chart.top)


def _steps(most: float) -> list[float]:
    """Four or five round numbers from 0 on, the last one at least ``most``."""
    raw = most / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    return [step * i for i in range(math.ceil(most / step - 1e-9) + 1)]


def _top(most: float) -> float:
    return _steps(most)[-1]
