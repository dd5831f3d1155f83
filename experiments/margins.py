"""Margins of LooC's curve over each peer's, at equal rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from experiments.tables import Row
from utils.tables import Table

LEAST_RATE, MOST_RATE = 0.3, 16.0  # bits per pixel


@dataclass(frozen=True)
class Curve:
    """The upper hull of some points over log2 of the rate; level from the best point on."""

    points: Sequence[tuple[float, float]]  # bits per pixel, dB

    @property
    def rates(self) -> list[float]:
        return [rate for rate, _ in self.points]

    def at(self, rate: float) -> float | None:
        """PSNR at a rate: straight lines over log2 of the rate; None below the first point.

        Beyond the last point it is that point's PSNR, as more bits need not be used.
        """
        if not self.points or rate < self.points[0][0]:
            return None
        rates, values = zip(*self.points)
        return float(np.interp(math.log2(rate), np.log2(rates), values))


def curve(rows: Iterable[Row]) -> Curve:
    """The curve of the rows' means over seeds: no point lies above it."""
    measured = []
    for row in rows:
        rate, psnr = row.mean("entropy"), row.mean("psnr")
        if rate is not None and psnr is not None and rate > 0:
            measured.append((rate, psnr))
    hull: list[tuple[float, float]] = []
    for point in sorted(measured):
        if hull and point[1] <= hull[-1][1]:
            continue
        while hull and (hull[-1][0] == point[0] or sags([*hull[-2:], point])):
            hull.pop()
        hull.append(point)
    last = max(measured, default=(0.0, 0.0))[0]
    if hull and last > hull[-1][0]:
        hull.append((last, hull[-1][1]))
    return Curve(hull)


def sags(points: Sequence[tuple[float, float]]) -> bool:
    """Return whether the middle one of three points is not above the line through the others."""
    if len(points) < 3:
        return False
    outer = Curve([points[0], points[2]]).at(points[1][0])
    return outer is not None and points[1][1] <= outer


def margins(ours: Curve, peer: Curve) -> list[tuple[float, float]]:
    """Rates and margins of ours over the peer, at the points of either where both are known.

    Between these points both curves are straight lines, so the least margin is among them.
    """
    last = min([MOST_RATE, *(max(LEAST_RATE, rate) for rate in peer.rates[-1:])])
    rates = {LEAST_RATE, last, *ours.rates, *peer.rates}
    found = []
    for rate in sorted(rate for rate in rates if LEAST_RATE <= rate <= last):
        above, below = ours.at(rate), peer.at(rate)
        if above is not None and below is not None:
            found.append((rate, above - below))
    return found


def margins_table(rows: Sequence[Row], ours: Sequence[str], peers: Sequence[str]) -> Table:
    """The least and the greatest margin over each family of peers, and their rates."""
    table = Table(
        f"LooC's curve above each peer's, from {LEAST_RATE:g} to {MOST_RATE:g} bits per pixel",
        ["", "bits per pixel", "least (dB)", "at", "greatest (dB)", "at"],
    )
    best = curve(row for row in rows if row.family in ours)
    for family in peers:
        found = margins(best, curve(row for row in rows if row.family == family))
        if found:
            low, high = min(found, key=itemgetter(1)), max(found, key=itemgetter(1))
            span = f"{found[0][0]:.2f} to {found[-1][0]:.2f}"
            cells = [f"{low[1]:+.2f}", f"{low[0]:.2f}", f"{high[1]:+.2f}", f"{high[0]:.2f}"]
            table.rows.append([family, span, *cells])
    return table


def close_ones(rows: Sequence[Row], within: float) -> set[str]:
    """Names of the rows whose PSNR is within so many dB of the best other family at their rate.

    The point of that family with the nearest rate is close too. A row without a rate, as of a
    network that is not quantised, is close to none.
    """
    families: dict[str, list[Row]] = {}
    for row in rows:
        if (row.mean("entropy") or 0) > 0:
            families.setdefault(row.family, []).append(row)
    curves = {name: curve(points) for name, points in families.items()}
    found = set()
    for row in itertools.chain(*families.values()):
        rate, psnr = row.mean("entropy") or 0.0, row.mean("psnr") or 0.0
        others = {n: y for n in curves if n != row.family and (y := curves[n].at(rate)) is not None}
        best = max(others, key=lambda name: others[name], default=None)
        if best is not None and abs(psnr - others[best]) <= within:
            nearest = min(
                families[best], key=lambda other: abs(math.log((other.mean("entropy") or 0) / rate))
            )
            found |= {row.name, nearest.name}
    return found
