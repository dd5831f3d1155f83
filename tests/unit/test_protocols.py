"""Each step of the protocols against the reference's own operations, written out."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from skimage.metrics import structural_similarity

from utils.errors import UserError
from utils.evaluation import metrics, protocols
from utils.evaluation.metrics import METRICS, Pixels
from utils.evaluation.pairs import open_pair, read_entry
from utils.evaluation.protocols import PROTOCOLS, Side


@lru_cache
def photographs() -> Pixels:
    """Two crops of photographs and smoothed noise, (3, 3, 96, 80)."""
    crops = [np.asarray(picture)[100:196, 120:200] for picture in (data.astronaut(), data.coffee())]
    random = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    crops.append(np.asarray(Image.fromarray(random).resize((80, 96))))
    return np.stack(crops).transpose(0, 3, 1, 2)


def blurred(images: Pixels) -> Pixels:
    return np.stack([protocols.resized(protocols.resized(i, 20), 96)[:, :, :80] for i in images])


def written(image: Pixels) -> Image.Image:
    """Write and read as the reference does: three channels, JPEG with Pillow's quality, 75."""
    file = io.BytesIO()
    rgb = image.repeat(3, 0) if len(image) == 1 else image
    Image.fromarray(rgb.transpose(1, 2, 0)).save(file, "JPEG")
    return Image.open(file).convert("RGB")


def as_array(picture: Image.Image) -> Pixels:
    return np.asarray(picture).transpose(2, 0, 1)


def test_a_cameras_jpeg_is_a_jpeg(tmp_path: Path) -> None:
    """With a second picture behind the first Pillow names it MPO: L1 was 0.0134."""
    first, second = map(Image.fromarray, photographs()[:2].transpose(0, 2, 3, 1))
    first.save(tmp_path / "plain.jpg")
    first.save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=[second])
    pair = open_pair("x", tmp_path / "plain.jpg", tmp_path / "camera.jpg")
    original, reconstruction = read_entry(pair, PROTOCOLS["reference"])
    assert np.array_equal(original, reconstruction)
    assert np.array_equal(original, as_array(Image.open(tmp_path / "plain.jpg")))


def test_truncation_is_that_of_the_tensors_on_their_way() -> None:
    """ToTensor, Normalize(0.5, 0.5), back to [0, 1], times 255, astype(uint8)."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    signed = (levels.float().div(255) - 0.5) / 0.5
    back = (((signed + 1) / 2).clamp(0, 1).numpy() * 255).astype(np.uint8)
    assert np.array_equal(protocols.truncated(levels.numpy()), back)
    lowered = back.ravel() != np.arange(256)
    assert np.flatnonzero(lowered).tolist() == list(range(1, 64))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_that_of_three_channels(channels: int) -> None:
    """Pillow's default quality is 75; a grey image has no colour to lose."""
    for image in photographs()[:, :channels]:
        found = protocols.through_jpeg(image, 75)
        assert found.shape == image.shape
        assert np.array_equal(np.broadcast_to(found, (3, 96, 80)), as_array(written(image)))
        assert not np.array_equal(found, image)


def test_resize_is_pillows_bilinear() -> None:
    for image in photographs():
        expected = Image.fromarray(image.transpose(1, 2, 0)).resize(
            (229, 229), Image.Resampling.BILINEAR
        )
        assert np.array_equal(protocols.resized(image, 229), as_array(expected))
    grey = protocols.resized(photographs()[0][:1], 229)
    assert np.array_equal(protocols.resized(photographs()[0][:1].repeat(3, 0), 229)[:1], grey)


def test_ssim_is_the_references_call() -> None:
    """On float32 in [0, 1], with a uniform window of 11 and the sample covariance."""
    x, y = photographs(), blurred(photographs())
    compare = PROTOCOLS["reference"].comparison("ssim")
    assert compare is not None
    found = compare(x, y)
    for value, a, b in zip(found, x.transpose(0, 2, 3, 1), y.transpose(0, 2, 3, 1)):
        expected = structural_similarity(
            a.astype(np.float32) / 255,
            b.astype(np.float32) / 255,
            channel_axis=2,
            data_range=1,
            win_size=11,
        )
        assert value == pytest.approx(expected, abs=2e-4)  # the reference adds up in float32
    assert (np.abs(found - metrics.ssim(x, y)) > 1e-3).all()


def test_prepared_originals_are_the_references_files() -> None:
    protocol = PROTOCOLS["reference"]
    for image in photographs():
        expected = as_array(written(protocols.truncated(image)))
        assert np.array_equal(protocol.prepare(image, "PNG", "original"), expected)
        expected = as_array(written(image))
        assert np.array_equal(protocol.prepare(image, "PNG", "reconstruction"), expected)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_jpeg_files_are_taken_as_they_are(name: str) -> None:
    image = photographs()[0]
    sides: tuple[Side, Side] = ("original", "reconstruction")
    for side in sides:
        assert np.array_equal(PROTOCOLS[name].prepare(image, "JPEG", side), image)


def test_clean_changes_nothing() -> None:
    protocol = PROTOCOLS["clean"]
    images = photographs()
    assert protocol.for_inception(images) is images
    assert np.array_equal(protocol.prepare(images[0], "PNG", "original"), images[0])
    for name, metric in METRICS.items():
        found = protocol.comparison(name)
        assert (found is None) == (metric.compare is None)
        if found is not None:
            x, y = images, blurred(images)
            assert metric.compare is not None
            assert np.array_equal(found(x, y), metric.compare(x, y))


def test_reference_gives_inception_229() -> None:
    assert PROTOCOLS["reference"].for_inception(photographs()[:, :1]).shape == (3, 1, 229, 229)


def test_an_image_too_large_for_jpeg_is_one_line() -> None:
    with pytest.raises(UserError, match="70000×1 cannot be written as JPEG"):
        protocols.through_jpeg(np.zeros((1, 1, 70000), np.uint8), 75)
