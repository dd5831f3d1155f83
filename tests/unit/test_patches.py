"""Patches of pictures at full resolution: their pixels, their places, and the pictures' cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import BatchLoader, FileImages, ImageSet, image_sets, open_dataset, split_validation
from datasets.config import DataConfig
from datasets.image_sets import Place
from datasets.patches import Patches, patches_of
from tests.conftest import refusal
from tests.processes import limited_files
from tests.scripts.test_cli import TINY, Script
from tests.unit.test_datasets import augmented, same, smooth_noise
from utils.errors import UserError
from utils.flags.arguments import build

WIDTH, HEIGHT, SIZE = 40, 24, 8
DRAWN: dict[str, Any] = {"crop": "patch", "flip": False}


def coordinates(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """A picture whose red is the column and whose green is the row."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def corner(patches: ImageSet, place: Place | None, index: int = 0) -> tuple[int, int]:
    """Left and top of a patch; its pixels are those of the picture."""
    patch = patches.cropped(index, place).int()
    left, top = patch[:2, 0, 0].tolist()
    assert (patch[0] == torch.arange(left, left + SIZE)).all()
    assert (patch[1] == torch.arange(top, top + SIZE)[:, None]).all()
    return left, top


@pytest.fixture
def files(tmp_path: Path) -> FileImages:
    """Nine pictures of coordinates."""
    for number in range(9):
        coordinates().save(tmp_path / f"{number}.png")
    return FileImages(tmp_path, [f"{number}.png" for number in range(9)], SIZE)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pictures that this process has decoded."""
    names: list[str] = []
    decode = image_sets.decode_picture

    def counted(source: Any, scale: float, name: str, bits: int) -> Any:
        names.append(Path(name).name)
        return decode(source, scale, name, bits)

    monkeypatch.setattr(image_sets, "decode_picture", counted)
    return names


@pytest.mark.parametrize("cached", [False, True])
def test_a_patch_has_the_pixels_of_its_place(
    cached: bool, files: FileImages, tmp_path: Path
) -> None:
    patches = patches_of(files, 1, str(tmp_path / "cache") if cached else None, "x")
    for _ in range(2):
        assert corner(patches, (0, 0)) == (0, 0)
        assert corner(patches, (0.5, 0.25)) == (16, 4)
        assert corner(patches, (1 - 2**-24,) * 2) == (WIDTH - SIZE, HEIGHT - SIZE)
        assert corner(patches, None) == ((WIDTH - SIZE) // 2, (HEIGHT - SIZE) // 2)


def test_pictures_are_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers turn it clockwise: the left edge becomes the upper one
    coordinates().save(tmp_path / "x.png", exif=exif)
    patches = Patches(FileImages(tmp_path, ["x.png"], SIZE), 1)
    assert patches.cropped(0, (0, 0))[:2, 0, 0].tolist() == [0, HEIGHT - 1]
    assert patches.cropped(0, (1 - 2**-24,) * 2)[:2, -1, -1].tolist() == [WIDTH - 1, 0]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_scale_reduces_the_picture_first(suffix: str, tmp_path: Path) -> None:
    whole = Image.fromarray(smooth_noise(80, 120))
    whole.save(tmp_path / f"x.{suffix}", quality=95, subsampling=0)
    images = FileImages(tmp_path, [f"x.{suffix}"], SIZE)
    expected = np.asarray(whole.resize((60, 40), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(images.picture(0, 0.5) - expected).max() <= (0 if suffix == "png" else 12)
    patch = Patches(images, 0.5).cropped(0).numpy().transpose(1, 2, 0)
    assert np.abs(patch - expected[16:24, 26:34]).max() <= (0 if suffix == "png" else 12)


def test_small_pictures_are_enlarged(tmp_path: Path) -> None:
    Image.new("RGB", (5, 2), "red").save(tmp_path / "x.png")
    patch = Patches(FileImages(tmp_path, ["x.png"], SIZE), 1).cropped(0, (0.9, 0.9))
    assert patch.shape == (3, SIZE, SIZE)
    assert patch[0].unique().tolist() == [255]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_picture_is_decoded_once(
    num_workers: int, files: FileImages, decoded: list[str], tmp_path: Path
) -> None:
    expected = augmented(Patches(files, 1), **DRAWN)
    decoded.clear()

    def opened(scale: float = 1) -> Patches:
        return patches_of(files, scale, str(tmp_path / "cache"), "x")

    assert same(augmented(opened(), num_workers=num_workers, **DRAWN), expected)
    assert num_workers or len(decoded) == 9
    decoded.clear()
    assert same(augmented(opened(), **DRAWN), expected)
    assert not same(augmented(opened(), epoch=1, **DRAWN), expected)
    assert not decoded
    assert opened(0.5).folder != opened().folder
    assert len(list(opened().folder.iterdir())) == 9  # type: ignore[union-attr]
    (tmp_path / "0.png").touch()  # another time: perhaps another picture
    assert opened().folder != patches_of(files, 1, str(tmp_path / "cache"), "y").folder


@pytest.mark.parametrize("damage", [b"", b"junk", b"\x93NUMPY", None])
def test_a_damaged_file_is_decoded_again(
    damage: bytes | None, files: FileImages, decoded: list[str], tmp_path: Path
) -> None:
    patches = patches_of(files, 1, str(tmp_path / "cache"), "x")
    corner(patches, (0, 0))
    (path,) = patches.folder.iterdir()  # type: ignore[union-attr]
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    assert corner(patches, (0.5, 0.25)) == corner(patches, (0.5, 0.25)) == (16, 4)
    assert decoded == ["0.png", "0.png"]


def test_a_cache_that_cannot_be_written(files: FileImages, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refusal(lambda: patches_of(files, 1, str(tmp_path / "file"), "x"))
    assert message.startswith(f"--image_cache: {tmp_path / 'file'}/x-pictures-")
    assert message.endswith("cannot be created: Not a directory")
    patches = patches_of(files, 1, str(tmp_path / "cache"), "x")
    patches.folder.rmdir()  # type: ignore[union-attr]
    loader = BatchLoader(patches, 4, device=torch.device("cpu"), skip_bad=True)
    message = f"--image_cache: {patches.folder}/00000000.npy: No such file or directory"
    assert refusal(lambda: list(loader.epoch())) == message
    assert not loader.bad_images


def test_a_full_disk_is_told_with_flag_and_file(files: FileImages, tmp_path: Path) -> None:
    """numpy's own error has neither; a limit on the size of files stands for the disk."""
    patches = patches_of(files, 1, str(tmp_path / "cache"), "x")
    with limited_files(500), pytest.raises(OSError, match="File too large") as raised:
        corner(patches, None)
    assert raised.value.filename == f"--image_cache: {patches.folder}/00000000.npy"
    assert not list(patches.folder.iterdir())  # type: ignore[union-attr]


