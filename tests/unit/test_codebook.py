"""Usage, entropy and rate by closed forms; the plots are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from utils.charts import save_figure
from utils.codebook.plots import draw_all, principal_components
from utils.codebook.statistics import CodebookStatistics, entropy_bits, perplexity, usage


def test_entropy_by_closed_forms() -> None:
    assert entropy_bits(torch.full((8,), 5)) == pytest.approx(3)
    assert entropy_bits(torch.tensor([7, 0, 0])) == 0
    assert entropy_bits(torch.tensor([1, 1, 2, 0])) == pytest.approx(1.5)
    assert entropy_bits(torch.zeros(4)) == 0
    assert perplexity(torch.full((8,), 5)) == pytest.approx(8)
    assert usage(torch.tensor([3, 0, 1, 0])) == 0.5


def test_statistics_do_not_depend_on_the_batches() -> None:
    indices = torch.randint(16, (10, 3, 3, 2), generator=torch.Generator().manual_seed(0))
    whole, parts = CodebookStatistics(16), CodebookStatistics(16)
    whole.add(indices)
    for part in indices.split(3):
        parts.add(part)
    assert torch.equal(whole.slot_counts, parts.slot_counts)
    assert whole.summary() == parts.summary()
    assert torch.equal(whole.counts, torch.bincount(indices.flatten(), minlength=16))
    assert torch.equal(
        whole.slot_counts[1], torch.bincount(indices[..., 1].flatten(), minlength=16)
    )


def test_rate_by_closed_form() -> None:
    """Slot 0 always sends code 3, slot 1 each of the four codes equally often."""
    statistics = CodebookStatistics(4)
    second = torch.arange(4).repeat(4).view(4, 2, 2)
    statistics.add(torch.stack([torch.full_like(second, 3), second], dim=-1))
    rate = statistics.rate(num_pixels=16)
    assert rate.codes_per_image == 8
    assert rate.nominal_bits_per_pixel == pytest.approx(8 / 16 * 2)
    shares = torch.tensor([1, 1, 1, 5]) / 8
    assert rate.entropy_bits_per_pixel == pytest.approx(
        0.5 * float(-(shares * shares.log2()).sum()), rel=1e-6
    )
    assert rate.entropy_bits_per_pixel_by_slot == pytest.approx(0.5 * 1)
    summary = statistics.summary()
    assert summary.usage_percent == 100
    assert summary.slot_usage_percent == [25, 100]
    assert summary.slots_per_codevector == [1, 1, 1, 2]
    assert summary.slot_perplexity == pytest.approx([1, 4])


def test_the_papers_example_rate() -> None:
    """K = 256, d = 4, C = 128 on 28 × 28 is 12,544 bits an image."""
    statistics = CodebookStatistics(256)
    statistics.add(torch.zeros(1, 7, 7, 32, dtype=torch.int64))
    assert statistics.rate(28 * 28).nominal_bits_per_pixel == 12_544 / 28**2


def test_principal_components() -> None:
    line = torch.linspace(-1, 1, 9)[:, None] * torch.tensor([3.0, 4.0])
    points, share = principal_components(line)
    assert share.tolist() == pytest.approx([1, 0], abs=1e-6)
    assert points[:, 0].abs().max() == pytest.approx(5)
    assert principal_components(torch.zeros(1, 1))[0].shape == (1, 2)


@pytest.mark.usefixtures("draw_figures")
@pytest.mark.parametrize(("num_embedding", "slots", "dim"), [(16, 3, 4), (1, 1, 1), (5, 2, 2)])
def test_plots_are_pictures(num_embedding: int, slots: int, dim: int, tmp_path: Path) -> None:
    statistics = CodebookStatistics(num_embedding)
    statistics.add(torch.randint(max(1, num_embedding - 1), (2, 4, 4, slots)))
    for name, figure in draw_all(statistics, torch.randn(num_embedding, dim)).items():
        save_figure(tmp_path / f"{name}.png", figure)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("codebook.png", "slots.png", "usage.png"),
    ]
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(10**7) or ()) > 10
