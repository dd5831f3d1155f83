"""Charts of a codebook: use of its codevectors, overall and by unit slot, and a map of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from utils.charts import FIRST, SECOND, Chart, picture
from utils.codebook.statistics import CodebookStatistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_COLUMNS = 512  # of a histogram or a heat map
MANY = 1000  # more points than these become pixels: as paths they would swell a page
MORE_USED_FIRST = "codevectors, most used first"


def draw_all(statistics: CodebookStatistics, codebook: Tensor) -> dict[str, Figure]:
    """Draw usage, slots and codebook, by these names; nothing without a quantiser."""
    counts, slot_counts = statistics.counts.numpy(), statistics.slot_counts.numpy()
    if not len(counts):
        return {}
    return {
        "usage": picture(usage_chart(counts)),
        "slots": picture(*slot_charts(slot_counts, counts)),
        "codebook": picture(codebook_chart(codebook, counts)),
    }


def usage_chart(counts: np.ndarray) -> Chart:
    """Plot the sorted counts (K,) of codevectors."""
    ordered = -np.sort(-counts)
    share = ordered / max(ordered.sum(), 1) * len(ordered)  # 1 is equal use
    bins = np.array_split(share, min(len(share), MAX_COLUMNS))
    half = int(np.searchsorted(np.cumsum(ordered), ordered.sum() / 2)) + 1
    return Chart(
        "Use of the codevectors, the most used first",
        f"{len(counts):,} codevectors, {int((counts == 0).sum()):,} unused; the most used is used "
        f"{share[0]:.3g} times as often as equal use; {half:,} carry half of all codes",
        MORE_USED_FIRST,
        "times equal use",
        partial(
            draw_bars,
            values=[part.mean() for part in bins],
            width=len(share) / len(bins),
            mark="equal use",
        ),
    )


def codebook_chart(codebook: Tensor, counts: np.ndarray) -> Chart:
    """Plot codevectors (K, d) on their two principal axes; dots are used, by counts (K,)."""
    points, variance = principal_components(codebook.detach().float().cpu())
    used = counts > 0
    diameters = (1 + 4 * np.sqrt(counts / max(counts.max(), 1))).round() * 2  # (K,) 2, 4 … 10
    return Chart(
        "Map of the codebook",
        f"{int(used.sum()):,} used codevectors (dots, larger if used more often) and "
        f"{int((~used).sum()):,} unused ones (crosses); the two axes explain {variance.sum():.0%} "
        "of the variance",
        f"first axis ({variance[0]:.0%} of variance)",
        f"second axis ({variance[1]:.0%})",
        partial(draw_map, points=points.numpy(), diameters=np.where(used, diameters, 0)),
    )


def principal_components(points: Tensor) -> tuple[Tensor, Tensor]:
    """Project (n, d) on two principal axes → (n, 2), and their shares of variance, (2,)."""
    centred = (points - points.mean(0)).double()
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    left, singular = pad(left, (0, 2)), pad(singular, (0, 2))
    variance = singular.square() / singular.square().sum().clamp_min(1e-30)
    return (left * singular)[:, :2], variance[:2]


def slot_charts(slot_counts: np.ndarray, counts: np.ndarray) -> list[Chart]:
    """Plot the use of codevectors by slot, from the counts of slots (m, K) and in all."""
    num_slots, size = slot_counts.shape
    share = slot_counts / slot_counts.sum(1, keepdims=True).clip(1)
    own = size < len(counts)  # each slot has a codebook of its own
    order = np.argsort(-(share if own else counts[None]), axis=1, kind="stable")
    ordered = np.sqrt(np.take_along_axis(share, np.broadcast_to(order, share.shape), axis=1))
    columns = min(size, MAX_COLUMNS)
    ordered = np.maximum.reduceat(ordered, np.arange(columns) * size // columns, axis=1)
    used = slot_counts > 0  # (m, K)
    reach = used.sum(0)  # (K,)
    described = "each slot has its own" if own else f"used in {np.median(reach):.0f} slots (median)"
    heat_map = Chart(
        "Use of the codevectors by unit slot",
        f"{num_slots} unit slots by {size:,} codevectors, {described}; black is never, pale yellow "
        f"{ordered.max() ** 2:.1%} of a slot's codes (the colour follows the root of the share)",
        MORE_USED_FIRST,
        "unit slot",
        partial(draw_heat_map, values=ordered, size=(size, num_slots)),
    )
    if num_slots == 1:
        return [heat_map]
    if own:
        bars = 100 * used.mean(1)  # (m,)
        name, labels = "Usage of each slot's codebook", ("unit slot", "% of codevectors")
        described = f"from {bars.min():.0f} to {bars.max():.0f} % of its codevectors"
    else:
        bars = np.bincount(reach, minlength=num_slots + 1)  # (m + 1,)
        name = "Slots in which a codevector is used"
        labels = name.lower(), "codevectors"
        described = f"{bars[0]:,} codevectors in none of {num_slots} slots, {bars[-1]:,} in all"
    drawing = partial(draw_bars, values=bars, start=-0.5)
    return [heat_map, Chart(name, described, *labels, drawing)]


def draw_bars(
    axes: Any,
    values: Sequence[float] | np.ndarray,
    start: float = 0,
    width: float = 1,
    mark: str = "",
) -> None:
    """Draw touching bars of one width, from start on; mark names a line at height 1."""
    edges = start + width * np.arange(len(values) + 1)
    axes.stairs(values, edges, fill=True, color=FIRST, alpha=0.8)
    if mark:
        axes.axhline(1, color=SECOND, ls="--")
        axes.text(edges[-1], 1, f"{mark}\n", ha="right", va="center")


def draw_map(axes: Any, points: np.ndarray, diameters: np.ndarray) -> None:
    """Draw points (K, 2) as dots, or as crosses where their diameter is 0, on axes of one scale."""
    pixels = len(points) > MANY
    for diameter in np.unique(diameters):
        dots = {"c": FIRST, "marker": "o", "ms": diameter, "mew": 0, "alpha": 0.7}
        look = {"c": SECOND, "marker": "x", "ms": 6, "mew": 1.4} if diameter == 0 else dots
        axes.plot(*points[diameters == diameter].T, ls="", rasterized=pixels, **look)
    axes.set_aspect("equal", "datalim")


def draw_heat_map(axes: Any, values: np.ndarray, size: tuple[int, int]) -> None:
    """Draw values (rows, columns) over axes from 0 to size, the first row on top."""
    columns, rows = size
    extent = (0, columns, rows, 0)
    axes.imshow(values, "inferno", aspect="auto", interpolation="none", extent=extent)
    axes.grid(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