def test_patches_depend_on_seed_epoch_and_position_alone(files: FileImages) -> None:
    patches = Patches(files, 1)
    expected = augmented(patches, **DRAWN)
    torch.manual_seed(99)
    for options in ({"ranks": 3}, {"num_workers": 2}, {"batch_size": 7}):
        assert same(augmented(patches, **{**DRAWN, **options}), expected)
    resumed = augmented(patches, start=1, **DRAWN)
    assert len(resumed) == 5
    assert same(resumed, {i: expected[i] for i in resumed})
    for options in ({"epoch": 1}, {"seed": 4}):
        assert not same(augmented(patches, **{**DRAWN, **options}), expected)


def test_every_place_is_drawn(files: FileImages) -> None:
    found = [
        image[:2, 0, 0].tolist()
        for epoch in range(60)
        for image in augmented(Patches(files, 1), epoch=epoch, **DRAWN).values()
    ]
    lefts, tops = (set(offsets) for offsets in zip(*found))
    assert lefts == set(range(WIDTH - SIZE + 1))
    assert tops == set(range(HEIGHT - SIZE + 1))
    assert abs(np.corrcoef(np.array(found).T)[0, 1]) < 0.15


def test_parts_keep_their_patches(tmp_path: Path) -> None:
    for number in range(12):
        coordinates().save(tmp_path / f"{number:02}.png")
    whole = open_dataset("folder", str(tmp_path), "train", SIZE, patch_scale=1)
    for part in split_validation(whole):
        assert corner(part, (0.5, 0.25)) == (16, 4)
        assert Path(part.name(0)).is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dataset": "mnist", "crop": "patch"}, "--crop patch contradicts --dataset mnist"),
        ({"dataset": "folder", "crop_scale": 0.5}, "--crop_scale 0.5 needs --crop patch, not cent"),
    ],
)
def test_contradictions(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(DataConfig, flags)


def test_a_run_on_patches(script: Script, tmp_path: Path) -> None:
    """Training resumes bit for bit; validation and test take the patch in the middle."""
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        coordinates(30 + number, 41).save(tmp_path / f"pictures/{number}.png")
    words = (
        *("main.py", "--dataset", "folder", "--data_folder", "pictures", "--image_size", "8"),
        *("--crop", "patch", "--image_cache", "cache", "--batch_size", "4", "--device", "cpu"),
        *TINY,
    )
    whole = script(*words, "--max_steps", "5", "--exp_name", "whole", "--num_workers", "2")
    assert whole.code == 0, whole.err
    assert "images of folder, patches of 8×8" in whole.err
    parts = (*words, "--exp_name", "parts", "--num_workers", "0", "--max_steps")
    assert script(*parts, "3").code == 0
    assert "resumed" in script(*parts, "5").err
    ours, theirs = (
        torch.load(tmp_path / f"output/models/{name}/last.pt", weights_only=True)["model"]
        for name in ("parts", "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    outcome = script(*words, "--exp_name", "parts", "--crop_scale", "0.5", "--max_steps", "9")
    assert "--crop_scale 0.5 (it has 1.0)" in outcome.err
    crops: list[tuple[tuple[str, ...], set[int]]] = [((), {16})]
    crops.append((("--crop", "centre"), set(range(12))))
    for crop, corners in crops:
        tested = script("test.py", "--model_name", "parts/best.pt", "--num_workers", "0", *crop)
        assert tested.code == 0, tested.err
        for path in tmp_path.glob("output/results/parts/**/original/*.png"):
            with Image.open(path) as picture:
                assert picture.getpixel((0, 0))[0] in corners  # type: ignore[index]
