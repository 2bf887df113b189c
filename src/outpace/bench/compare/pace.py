"""How fast the machine was while a contestant ran, by the target's own forwards.

A forward of so many rows behind the same text is the same work whoever asks for it, so a comparison holds thousands of
measurements of the machine itself. On a shared machine they differ by a quarter from one second to the next, and the
ratio of two short runs with them. So the seconds of a run are divided by its pace, which makes them those of a run at
the usual speed. In the logarithm, the forwards of r rows in run i on unit u take

    seconds[i, r] = usual[u, r] + pace[i] + own[method of i]

`own` is what a method's forwards cost more than others' throughout (its drafting may empty the caches): that is the
method's doing and stays in its times. It is believed as far as there are runs that show it.

Found by medians in turn, which outliers do not move (Tukey's median polish, Exploratory Data Analysis, 1977, ch. 11).
Engines that do not tell their forwards are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .store import Line

_TURNS = 8
_DOUBT = 10  # runs without any effect that `own` starts from


def paces(lines: Sequence[Line]) -> list[float | None]:
    """For each measurement the factor by which its seconds are too long; None where nothing tells."""
    pace: list[float | None] = [None] * len(lines)
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, line in enumerate(lines):
        if line.get("forwards"):
            key = (line["model"], line["workload"], line["batch"], line["temperature"], line["unit"])
            groups.setdefault(key, []).append(i)
    by_method: dict[tuple[object, ...], list[int]] = {}
    found: dict[int, float] = {}
    for members in groups.values():
        effects = _effects([lines[i]["forwards"] for i in members])
        found.update(zip(members, effects, strict=True))
        for i in members:
            by_method.setdefault((lines[i]["model"], lines[i]["method"]), []).append(i)
    for members in by_method.values():
        own = float(np.median([found[i] for i in members])) * len(members) / (len(members) + _DOUBT)
        for i in members:
            pace[i] = float(np.exp(found[i] - own))
    return pace


def _effects(runs: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    """`forwards` of runs on one unit, each [[rows, count, seconds], ...]: the logarithm of how slow each run was."""
    numbers = sorted({int(rows) for run in runs for rows, *_ in run})
    column = {rows: j for j, rows in enumerate(numbers)}
    mean = np.full((len(runs), len(numbers)), np.nan)
    weight = np.zeros_like(mean)
    for i, run in enumerate(runs):
        for rows, count, seconds in run:
            if count and seconds > 0:
                mean[i, column[int(rows)]] = np.log(seconds / count)
                weight[i, column[int(rows)]] = seconds
    effect = np.zeros(len(runs))
    for _ in range(_TURNS):
        usual = np.array([_median(mean[:, j] - effect, weight[:, j]) for j in range(len(numbers))])
        left, held = np.where(weight > 0, mean - usual, 0.0), weight.sum(axis=1)
        effect = np.divide((left * weight).sum(axis=1), held, out=np.zeros_like(held), where=held > 0)
        effect -= np.median(effect)
    return [float(x) for x in effect]


def _median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """The weighted median of those that have weight; 0 if none has."""
    there = np.flatnonzero(weights > 0)
    if not len(there):
        return 0.0
    order = there[np.argsort(values[there])]
    running = np.cumsum(weights[order])
    return float(values[order[int(np.searchsorted(running, running[-1] / 2))]])
