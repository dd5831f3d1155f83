"""Pictures of a codebook: usage of its codevectors, overall and by slot, and a map of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from utils.codebook.statistics import CodebookStatistics, perplexity, usage
from utils.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USED, UNUSED = "#1f6f8b", "#d1495b"


def new_figure(columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure with axes in one row; width and height in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_usage(statistics: CodebookStatistics) -> Figure:
    """Plot the counts by codevector, and sorted."""
    counts = statistics.counts
    positions = range(len(counts))
    figure, (left, right) = new_figure(2, 11, 3.6)
    left.fill_between(positions, counts.numpy(), step="mid", color=USED)
    left.set(title="Counts by codevector", xlabel="codevector", ylabel="times used")
    right.plot(positions, counts.sort(descending=True).values.numpy(), color=USED)
    right.axhline(float(counts.double().mean()), color="grey", linestyle=":", label="mean")
    if (counts > 0).any():
        right.set_yscale("symlog")
    right.set(title="Sorted counts", xlabel="rank", ylabel="times used")
    right.legend(title=caption(statistics))
    for axes in (left, right):
        axes.set_xlim(-0.5, len(counts) - 0.5)
        axes.set_ylim(bottom=0)
    return figure


def draw_slots(statistics: CodebookStatistics) -> Figure:
    """Plot the use of codevectors by unit slot, and the number of slots that use a codevector.

    If each slot has its own codebook, the second plot is the usage of each codebook.
    """
    share = statistics.slot_counts / statistics.slot_counts.sum(1, keepdim=True)  # (m, K)
    figure, (left, right) = new_figure(2, 11, 3.6)
    if statistics.num_codebooks > 1:
        ordered = share.sort(dim=1, descending=True).values
        draw_usage_of_slots(right, share)
    else:
        ordered = share[:, statistics.counts.argsort(descending=True)]
        draw_reach(right, share)
    root = ordered.sqrt().numpy()  # the square root makes rare use visible
    mesh = left.imshow(root, aspect="auto", cmap="viridis", interpolation="nearest")
    figure.colorbar(mesh, ax=left, label="square root of the share of the slot's codes")
    left.set(title="Use by unit slot", xlabel="codevector, most used first", ylabel="slot")
    return figure


def draw_reach(axes: Any, share: Tensor) -> None:
    """Plot the number of slots that use a codevector; shares (m, K) of one codebook."""
    slots = len(share)
    reach = (share > 0).sum(0)
    axes.bar(range(slots + 1), torch.bincount(reach, minlength=slots + 1).tolist(), color=USED)
    axes.set(
        title="Slots in which a codevector is used",
        xlabel=f"slots, of {slots}",
        ylabel="codevectors",
    )


def draw_usage_of_slots(axes: Any, share: Tensor) -> None:
    """Plot the usage of each slot's own codebook; shares (m, K)."""
    axes.bar(range(len(share)), [100 * usage(row) for row in share], color=USED)
    axes.set(title="Usage of each slot's codebook", xlabel="slot", ylabel="% of its codevectors")


def principal_components(points: Tensor) -> tuple[Tensor, Tensor]:
    """Project on the first two principal axes; also returns the share of variance of each.

    (n, d) → (n, 2), (2,); missing axes are zero.
    """
    centred = (points - points.mean(0)).double()
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    padded = torch.zeros(len(points), 2, dtype=torch.float64)
    share = torch.zeros(2, dtype=torch.float64)
    kept = min(2, len(singular))
    padded[:, :kept] = left[:, :kept] * singular[:kept]
    variance = singular.square()
    share[:kept] = variance[:kept] / variance.sum().clamp_min(1e-30)
    return padded, share


def draw_codebook(codebook: Tensor, counts: Tensor) -> Figure:
    """Plot codevectors (K, d) on their two principal axes, used and unused ones by counts (K,)."""
    points, share = principal_components(codebook.detach().cpu())
    used = counts > 0
    figure, axes = new_figure(1, 6, 5.4)
    axes.scatter(*points[~used].T.numpy(), marker="x", color=UNUSED, s=22, linewidths=1)
    area = 8 + 72 * (counts[used] / counts.max().clamp_min(1)).sqrt()
    axes.scatter(*points[used].T.numpy(), s=area.numpy(), color=USED, alpha=0.7, linewidths=0)
    axes.set(
        title=f"Codebook: {int(used.sum())} used (dots, area by count), "
        f"{int((~used).sum())} unused (crosses)",
        xlabel=f"first principal axis ({share[0]:.0%} of variance)",
        ylabel=f"second principal axis ({share[1]:.0%})",
    )
    axes.title.set_fontsize(10)
    axes.set_aspect("equal", adjustable="datalim")
    return figure


def draw_all(statistics: CodebookStatistics, codebook: Tensor) -> dict[str, Figure]:
    """The three pictures of a codebook, by name; empty without a quantiser."""
    if not len(statistics.counts):
        return {}
    return {
        "usage": draw_usage(statistics),
        "slots": draw_slots(statistics),
        "codebook": draw_codebook(codebook, statistics.counts),
    }


def caption(statistics: CodebookStatistics) -> str:
    counts = statistics.counts
    return f"usage {usage(counts):.1%}, perplexity {perplexity(counts):.1f} of {len(counts)}"
