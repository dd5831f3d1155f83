"""generate.py export: diffusers' own LDMPipeline opens the folder, and draws what we draw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modules.priors.sampling import Sampling
from tests.conftest import Outcome, write_idx
from tests.scripts.test_generate import DIFFUSION, STAGE, TRAIN
from utils.generation.checkpoints import read_prior
from utils.generation.samples import draw_images

diffusers = pytest.importorskip("diffusers")
Script = Callable[..., Outcome]
EXPORT = ("generate.py", "export", "--model_name", "prior/best.pt")
FOLDER = Path("output/diffusers/prior/best")


@pytest.fixture
def stage(script: Script, mnist: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A first stage of images with labels; diffusers copies code to a folder of this test."""
    code = "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(code, str(tmp_path / "code"))
    labels = mnist / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    write_idx(labels, (np.arange(40) % 10).astype(np.uint8))
    assert script(*STAGE, "--max_steps", "20").code == 0


def drawn_by_both(label: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (3, 28, 28, 1) of LDMPipeline and of our sampler, by the same noise."""
    pipeline = diffusers.LDMPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    seeded = torch.Generator().manual_seed(5)
    options: dict[str, Any] = {"num_inference_steps": 5, "output_type": "np"}
    theirs = pipeline(batch_size=3, generator=seeded, **options).images
    stored = read_prior(Path("output/models/prior/best.pt"))

    def noise(*sizes: int) -> Tensor:
        normal = torch.randn(3, *sizes, generator=torch.Generator().manual_seed(5))
        found: Tensor = torch.special.ndtr(normal.double())
        return found

    _, first_stage = stored.open_first_stage(None, "output")
    how, labels = Sampling(sampling_steps=5), torch.full((3,), label)
    spec = stored.config.spec
    ours = draw_images(spec, first_stage, how, stored.model(), labels, noise)
    return theirs, ours.permute(0, 2, 3, 1).numpy() / 255


@pytest.mark.usefixtures("stage")
@pytest.mark.parametrize(  # 7×7 latents: as they are, or padded
    ("multipliers", "kind"), [("1", "epsilon"), ("1,2", "v_prediction")]
)
def test_ldm_pipeline_draws_what_we_draw(script: Script, multipliers: str, kind: str) -> None:
    unet = ("--unet_multipliers", multipliers, "--unet_attention", "1", "--prediction_type", kind)
    assert script(*DIFFUSION, *unet, "--max_steps", "20", "--lr", "0.01").code == 0
    exported = script(*EXPORT)
    assert exported.code == 0, exported.err
    assert exported.err.splitlines()[-1].endswith(str(FOLDER))
    theirs, ours = drawn_by_both(-1)
    assert ours.std() > 0.05
    assert np.abs(theirs - ours).max() < 0.01
    refused = script(*EXPORT, "--label", "0")
    assert refused.code == 2
    assert "best.pt has no classes" in refused.err


@pytest.mark.usefixtures("stage")
def test_one_class_is_exported(script: Script) -> None:
    words = ("--class_conditional", "--label_dropout", "0", "--max_steps", "20", "--lr", "0.01")
    assert script(*DIFFUSION, *words).code == 0
    assert "export needs --label" in script(*EXPORT).err
    assert script(*EXPORT, "--label", "3").code == 0
    assert json.loads((FOLDER / "unet/config.json").read_text())["num_class_embeds"] is None
    theirs, ours = drawn_by_both(3)
    assert np.abs(theirs - ours).max() < 0.01
    assert np.abs(theirs - drawn_by_both(4)[1]).max() > 0.02


@pytest.mark.usefixtures("stage")
def test_one_line_for_a_prior_of_codes(script: Script) -> None:
    assert script(*TRAIN, "--max_steps", "1").code == 0
    refused = script(*EXPORT)
    assert refused.code == 2
    assert "best.pt is a transformer prior; diffusion ones can be exported" in refused.err
    assert not FOLDER.parent.exists()
