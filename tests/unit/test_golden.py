"""The quantiser returns the results of the reference on the same inputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from modules import LooCQuantizer

GOLDEN = Path(__file__).parents[1] / "golden"
QUANTIZER_FILES = sorted(GOLDEN.glob("looc_*.npz")) + sorted(GOLDEN.glob("cvq_*.npz"))


def assert_equal(ours: Tensor, reference: np.ndarray) -> None:
    """Compare to 1e-5 of the largest value of the reference."""
    reference = np.asarray(reference)
    atol = 1e-5 * np.abs(reference).max()
    np.testing.assert_allclose(ours.detach().cpu().numpy(), reference, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("path", QUANTIZER_FILES, ids=lambda path: path.stem)
def test_three_training_calls(path: Path) -> None:
    three_training_calls(path, torch.device("cpu"))


def three_training_calls(path: Path, device: torch.device) -> None:
    data = np.load(path)
    # The reference does not reorder interval units, so output and loss cannot be compared.
    interval = path.stem == "looc_interval"
    quantizer = LooCQuantizer(**json.loads(str(data["config"]))).to(device)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.from_numpy(data["codebook_before"]))
    for call in range(3):
        z = torch.from_numpy(data[f"z_{call}"]).to(device).requires_grad_()
        quantizer.zero_grad()
        latents, loss, indices = quantizer(z)
        direction = torch.linspace(-1, 1, latents.numel()).view(latents.shape).to(device)
        (loss + (latents * direction).sum()).backward()

        assert np.array_equal(indices.cpu().flatten(), data[f"indices_{call}"])
        assert_equal(quantizer.codebook, data[f"codebook_after_{call}"])
        assert_equal(quantizer.usage, data[f"usage_ema_after_{call}"])
        if interval:
            continue
        assert z.grad is not None
        assert quantizer.codebook.grad is not None
        assert_equal(latents, data[f"z_q_{call}"])
        assert_equal(loss, data[f"loss_{call}"])
        assert_equal(z.grad, data[f"grad_z_{call}"])
        assert_equal(quantizer.codebook.grad, data[f"grad_codebook_{call}"])
    if not interval:
        quantizer.eval()
        latents, loss, _ = quantizer(torch.from_numpy(data["z_0"]).to(device))
        assert_equal(latents, data["eval_z_q"])
        assert_equal(loss, data["eval_loss"])
