"""Pictures edited by latent diffusion, as a user calls it; test_generate.py has other priors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Outcome
from tests.processes import run_ranks
from tests.scripts.test_generate import DIFFUSION, SAMPLE, STAGE, pictures, same

pytest.importorskip("diffusers")
Script = Callable[..., Outcome]


def test_pictures_are_edited_by_latent_diffusion(
    script: Script, mnist: Path, tmp_path: Path
) -> None:
    assert script(*STAGE, "--max_steps", "20").code == 0
    assert script(*DIFFUSION, "--max_steps", "20", "--lr", "0.01").code == 0
    samples = mnist.parents[1] / "output" / "samples" / "prior"
    ramp = np.tile(np.linspace(0, 255, 28).astype(np.uint8), (28, 1))
    for name, pixels in (("a", ramp), ("b", ramp[:, ::-1])):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    images = ("--images", "a.png", "b.png", "--sampling_steps", "10")

    def edit(*words: str) -> list[np.ndarray]:
        outcome = script(*SAMPLE, *images, *words, "--overwrite")
        assert outcome.code == 0, outcome.err
        found = pictures(samples / f"best-{words[0][2:]}")
        return [found[name].astype(int) for name in sorted(found)]

    right = edit("--inpaint", "right", "--num_samples", "4")
    left = edit("--inpaint", "left", "--num_samples", "4")
    part = np.s_[:, :4]  # beyond the reach of what is drawn anew
    assert np.abs(right[0][part] - right[2][part]).max() <= 1
    assert np.abs(right[0] - right[2]).max() > 1
    assert np.abs(left[0][part] - left[2][part]).max() > 1
    few = edit("--vary", "0.1", "--num_samples", "4")
    more = edit("--vary", "0.9", "--num_samples", "4")
    assert np.abs(few[0] - few[2]).mean() < np.abs(more[0] - more[2]).mean()
    words = (*SAMPLE, *images, "--vary", "0.9", "--num_samples", "4", "--batch_size", "1")
    before = pictures(samples / "best-vary")
    for outcome in run_ranks((*words, "--overwrite"), tmp_path):
        assert outcome.code == 0, outcome.err
    assert same(pictures(samples / "best-vary"), before)
    steps = edit("--interpolate", "6", "--vary", "0.1")
    to_first = [np.abs(step - few[0]).mean() for step in steps]
    assert len(steps) == 6
    assert to_first[0] < to_first[-1]
