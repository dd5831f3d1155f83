"""Images held out from a folder by their names, and checkpoints that know their images again."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datasets import open_dataset, split_validation
from datasets.config import DataConfig
from datasets.sampling import hold_out_by_name
from datasets.splits import check_images, names_stored, open_tested, open_training
from modules import ModelConfig
from tests.conftest import refusal
from utils.checkpoints.checkpoint import Checkpoint, Stored

NAMES = [f"{number:03}.png" for number in range(200)]


def write(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(list(f"{folder.name}/{name}".encode()))
        Image.fromarray(noise.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "pictures", *NAMES[:60])


def config(folder: Path) -> DataConfig:
    return DataConfig("folder", str(folder), 8)


def trained(folder: Path, validation: str = "split", **content: Any) -> Checkpoint:
    """A checkpoint of a model trained on the images that are in the folder now."""
    stored = names_stored(*open_training(config(folder), validation))
    content = {"data_config": asdict(config(folder)), **stored, **content}
    return Checkpoint(Path("m.pt"), content, ModelConfig(), {})


def chosen(checkpoint: Checkpoint, folder: Path, split: str | None = None) -> tuple[int, str]:
    images, found = open_tested(checkpoint, config(folder), split)
    return len(images), found


def resumed(checkpoint: Stored, folder: Path) -> None:
    check_images(checkpoint, config(folder), names_stored(*open_training(config(folder), "split")))


def by_name(names: list[str], purpose: str = "test") -> tuple[set[str], set[str]]:
    kept, held_out = hold_out_by_name(names, purpose)
    return {names[i] for i in kept}, {names[i] for i in held_out}


@pytest.mark.parametrize("purpose", ["test", "validation"])
def test_an_added_image_moves_none_of_the_others(purpose: str) -> None:
    """By position, 18 of 20 test images became former training images."""
    kept, held_out = by_name(NAMES, purpose)
    assert 10 <= len(held_out) <= 30
    for number in range(20):
        more = [f"{number}-new.png", *NAMES[number:]]
        now_kept, now_held_out = by_name(more, purpose)
        assert not now_held_out & kept
        assert not now_kept & held_out


def test_a_tenth_is_held_out_and_one_at_least() -> None:
    assert len(by_name([str(number) for number in range(10_000)])[1]) == pytest.approx(1000, abs=90)
    for number in range(50):
        assert all(by_name([f"{number}a", f"{number}b"]))
    assert by_name(NAMES)[1] != by_name(NAMES, "validation")[1]


def test_test_and_training_images_share_none(folder: Path) -> None:
    opened = [open_dataset("folder", str(folder), split, 8) for split in ("train", "test")]
    parts = [set(part.split_keys()) for part in (*split_validation(opened[0]), opened[1])]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60


def test_the_test_images_of_training_are_tested(folder: Path) -> None:
    checkpoint = trained(folder)
    number = len(open_dataset("folder", str(folder), "test", 8))
    assert chosen(checkpoint, folder) == (number, "test")
    assert chosen(checkpoint, folder, "train") == (60 - number, "train")
    assert chosen(checkpoint, folder, "all") == (60, "all")
    added = next(name for name in NAMES[60:] if name in by_name(NAMES)[0])
    write(folder, added)
    assert chosen(checkpoint, folder) == (number, "test")


@pytest.mark.parametrize("layout", [NAMES[:20], NAMES[:1], [f"test/{name}" for name in NAMES[:5]]])
def test_other_data_are_tested_whole(layout: list[str], folder: Path, tmp_path: Path) -> None:
    """20 new pictures were 2 test images."""
    assert chosen(trained(folder), write(tmp_path / "new", *layout)) == (len(layout), "all")


def test_a_copied_folder_is_the_one_of_training(folder: Path, tmp_path: Path) -> None:
    checkpoint, other = trained(folder), write(tmp_path / "others", *NAMES[:60])
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert chosen(checkpoint, copy)[1] == "test"
    assert chosen(checkpoint, other) == (60, "all")
    splits = write(tmp_path / "splits", "train/a.png", "train/b.png", "test/c.png")
    copy = shutil.copytree(splits, tmp_path / "copied")
    assert chosen(trained(splits), copy) == (1, "test")


def test_renamed_test_images_are_refused(folder: Path) -> None:
    checkpoint = trained(folder)
    for path in list(folder.iterdir()):
        path.rename(path.with_name(f"x{path.name}"))
    message = refusal(lambda: chosen(checkpoint, folder))
    assert message.startswith(f"the test images of {folder} have changed since m.pt was trained")
    assert chosen(checkpoint, folder, "test")[1] == "test"
    own = write(folder.with_name("splits"), "train/a.png", "train/b.png", "test/c.png")
    checkpoint = trained(own)
    write(own, "test/d.png")
    assert chosen(checkpoint, own) == (2, "test")


def test_resume_refuses_other_images(folder: Path) -> None:
    """One image swapped for another, and 17 of 20 former test images were trained on."""
    checkpoint = trained(folder)
    resumed(checkpoint, folder)
    removed, training = (
        open_training(config(folder), "split")[0].split_keys()[0],
        by_name(NAMES)[0],
    )
    swapped = next(
        name for name in NAMES[60:] if name in training - by_name(NAMES, "validation")[1]
    )
    (folder / removed).rename(folder / swapped)
    assert "m.pt was trained on images of other names" in refusal(
        lambda: resumed(checkpoint, folder)
    )
    (folder / swapped).unlink()
    count = checkpoint.content["num_images"]
    assert refusal(lambda: resumed(checkpoint, folder)) == (
        f"m.pt was trained on {count} images, --data_folder gives {count - 1}; "
        "--pretrained m.pt starts from its weights"
    )


def test_a_checkpoint_of_before_is_refused(folder: Path, tmp_path: Path) -> None:
    """Its images were chosen by their positions."""
    old = trained(folder)
    for name in ("names", "test_images"):
        del old.content[name]  # type: ignore[attr-defined]
    held_out_by_name = "m.pt was trained before images were held out by name"
    assert refusal(lambda: resumed(old, folder)).startswith(held_out_by_name)
    assert refusal(lambda: chosen(old, folder)).startswith(held_out_by_name)
    assert refusal(lambda: chosen(old, folder, "test")).startswith(held_out_by_name)
    assert chosen(old, folder, "all") == (60, "all")
    own = write(tmp_path / "splits", "train/a.png", "train/b.png", "test/c.png")
    data = {"data_config": asdict(config(own))}
    assert chosen(Checkpoint(Path("m.pt"), data, ModelConfig(), {}), own) == (1, "test")


def test_val_beside_train_and_test_is_for_validation(tmp_path: Path) -> None:
    own = write(tmp_path / "pictures", "train/a.png", "train/b.png", "test/c.png", "val/d.png")
    training, validation = open_training(config(own), "split")
    assert [len(training), validation.split_keys()] == [2, ["d.png"]]
    checkpoint = trained(own)
    assert chosen(checkpoint, own) == (1, "test")
    assert chosen(checkpoint, own, "all") == (4, "all")
    (own / "val/d.png").rename(own / "val/e.png")
    assert "images of other names" in refusal(lambda: resumed(checkpoint, own))


def test_named_sets_are_known_by_their_names() -> None:
    data = DataConfig("fashion-mnist-sample")
    checkpoint = Checkpoint(Path("m.pt"), {"data_config": asdict(data)}, ModelConfig(), {})
    images, split = open_tested(checkpoint, data, None)
    assert (len(images), split) == (1000, "test")
    other = Checkpoint(Path("m.pt"), {"data_config": {"dataset": "mnist"}}, ModelConfig(), {})
    images, split = open_tested(other, data, None)
    assert (len(images), split) == (7000, "all")
    reference = Checkpoint(Path("m.pt"), {}, ModelConfig(), {})
    assert open_tested(reference, data, None)[1] == "test"
