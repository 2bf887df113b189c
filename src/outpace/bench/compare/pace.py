"""How fast the machine was while a contestant ran, by the target's own forwards.

A forward of so many rows behind the same text is the same work for every method, so a comparison holds thousands of
measurements of the machine itself. On a shared machine they differ by a quarter from one second to the next, and the
ratio of two short runs with them. So the seconds of a run are divided by its pace, which makes them those of a run at
the usual speed. In the logarithm, the forwards of r rows in run i on unit u take

    seconds[i, r] = level[u] + rows[r] + rest[u, r] + pace[i] + own[method of i]

`rest` is what more rows cost more behind this unit's text than behind others, and `own` what a method's forwards cost
more than others' throughout (its drafting may empty the caches): that is the method's doing and stays in its times.
Both are believed as far as there are runs that show them.

Found by medians in turn, which outliers do not move (Tukey's median polish, Exploratory Data Analysis, 1977, ch. 11).
Engines that do not report their forwards are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .store import Line

_TURNS = 12
_DOUBT_REST, _DOUBT_OWN = 20, 10  # runs without any effect that these start from
Table = NDArray[np.float64]


def paces(lines: Sequence[Line]) -> list[float | None]:
    """For each measurement the factor by which its seconds are too long; None where no forward was reported."""
    reported = [i for i, line in enumerate(lines) if line.get("forwards")]
    pace: list[float | None] = [None] * len(lines)
    for model in dict.fromkeys(lines[i]["model"] for i in reported):
        mine = [i for i in reported if lines[i]["model"] == model]
        effect = _effects([lines[i]["forwards"] for i in mine], [_unit(lines[i]) for i in mine])
        for method in dict.fromkeys(lines[i]["method"] for i in mine):
            at = [k for k, i in enumerate(mine) if lines[i]["method"] == method]
            own = float(np.median(effect[at])) * len(at) / (len(at) + _DOUBT_OWN)
            for k in at:
                pace[mine[k]] = float(np.exp(effect[k] - own))
    return pace


def _unit(line: Line) -> tuple[object, ...]:
    return line["workload"], line["batch"], line["temperature"], line["unit"]


def _effects(runs: Sequence[Sequence[Sequence[float]]], units: Sequence[tuple[object, ...]]) -> Table:
    """`forwards` of each run, [[rows, count, seconds], ...], and its unit: the logarithm of how slow each run was."""
    numbers = sorted({int(rows) for run in runs for rows, *_ in run})
    column = {rows: j for j, rows in enumerate(numbers)}
    mean, weight = np.zeros((len(runs), len(numbers))), np.zeros((len(runs), len(numbers)))
    for i, run in enumerate(runs):
        for rows, count, seconds in run:
            if count and seconds > 0:
                mean[i, column[int(rows)]] = np.log(seconds / count)
                weight[i, column[int(rows)]] = seconds
    members = [[i for i, u in enumerate(units) if u == unit] for unit in dict.fromkeys(units)]
    held = np.array([weight[m].sum(axis=0) for m in members])  # [units, rows]
    seen = np.array([(weight[m] > 0).sum(axis=0) for m in members])
    effect, by_rows = np.zeros(len(runs)), np.zeros(len(numbers))
    for _ in range(_TURNS):
        usual = np.array([_medians(mean[m] - effect[m, None], weight[m]) for m in members])
        for _ in range(_TURNS):
            level = _average(usual - by_rows, held)
            by_rows = _medians(usual - level[:, None], held)
        base = level[:, None] + by_rows
        usual = base + (usual - base) * seen / (seen + _DOUBT_REST)
        for m, times in zip(members, usual, strict=True):
            effect[m] = _average(mean[m] - times, weight[m])
            effect[m] -= np.median(effect[m])
    return effect


def _average(values: Table, weights: Table) -> Table:
    """Of each row, by weight. [n, k] -> [n]"""
    total = weights.sum(axis=1)
    return np.divide((values * weights).sum(axis=1), total, out=np.zeros(len(values)), where=total > 0)


def _medians(values: Table, weights: Table) -> Table:
    """Of each column, by weight; 0 where there is none. [n, k] -> [k]"""
    found = np.zeros(values.shape[1])
    for j in range(values.shape[1]):
        there = np.flatnonzero(weights[:, j] > 0)
        if len(there):
            order = there[np.argsort(values[there, j])]
            running = np.cumsum(weights[order, j])
            found[j] = values[order[int(np.searchsorted(running, running[-1] / 2))], j]
    return found
