"""Every data set of the registry, on tiny archives and folders in the real layout."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datasets import (
    DATASETS,
    BatchLoader,
    FileImages,
    ImageSet,
    TensorImages,
    evenly_spread,
    folders,
    idx,
    open_dataset,
    pixel_variance,
    split_validation,
    variance,
)
from datasets.config import DataConfig
from datasets.folders import open_folder
from datasets.image_sets import ChosenImages, Place, Split
from datasets.loader import DecodedBatches
from tests.conftest import Outcome, refusal, run_process
from utils.flags.arguments import build
from utils.image_files import SUFFIXES
from utils.training.resume import differing_flags

CPU = torch.device("cpu")
TRAIN, TEST = list(range(10)), list(range(10, 13))  # numbers of the images in the tiny sets
MNIST_LIKE = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
FIXED_SIZE = [name for name, entry in DATASETS.items() if not entry.resizable]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every download fail at once, and hide Debian's files."""

    def unreachable(*_args: Any, **_kwargs: Any) -> None:
        sys.stderr.write("progress 0 %")
        raise URLError("no network\nhere")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr("torchvision.datasets.celeba.download_file_from_google_drive", unreachable)
    monkeypatch.setattr(idx, "DEBIAN", Path("/nonexistent"))


# ------------------------------------------------- tiny sets: image i has the grey level 10 i + 5


def flat(number: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    return Image.new("RGB", size, (10 * number + 5,) * 3)


def number_of(image: Tensor) -> int:
    """Return the number of this image in its tiny set; JPEG may have changed it a little."""
    return int(image.float().mean() // 10)


def numbers_in(image_set: ImageSet) -> list[int]:
    return [number_of(image_set[i]) for i in range(len(image_set))]


def save(number: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flat(number).save(path)


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    flat(number).save(buffer, "JPEG")
    return buffer.getvalue()


def idx_bytes(numbers: list[int], side: int = 28) -> bytes:
    header = np.array([0x803, len(numbers), side, side], dtype=">u4").tobytes()
    return header + b"".join(bytes([10 * number + 5]) * side**2 for number in numbers)


def write_idx(folder: Path, packed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in (("train", TRAIN), ("t10k", TEST)):
        content = idx_bytes(numbers)
        path = folder / f"{name}-images-idx3-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content) if packed else content)


def make_mnist(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    write_idx(folder / "MNIST" / "raw")


def make_fashion_mnist(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    write_idx(folder / "FashionMNIST" / "raw", packed=True)


def make_sample(folder: Path, patch: pytest.MonkeyPatch) -> None:
    write_idx(folder, packed=True)
    patch.setattr(idx, "SAMPLE", folder)
    for split, name in idx.FILES.items():
        content = (folder / f"{name}.gz").read_bytes()
        patch.setitem(idx.SAMPLE_SHA256, split, hashlib.sha256(content).hexdigest())


def make_cifar10(folder: Path, patch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)

    def write(name: str, content: dict[str, Any]) -> str:
        (base / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    def batch(name: str, numbers: list[int]) -> list[str]:
        data = np.array([[10 * number + 5] * 3072 for number in numbers], dtype=np.uint8)
        return [name, write(name, {"data": data, "labels": numbers})]

    train = [batch(f"data_batch_{i + 1}", TRAIN[2 * i : 2 * i + 2]) for i in range(5)]
    patch.setattr(CIFAR10, "train_list", train)
    patch.setattr(CIFAR10, "test_list", [batch("test_batch", TEST)])
    patch.setattr(
        CIFAR10, "meta", {**CIFAR10.meta, "md5": write("batches.meta", {"label_names": ["a"]})}
    )


def make_celeba(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    lines = []
    for number in TRAIN + TEST + [14, 15]:  # the last two are CelebA's validation set
        save(number, folder / "celeba" / "img_align_celeba" / f"{number:06}.jpg")
        part = 0 if number in TRAIN else 2 if number in TEST else 1
        lines.append(f"{number:06}.jpg {part}\n")
    (folder / "celeba" / "list_eval_partition.txt").write_text("".join(lines))


def make_imagenet(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    for number in TRAIN:
        save(number, folder / "train" / f"n0000000{number % 2}" / f"n0_{number}.JPEG")
    for number in TEST:
        save(number, folder / "val" / f"ILSVRC2012_val_{number:08}.JPEG")


def make_ffhq(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folders, "FFHQ_TRAIN", len(TRAIN))
    patch.setattr(folders, "FFHQ_TEST", len(TEST))
    for number in TRAIN + TEST:
        save(number, folder / f"{number // 5:02}000" / f"{number:05}.png")


def make_lsun(category: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def make(folder: Path, _patch: pytest.MonkeyPatch) -> None:
        lmdb = pytest.importorskip("lmdb")
        for part, numbers in (("train", TRAIN), ("val", TEST)):
            path = folder / f"{category}_{part}_lmdb"
            path.mkdir(parents=True)
            with lmdb.open(str(path), map_size=2**20) as database, database.begin(write=True) as t:
                for number in numbers:
                    t.put(hashlib.sha1(b"%d" % number).hexdigest().encode(), jpeg(number))

    return make


def make_folder(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    for number in TRAIN:
        save(number, folder / "train" / f"{number}.png")
    for number in TEST:
        save(number, folder / "test" / "deep" / f"{number}.jpg")


LAYOUTS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "mnist": make_mnist,
    "fashion-mnist": make_fashion_mnist,
    "fashion-mnist-sample": make_sample,
    "cifar10": make_cifar10,
    "celeba": make_celeba,
    "imagenet": make_imagenet,
    "ffhq": make_ffhq,
    "lsun-bedroom": make_lsun("bedroom"),
    "lsun-church": make_lsun("church_outdoor"),
    "folder": make_folder,
}


def files_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# ---------------------------------------------------------------------------------- the registry


@pytest.mark.parametrize("name", DATASETS)
def test_real_layout(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    LAYOUTS[name](tmp_path / "data" / name, monkeypatch)
    before = files_below(tmp_path)
    entry = DATASETS[name]
    for split, numbers in (("train", TRAIN), ("test", TEST)):
        image_set = open_dataset(name, None, split)  # type: ignore[arg-type]
        assert sorted(numbers_in(image_set)) == numbers
        assert (image_set.channels, image_set.image_size) == (entry.channels, entry.image_size)
        assert image_set[0].shape == (entry.channels, entry.image_size, entry.image_size)
        assert image_set[0].dtype == torch.uint8
    assert sorted(numbers_in(open_dataset(name, None, "all"))) == TRAIN + TEST
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("name", DATASETS)
def test_image_size(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LAYOUTS[name](tmp_path, monkeypatch)
    if DATASETS[name].resizable:
        image_set = open_dataset(name, str(tmp_path), "test", 16)
        assert (image_set.image_size, image_set[0].shape) == (16, (3, 16, 16))
        assert "--image_size 0 " in refusal(lambda: open_dataset(name, str(tmp_path), "test", 0))
    else:
        own = DATASETS[name].image_size
        folder = None if DATASETS[name].bundled else str(tmp_path)
        assert len(open_dataset(name, folder, "test", own)) == len(TEST)
        message = refusal(lambda: open_dataset(name, folder, "test", 64))
        assert f"--image_size 64 contradicts --dataset {name}" in message


def test_unknown_name() -> None:
    assert "did you mean fashion-mnist?" in refusal(
        lambda: open_dataset("fashion-mnits", None, "train")
    )


# --------------------------------------------------------------------------- idx files, the sample


@pytest.mark.parametrize(("name", "kind"), MNIST_LIKE.items())
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("raw", [False, True])
def test_idx_places(name: str, kind: str, packed: bool, raw: bool, tmp_path: Path) -> None:
    write_idx(tmp_path / kind / "raw" if raw else tmp_path, packed)
    assert numbers_in(open_dataset(name, str(tmp_path), "train")) == TRAIN
    assert numbers_in(open_dataset(name, str(tmp_path), "test")) == TEST


def test_fashion_mnist_of_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx, "DEBIAN", tmp_path / "debian")
    write_idx(tmp_path / "debian", packed=True)
    before = files_below(tmp_path)
    assert numbers_in(open_dataset("fashion-mnist", str(tmp_path / "none"), "train")) == TRAIN
    assert files_below(tmp_path) == before
    write_idx(tmp_path / "debian")  # the plain file of the data folder comes first
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train-images-idx3-ubyte").write_bytes(idx_bytes([7]))
    assert numbers_in(open_dataset("fashion-mnist", str(tmp_path / "own"), "train")) == [7]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (idx_bytes(TRAIN)[:-1], "is damaged"),
        (idx_bytes(TRAIN) + b"\0", "is damaged"),
        (b"\0\0", "is damaged"),
        (b"GIF8" + idx_bytes(TRAIN)[4:], "is not an idx file"),
        (idx_bytes(TRAIN, side=32), "32×32"),
    ],
)
def test_bad_idx(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    message = refusal(lambda: open_dataset("mnist", str(tmp_path), "train"))
    assert str(path) in message
    assert reason in message


@pytest.mark.parametrize("damage", [lambda packed: packed[:-20], lambda _: b"no gzip at all"])
def test_bad_gzip(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(gzip.compress(idx_bytes(TRAIN))))
    assert str(path) in refusal(lambda: open_dataset("mnist", str(tmp_path), "train"))


def test_sample() -> None:
    train = open_dataset("fashion-mnist-sample", None, "train")
    test = open_dataset("fashion-mnist-sample", None, "test")
    assert isinstance(train, TensorImages)
    assert isinstance(test, TensorImages)
    assert train.images.shape == (6000, 1, 28, 28)
    assert test.images.shape == (1000, 1, 28, 28)
    assert pixel_variance(train) == pytest.approx(0.125, abs=0.002)
    assert sum(path.stat().st_size for path in idx.SAMPLE.iterdir() if path.is_file()) < 4e6
    for split, name in idx.FILES.items():
        digest = hashlib.sha256((idx.SAMPLE / f"{name}.gz").read_bytes()).hexdigest()
        assert digest == idx.SAMPLE_SHA256[split]
        assert digest in (idx.SAMPLE / "README.md").read_text()


def test_damaged_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sample(tmp_path, monkeypatch)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(TEST)))
    message = refusal(lambda: open_dataset("fashion-mnist-sample", None, "train"))
    assert str(path) in message
    assert "sha256" in message
    path.unlink()
    assert str(path) in refusal(lambda: open_dataset("fashion-mnist-sample", None, "train"))


LABELS = "train-labels-idx1-ubyte.gz"
TRAIN_CLASSES = [602, 591, 605, 585, 606, 597, 606, 608, 616, 584]


def label_bytes(numbers: list[int]) -> bytes:
    return struct.pack(">2I", 0x801, len(numbers)) + bytes(numbers)


def test_labels_of_the_sample() -> None:
    assert numbers_of("train").bincount().tolist() == TRAIN_CLASSES
    assert len(numbers_of("test")) == 1000
    names = open_dataset("fashion-mnist-sample", None, "test").labels().names
    assert names[:2] == ("T-shirt/top", "Trouser")
    train, validation = split_validation(open_dataset("fashion-mnist-sample", None, "train"))
    assert isinstance(train, TensorImages)
    every = torch.cat([train.labels().numbers, validation.labels().numbers])
    assert every.bincount().tolist() == TRAIN_CLASSES


def numbers_of(split: Split) -> Tensor:
    return open_dataset("fashion-mnist-sample", None, split).labels().numbers


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (label_bytes([1, 2, 10]), "label 10, there are 10 classes"),
        (label_bytes([1, 2])[:-1], "damaged: 9 bytes instead of 10"),
        (struct.pack(">4I", 0x803, 1, 28, 28), "not an idx file of labels"),
        (b"", "is damaged"),
        (label_bytes([1, 2]), "has 2 labels, train-images-idx3-ubyte 3 images"),
    ],
)
def test_damaged_labels(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / LABELS.removesuffix(".gz")
    path.write_bytes(content)
    images = tmp_path / idx.FILES["train"]
    assert words in refusal(lambda: idx.read_labels(images, "FashionMNIST", 3))
    assert str(path) in refusal(lambda: idx.read_labels(images, "FashionMNIST", 3))


def test_folders_are_classes(tmp_path: Path) -> None:
    names = ["cats/b.png", "cats/a.png", "dogs/big/c.png"]
    images = FileImages(tmp_path, names, 8)
    assert images.labels().names == ("cats", "dogs")
    assert images.labels().numbers.tolist() == [0, 0, 1]
    assert ChosenImages(images, torch.tensor([2])).labels().numbers.tolist() == [1]
    refused = refusal(lambda: FileImages(tmp_path, [*names, "d.png"], 8).labels())
    assert "have no classes" in refused


def remake_sample(full: Path, output: Path) -> subprocess.CompletedProcess[str]:
    script = idx.SAMPLE / "make_sample.py"
    output.mkdir(exist_ok=True)
    command = [sys.executable, str(script), str(full), "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_make_sample(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    numbers = [i % 25 for i in range(31)]
    for name in idx.FILES.values():
        (full / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(numbers)))
        labels = name.replace("images-idx3", "labels-idx1")
        (full / f"{labels}.gz").write_bytes(gzip.compress(label_bytes(numbers)))
    for output in ("once", "again"):
        assert remake_sample(full, tmp_path / output).returncode == 0
    assert gzip.decompress((tmp_path / "once" / LABELS).read_bytes()) == label_bytes([0, 10, 20, 5])
    for name in idx.FILES.values():
        content = (tmp_path / "once" / f"{name}.gz").read_bytes()
        assert content == (tmp_path / "again" / f"{name}.gz").read_bytes()
        assert gzip.decompress(content) == idx_bytes([0, 10, 20, 5])
    missing = remake_sample(tmp_path / "none", tmp_path)
    assert missing.returncode == 2
    assert "Traceback" not in missing.stderr


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="needs dataset-fashion-mnist"
)
def test_sample_is_every_tenth_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx, "DEBIAN", Path("/usr/share/datasets/fashion-mnist"))
    full = open_dataset("fashion-mnist", "/nonexistent", "test")
    sample = open_dataset("fashion-mnist-sample", None, "test")
    assert isinstance(full, TensorImages)
    assert isinstance(sample, TensorImages)
    assert torch.equal(full.images[::10], sample.images)


# ------------------------------------------------------------------------------------- downloads


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "celeba"])
def test_failed_download(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "kept"
    kept.write_text("")
    for folder in (tmp_path / "new" / "folder", tmp_path):
        message = refusal(partial(open_dataset, name, str(folder), "train"))
        assert message.startswith(f"--dataset {name}: ")
        assert str(folder) in message
        assert "no network here" in message
        assert files_below(tmp_path) == {kept}
    assert capfd.readouterr() == ("", "")


def test_interrupted_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def half(_url: str, download_root: str, filename: str, **_kwargs: Any) -> None:
        (Path(download_root) / filename).write_bytes(b"half")
        print("50 %")  # noqa: T201
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", half)
    message = refusal(lambda: open_dataset("mnist", str(tmp_path / "mnist"), "train"))
    assert "corrupted" in message
    assert not files_below(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def arrive(_url: str, download_root: str, filename: str, **_kwargs: Any) -> None:
        numbers = TRAIN if filename.startswith("train") else TEST
        if "images" in filename:
            content = idx_bytes(numbers)
        else:
            content = np.array([0x801, len(numbers)], dtype=">u4").tobytes() + bytes(len(numbers))
        (Path(download_root) / filename.removesuffix(".gz")).write_bytes(content)

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", arrive)
    raw = tmp_path / "set" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "notes.txt").write_text("mine")
    assert numbers_in(open_dataset("fashion-mnist", str(tmp_path / "set"), "train")) == TRAIN
    assert (raw / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"set"}
    monkeypatch.undo()
    assert numbers_in(open_dataset("fashion-mnist", str(tmp_path / "set"), "test")) == TEST


def test_cifar10_from_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    make_cifar10(tmp_path / "made", monkeypatch)
    folder = tmp_path / "set"
    folder.mkdir()
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert numbers_in(open_dataset("cifar10", str(folder), "train")) == TRAIN
    assert archive.is_file()
    (folder / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"not what was published")
    archive.unlink()
    message = refusal(lambda: open_dataset("cifar10", str(folder), "train"))
    assert f"{folder / 'cifar-10-batches-py'} is missing or incomplete" in message


def test_celeba_from_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_celeba(tmp_path, monkeypatch)
    base = tmp_path / "celeba"
    archive = base / "img_align_celeba.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted((base / "img_align_celeba").iterdir()):
            packed.write(path, f"img_align_celeba/{path.name}")
            path.unlink()
    (base / "img_align_celeba").rmdir()
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-50])
    assert "img_align_celeba is missing" in refusal(
        lambda: open_dataset("celeba", str(tmp_path), "test")
    )
    assert not (base / "img_align_celeba").exists()
    archive.write_bytes(whole)
    assert numbers_in(open_dataset("celeba", str(tmp_path), "test")) == TEST
    assert numbers_in(open_dataset("celeba", str(base), "test")) == TEST


def test_bad_celeba_partition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_celeba(tmp_path, monkeypatch)
    path = tmp_path / "celeba" / "list_eval_partition.txt"
    path.write_text("000000.jpg 0\n000001.jpg\n")
    assert f"{path} line 2 " in refusal(lambda: open_dataset("celeba", str(tmp_path), "train"))
    path.write_text("000000.jpg 0\n")
    assert "no test images" in refusal(lambda: open_dataset("celeba", str(tmp_path), "test"))


def test_celeba_as_kaggle_hands_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_celeba(tmp_path, monkeypatch)
    base = tmp_path / "celeba"
    (base / "img_align_celeba").rename(base / "inner")
    (base / "img_align_celeba").mkdir()
    (base / "inner").rename(base / "img_align_celeba" / "img_align_celeba")
    path = base / "list_eval_partition.txt"
    rows = path.read_text().replace(" ", ",")
    path.write_text(path.read_text(), "utf-8-sig")
    assert numbers_in(open_dataset("celeba", str(tmp_path), "train")) == TRAIN
    path.unlink()
    (base / "list_eval_partition.csv").write_text(f"image_id,partition\n{rows}", "utf-8-sig")
    assert numbers_in(open_dataset("celeba", str(base), "train")) == TRAIN
    for number in (0, 3):
        (base / "img_align_celeba" / "img_align_celeba" / f"{number:06}.jpg").unlink()
    message = refusal(lambda: open_dataset("celeba", str(base), "train"))
    assert "lacks 2 images of" in message
    assert message.endswith("list_eval_partition.csv, such as 000000.jpg")


def tar_of(files: dict[str, bytes], path: Path) -> bytes:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def imagenet_devkit() -> dict[str, bytes]:
    from scipy.io import savemat

    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children"]
    synsets = np.zeros(2, dtype=[(field, object) for field in fields])
    for i in range(2):
        synsets[i] = (i + 1, f"n0000000{i}", f"word {i}", "gloss", 0)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    root = "ILSVRC2012_devkit_t12/data"
    return {
        f"{root}/meta.mat": buffer.getvalue(),
        f"{root}/ILSVRC2012_validation_ground_truth.txt": b"1\n2\n1\n",
    }


def test_imagenet_from_its_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import imagenet

    folder = tmp_path / "imagenet"
    folder.mkdir()
    message = refusal(lambda: open_dataset("imagenet", str(folder), "train"))
    assert str(folder / "train") in message
    assert "ILSVRC2012_img_train.tar and ILSVRC2012_devkit_t12.tar.gz" in message

    inner = {}
    for i in range(2):
        files = {f"n0000000{i}_{number}.JPEG": jpeg(number) for number in TRAIN[i::2]}
        inner[f"n0000000{i}.tar"] = tar_of(files, tmp_path / "inner.tar")
    validation = {f"ILSVRC2012_val_{number:08}.JPEG": jpeg(number) for number in TEST}
    for which, files in (("train", inner), ("val", validation), ("devkit", imagenet_devkit())):
        name = imagenet.ARCHIVE_META[which][0]
        content = tar_of(files, folder / name)
        entry = (name, hashlib.md5(content).hexdigest())
        monkeypatch.setitem(imagenet.ARCHIVE_META, which, entry)
    assert sorted(numbers_in(open_dataset("imagenet", str(folder), "train", 16))) == TRAIN
    assert sorted(numbers_in(open_dataset("imagenet", str(folder), "test", 16))) == TEST
    assert (folder / "val" / "n00000001" / "ILSVRC2012_val_00000011.JPEG").is_file()
    assert not list(folder.glob(".looc*"))


# ------------------------------------------------------------------------------------------ LSUN


@pytest.mark.parametrize("name", ["lsun-bedroom", "lsun-church"])
def test_lsun_folder(name: str, tmp_path: Path) -> None:
    save(1, tmp_path / "train" / "a.jpg")
    save(2, tmp_path / "val" / "b.webp")
    assert numbers_in(open_dataset(name, str(tmp_path), "train", 16)) == [1]
    assert numbers_in(open_dataset(name, str(tmp_path), "test", 16)) == [2]


def test_a_wrong_folder_of_lsun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_lsun("bedroom")(tmp_path, monkeypatch)
    message = refusal(lambda: open_dataset("lsun-church", str(tmp_path), "train"))
    assert message == (
        f"--data_folder {tmp_path} has bedroom_train_lmdb, bedroom_val_lmdb, but no "
        "church_outdoor_train_lmdb or church_outdoor_val_lmdb"
    )
    database = tmp_path / "bedroom_train_lmdb"
    message = refusal(lambda: open_dataset("lsun-bedroom", str(database), "train"))
    assert message == f"--data_folder {database} is a database itself: give its folder, {tmp_path}"


def test_bad_lsun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_lsun("bedroom")(tmp_path, monkeypatch)
    database = tmp_path / "bedroom_train_lmdb"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lmdb", None)
        message = refusal(lambda: open_dataset("lsun-bedroom", str(tmp_path), "train"))
        assert "pip install lmdb" in message
    whole = (database / "data.mdb").read_bytes()
    for content in (whole[:-4096], b"junk" * 3000, b""):
        (database / "data.mdb").write_bytes(content)
        message = refusal(lambda: open_dataset("lsun-bedroom", str(tmp_path), "train"))
        assert str(database) in message
    (tmp_path / "bedroom_val_lmdb").rename(tmp_path / "elsewhere")
    assert "bedroom_val_lmdb" in refusal(
        lambda: open_dataset("lsun-bedroom", str(tmp_path), "test")
    )


def test_damaged_image_in_lmdb(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    path = tmp_path / "church_outdoor_val_lmdb"
    path.mkdir()
    with lmdb.open(str(path)) as database, database.begin(write=True) as transaction:
        transaction.put(b"key-of-it", jpeg(3)[:100])
    image_set = open_dataset("lsun-church", str(tmp_path), "test")
    message = refusal(lambda: image_set[0])
    assert "key-of-it" in message
    assert str(path) in message


# ---------------------------------------------------------------------------------------- folders


def test_folder_without_splits(tmp_path: Path) -> None:
    for number in range(24):
        save(number, tmp_path / f"{number % 3}" / f"{number}.png")
    train = numbers_in(open_dataset("folder", str(tmp_path), "train", 8))
    test = numbers_in(open_dataset("folder", str(tmp_path), "test", 8))
    assert 1 <= len(test) <= 6
    assert sorted(train + test) == list(range(24))
    assert test == numbers_in(open_dataset("folder", str(tmp_path), "test", 8))


def test_folder_of_one_image(tmp_path: Path) -> None:
    save(0, tmp_path / "only.png")
    message = refusal(lambda: open_dataset("folder", str(tmp_path), "train"))
    assert "holds 1 image: training, validation and testing need 3" in message


def test_listing(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "a/1.jpeg", "c.webp", ".hidden.png", ".cache/3.png"):
        save(0, tmp_path / "set" / name)
    (tmp_path / "set" / "notes.txt").write_text("")
    save(0, tmp_path / "elsewhere" / "4.png")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "a" / "circle").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "itself").symlink_to(tmp_path / "set" / "itself")
    names = folders.list_images(tmp_path / "set")
    assert names == ["a/1.jpeg", "b/2.PNG", "c.webp", "linked/4.png"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_read(suffix: str, tmp_path: Path) -> None:
    """Two fifths of .JPG .jfif .jpe .avif .jp2 .tga … were used, the others not mentioned."""
    flat(4).save(tmp_path / f"x{suffix.upper()}")
    assert numbers_in(open_dataset("folder", str(tmp_path), "all", 8)) == [4]


def test_what_is_left_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "b.heic", "c.HEIC", "d.txt", "noted", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    for _ in range(2):
        open_dataset("folder", str(tmp_path), "all", 8)
    left_out = "left out: 2 .heic, 1 .txt, 1 broken link, 1 without suffix"
    assert caplog.messages == [f"--data_folder {tmp_path}: 1 image; {left_out}"]
    (tmp_path / "a.png").unlink()
    message = refusal(lambda: open_dataset("folder", str(tmp_path), "all", 8))
    assert "holds no images (.jpg, " in message
    assert message.endswith(left_out)


def test_results_are_no_images_of_the_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An output folder in the data folder; the results themselves can be read."""
    results, samples = tmp_path / "output/results/e/best/x", tmp_path / "out/samples/e"
    for name in (
        *(tmp_path / "a.png", results / "rec/0.png", results / "original/0.png"),
        *(results / "usage.png", samples / "00000000.png", samples / "grid.png"),
    ):
        save(0, name)
    (results / "analysis.json").touch()
    (samples / "samples.json").touch()
    assert folders.list_images(tmp_path) == ["a.png"]
    assert caplog.messages == [f"--data_folder {tmp_path}: 1 image; left out: 2 results folders"]
    assert folders.list_images(results / "rec") == ["0.png"]
    (results / "analysis.json").unlink()
    assert len(folders.list_images(tmp_path)) == 4


def test_images_beside_the_splits_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, name in enumerate(("train/a.png", "train/b.png", "test/c.png", "valid/d.png")):
        save(number, tmp_path / name)
    assert numbers_in(open_dataset("folder", str(tmp_path), "train", 8)) == [0, 1]
    assert caplog.messages == [f"{tmp_path}: 1 images beside train/, test/ are left out"]


def test_bad_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.write_text("")
    for name in ("folder", "ffhq", "lsun-bedroom"):
        for path, reason in (
            (tmp_path / "none", "does not exist"),
            (empty, "holds no images"),
            (file, "is not a folder"),
        ):
            message = refusal(partial(open_dataset, name, str(path), "train"))
            assert message.startswith(f"--data_folder {path} {reason}")
    assert "--data_folder is empty" in refusal(lambda: open_dataset("folder", "", "train"))

    def forbidden(place: str) -> None:
        raise PermissionError(13, "Permission denied", place)

    monkeypatch.setattr(os, "scandir", forbidden)
    message = refusal(lambda: open_dataset("folder", str(empty), "train"))
    assert message == f"--data_folder {empty} cannot be read: Permission denied"


def test_incomplete_ffhq(tmp_path: Path) -> None:
    save(0, tmp_path / "00000.png")
    message = refusal(lambda: open_dataset("ffhq", str(tmp_path), "train"))
    assert "holds 1 images" in message
    assert "70,000" in message


# --------------------------------------------------------------------------------------- decoding


def decoded(image: Image.Image, path: Path, size: int = 8, **options: Any) -> Tensor:
    image.save(path, **options)
    return FileImages(path.parent, [path.name], size)[0]


def test_image_modes(tmp_path: Path) -> None:
    grey = decoded(Image.new("L", (8, 8), 100), tmp_path / "grey.png")
    assert grey.unique().tolist() == [100]
    bits = decoded(Image.new("1", (8, 8), 1), tmp_path / "bits.png")
    assert bits.unique().tolist() == [255]
    palette = decoded(Image.new("RGB", (8, 8), (10, 20, 30)).quantize(4), tmp_path / "palette.png")
    assert palette[:, 0, 0].tolist() == [10, 20, 30]
    alpha = decoded(Image.new("RGBA", (8, 8), (10, 20, 30, 0)), tmp_path / "alpha.png")
    assert alpha[:, 0, 0].tolist() == [255, 255, 255]
    deep = Image.fromarray(np.full((8, 8), 200 * 256 + 7, dtype=np.uint16))
    assert decoded(deep, tmp_path / "deep.png").unique().tolist() == [200]
    for image in (grey, bits, palette, alpha):
        assert (image.shape, image.dtype) == ((3, 8, 8), torch.uint8)


@pytest.mark.parametrize("bits", [12, 14, 16])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_empty_upper_bits_are_told(
    bits: int, suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """12-bit data became nearly black without a word."""
    save(20, tmp_path / "plain.png")
    for number in range(3):
        levels = np.linspace(0, 2**bits - 1, 64 + number).astype(np.uint16)[None].repeat(8, 0)
        Image.fromarray(levels).save(tmp_path / f"{number}.{suffix}")
    for _ in range(2):
        open_dataset("folder", str(tmp_path), "all", 8)
    dark = (
        f"{tmp_path}: all images of 16 bits that were looked at (3) use only their lower {bits} "
        f"bits and would become dark; give --bits {bits} if they are grey, or scale them to the "
        "full range first"
    )
    assert caplog.messages == [dark] * (bits < 16)


@pytest.mark.parametrize(("even", "odd", "dark"), [(8, 12, True), (12, 16, False)])
def test_every_kind_of_image_is_looked_at(
    even: int, odd: int, dark: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every second image was looked at, so that the others were unknown."""
    for number in range(70):
        bits = odd if number % 2 else even
        levels = np.full((8, 8), 2**bits - 1, np.uint8 if bits == 8 else np.uint16)
        Image.fromarray(levels).save(tmp_path / f"{number:02d}.png")
    open_dataset("folder", str(tmp_path), "all", 8)
    found = ["(32) use only their lower 12 bits" in line for line in caplog.messages]
    assert found == [True] * dark


def test_transparent_palette_gives_no_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8) % 4 * 60
    image = Image.fromarray(levels).convert("RGB").quantize(4)
    decoded(image, tmp_path / "palette.png", transparency=b"\0\x80\xff\x10")
    assert not recwarn.list


def test_exif_orientation(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:, :4, 0] = 255  # the left half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers turn it clockwise
    image = decoded(Image.fromarray(pixels), tmp_path / "turned.png", exif=exif)
    assert (image[0, :4] == 255).all()
    assert (image[0, 4:] == 0).all()


@pytest.mark.parametrize("transpose", [False, True])
def test_centre_crop(transpose: bool, tmp_path: Path) -> None:
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 200
    pixels = pixels.swapaxes(0, 1) if transpose else pixels
    image = decoded(Image.fromarray(np.ascontiguousarray(pixels)), tmp_path / "wide.png", 4)
    assert image.unique().tolist() == [200]


@pytest.mark.parametrize("transpose", [False, True])
def test_crops_cover_the_longer_side(transpose: bool, tmp_path: Path) -> None:
    """Column i of the image has the level i: a crop's first level is its offset."""
    levels = np.arange(11, dtype=np.uint8)[None, :, None]
    pixels = np.ascontiguousarray(np.broadcast_to(levels, (8, 11, 3)))
    Image.fromarray(pixels.swapaxes(0, 1) if transpose else pixels).save(tmp_path / "wide.png")
    image_set = FileImages(tmp_path, ["wide.png"], 8)
    places = [i / 40 for i in range(40)] + [1 - 2**-24]
    offsets = [int(image_set.cropped(0, (place, place))[0, 0, 0]) for place in places]
    assert offsets == sorted(offsets)
    assert [offsets.count(offset) for offset in range(4)] == [10, 10, 10, 11]
    assert int(image_set[0][0, 0, 0]) == 1  # (11 - 8) // 2


@pytest.mark.parametrize("place", [0.0, 0.3, 0.77, 0.999])
def test_a_crop_is_what_resizing_first_would_give(place: float, tmp_path: Path) -> None:
    """They agree except at the edge, where a filter over the whole image reaches farther."""
    whole = Image.fromarray(smooth_noise(120, 360)).resize((360, 120))
    whole.save(tmp_path / "long.png")
    offset = int(place * 241) // 3 * 3  # to whole pixels of the small image
    ours = FileImages(tmp_path, ["long.png"], 40).cropped(0, ((offset + 0.5) / 241, 0.0))
    small = np.asarray(whole.resize((120, 40), Image.Resampling.BICUBIC))
    theirs = torch.from_numpy(small[:, offset // 3 : offset // 3 + 40].transpose(2, 0, 1).copy())
    difference = (ours.int() - theirs.int()).abs()
    assert difference[..., 2:-2].max() <= 1
    assert difference.max() < 40


def smooth_noise(height: int, width: int) -> np.ndarray:
    """Return a picture (height, width, 3), uint8."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def test_crops_of_lmdb_and_of_a_part(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    halves = np.zeros((8, 16, 3), dtype=np.uint8)
    halves[:, 8:] = 200
    Image.fromarray(halves).save(tmp_path / "x.png")
    path = tmp_path / "church_outdoor_train_lmdb"
    path.mkdir()
    with lmdb.open(str(path)) as database, database.begin(write=True) as transaction:
        for key in (b"a", b"b"):
            transaction.put(key, (tmp_path / "x.png").read_bytes())
    whole = open_dataset("lsun-church", str(tmp_path), "train", 8)
    for image_set in (whole, *split_validation(whole)):
        assert image_set.cropped(0, (0.0, 0.0)).unique().tolist() == [0]
        assert image_set.cropped(0, (0.99, 0.99)).unique().tolist() == [200]
        assert image_set[0].unique().tolist() == [0, 200]


def test_shrinking_antialiases(tmp_path: Path) -> None:
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    image = decoded(Image.fromarray(checks), tmp_path / "checks.png", 8)
    assert image.float().sub(127.5).abs().max() < 3


def test_image_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(0, tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    image_set = FileImages(tmp_path, ["bomb.png"], 8)
    assert str(tmp_path / "bomb.png") in refusal(lambda: image_set[0])


# ------------------------------------------------------------------------ validation and variance


@pytest.fixture
def file_images(tmp_path: Path) -> FileImages:
    for number in range(23):
        save(number, tmp_path / f"{number:02}.png")
    return FileImages(tmp_path, folders.list_images(tmp_path), 8)


@pytest.fixture
def tensor_images() -> TensorImages:
    levels = torch.arange(23, dtype=torch.uint8) * 10 + 5
    return TensorImages(levels.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous())


@pytest.mark.parametrize(("most", "expected"), [(1, [0]), (3, [0, 3, 6]), (10, None), (99, None)])
def test_a_few_images_are_evenly_spread(most: int, expected: list[int] | None) -> None:
    images = torch.arange(10, dtype=torch.uint8).expand(1, 4, 4, 10).permute(3, 0, 1, 2)
    few = evenly_spread(TensorImages(images), most)
    assert [int(few[i][0, 0, 0]) for i in range(len(few))] == (expected or list(range(10)))


@pytest.mark.parametrize("kind", ["file_images", "tensor_images"])
def test_split_validation(kind: str, request: pytest.FixtureRequest) -> None:
    image_set = request.getfixturevalue(kind)
    train, validation = split_validation(image_set)
    assert 1 <= len(validation) <= 6
    assert sorted(numbers_in(train) + numbers_in(validation)) == list(range(23))
    torch.manual_seed(5)
    assert numbers_in(split_validation(image_set)[1]) == numbers_in(validation)
    if isinstance(image_set, TensorImages):
        assert isinstance(train, TensorImages)
        assert isinstance(validation, TensorImages)


@pytest.mark.parametrize(
    "names", [("Train", "Test"), ("train", "validation"), ("test", "Val"), ("cats", "dogs")]
)
def test_folders_that_are_no_splits_are_told(
    names: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "a.png")
    assert len(open_folder(tmp_path, "test", 8)) == 1
    lacking = "neither test/ nor val/" if "train" in names else "no train/"
    folders = ", ".join(f"{name}/" for name in sorted(names))
    told = f"{tmp_path} has {folders} but {lacking}: all 2 images are split, about a tenth"
    assert (told in caplog.text) == ("cats" not in names)


@pytest.mark.parametrize(("n", "held_out"), [(2, 1), (14, 1), (15, 2), (6000, 600)])
def test_a_tenth_is_held_out(n: int, held_out: int) -> None:
    train, validation = split_validation(TensorImages(torch.zeros(n, 1, 4, 4, dtype=torch.uint8)))
    assert (len(train), len(validation)) == (n - held_out, held_out)


def test_split_of_one_image(tensor_images: TensorImages) -> None:
    assert "gives 1 training image" in refusal(
        lambda: split_validation(TensorImages(tensor_images.images[:1]))
    )


def test_pixel_variance_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variance, "CHUNK", 1000)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(3, 200, (50, 3, 12, 12), generator=generator).to(torch.uint8)
    expected = np.var(pixels.numpy().astype(np.float64) / 255)
    assert pixel_variance(TensorImages(pixels)) == pytest.approx(expected, rel=1e-12)


def test_pixel_variance_on_disk(file_images: FileImages, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = np.var((np.arange(23) * 10 + 5) / 255)
    assert pixel_variance(file_images) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(variance, "SAMPLE", 4)
    assert pixel_variance(file_images) == pixel_variance(file_images) != expected


# ---------------------------------------------------------------------------------------- batches


@pytest.fixture(params=["memory", 0, 2], ids=["memory", "workers0", "workers2"])
def loader(
    request: pytest.FixtureRequest, file_images: FileImages, tensor_images: TensorImages
) -> Iterator[BatchLoader]:
    """23 images in shuffled batches of 4, loaded in each of the three ways."""
    if request.param == "memory":
        yield BatchLoader(tensor_images, 4, device=CPU, shuffle=True, seed=3)
    else:
        yield BatchLoader(
            file_images, 4, device=CPU, shuffle=True, seed=3, num_workers=request.param
        )


def epoch_numbers(loader: BatchLoader, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [[number_of(image) for image in batch] for batch in loader.epoch(epoch, start)]


def test_epochs(loader: BatchLoader, tensor_images: TensorImages) -> None:
    first = list(loader.epoch(0))
    assert [len(batch) for batch in first] == [4, 4, 4, 4, 4, 3]
    assert len(loader) == 6
    assert all(batch.dtype == torch.uint8 and batch.shape[1:] == (3, 8, 8) for batch in first)
    numbers = epoch_numbers(loader, 0)
    assert sorted(chain(*numbers)) == list(range(23))
    assert epoch_numbers(loader, 1) != numbers
    assert epoch_numbers(loader, 0) == numbers
    in_memory = BatchLoader(tensor_images, 4, device=CPU, shuffle=True, seed=3)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, in_memory.epoch(0)))


def test_start_skips(loader: BatchLoader) -> None:
    assert epoch_numbers(loader, 1, start=4) == epoch_numbers(loader, 1)[4:]
    assert epoch_numbers(loader, 1, start=6) == []


def test_leaving_an_epoch_early(loader: BatchLoader) -> None:
    numbers = epoch_numbers(loader, 2)
    for _ in range(2):
        next(loader.epoch(1))
    assert epoch_numbers(loader, 2) == numbers


def test_global_randomness_untouched(loader: BatchLoader) -> None:
    def state() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002

    before = state()
    for epoch in range(2):
        list(loader.epoch(epoch))
    assert state() == before


def test_order_depends_on_seed_and_epoch_alone(tensor_images: TensorImages) -> None:
    def order(seed: int, epoch: int, shuffle: bool = True) -> list[int]:
        loader = BatchLoader(tensor_images, 5, device=CPU, shuffle=shuffle, seed=seed)
        return list(chain(*epoch_numbers(loader, epoch)))

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(numbers) for numbers in orders}) == 9
    torch.manual_seed(99)
    assert order(1, 2) == orders[5]
    assert order(1, 2, shuffle=False) == list(range(23))


# -------------------------------------------------------------------------- mirrored and cropped


@pytest.fixture
def wide_images(tmp_path: Path) -> FileImages:
    """23 images, 9 times as wide as high, that become lighter to the right."""
    row = np.arange(72, dtype=np.uint8) * 3
    for number in range(23):
        pixels = np.ascontiguousarray(np.broadcast_to(row[None, :, None], (8, 72, 3)))
        pixels[..., 2] = number
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.png")
    return FileImages(tmp_path, folders.list_images(tmp_path), 8)


def augmented(
    image_set: ImageSet, epoch: int = 0, start: int = 0, ranks: int = 1, **options: Any
) -> dict[int, Tensor]:
    """Return an epoch's images of all ranks by position."""
    options = {"batch_size": 4, "seed": 3, "flip": True, "crop": "random", **options}
    return {
        position: image
        for rank in range(ranks)
        for positions, batch in BatchLoader(
            image_set, device=CPU, shuffle=True, rank=rank, num_ranks=ranks, **options
        ).numbered(epoch, start)
        for position, image in zip(positions.tolist(), batch)
    }


def same(ours: dict[int, Tensor], theirs: dict[int, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[i], theirs[i]) for i in ours)


def test_flips_and_crops_depend_on_seed_epoch_and_position_alone(wide_images: FileImages) -> None:
    expected = augmented(wide_images)
    assert sorted(expected) == list(range(23))
    torch.manual_seed(99)
    for options in ({}, {"ranks": 3}, {"num_workers": 2}, {"batch_size": 7}):
        assert same(augmented(wide_images, **options), expected)
    resumed = augmented(wide_images, start=3)
    assert len(resumed) == 11
    assert same(resumed, {i: expected[i] for i in resumed})
    for options in ({"epoch": 1}, {"seed": 4}):
        assert not same(augmented(wide_images, **options), expected)


def test_half_is_mirrored_and_nothing_else_changes(wide_images: FileImages) -> None:
    plain = augmented(wide_images, flip=False, crop="centre")
    assert all(torch.equal(plain[i], wide_images[i]) for i in plain)
    flipped = augmented(wide_images, crop="centre")
    mirrored = {i for i in plain if torch.equal(flipped[i], plain[i].flip(-1))}
    assert 5 < len(mirrored) < 18
    assert all(torch.equal(flipped[i], plain[i]) for i in plain.keys() - mirrored)
    both = augmented(wide_images)
    crops = augmented(wide_images, flip=False)
    for i in plain:  # the crop does not depend on the flip
        assert torch.equal(both[i], crops[i].flip(-1) if i in mirrored else crops[i])


def test_images_in_memory_are_mirrored_alike(wide_images: FileImages) -> None:
    in_memory = TensorImages(torch.stack([wide_images[i] for i in range(23)]))
    assert same(augmented(in_memory, crop="centre"), augmented(wide_images, crop="centre"))


def test_every_place_is_drawn(wide_images: FileImages) -> None:
    firsts = [
        int(image[0].min())
        for epoch in range(20)
        for image in augmented(wide_images, epoch=epoch).values()
    ]
    assert min(firsts) == 0
    assert max(firsts) == 3 * (72 - 8)
    assert len(set(firsts)) > 60  # of 65


def test_bad_images_leave_the_others_as_they_are(wide_images: FileImages) -> None:
    expected = augmented(wide_images)
    (wide_images.folder / "09.png").write_bytes(b"junk")
    found = augmented(wide_images, skip_bad=True)
    assert same(found, {i: expected[i] for i in range(23) if i != 9})


@pytest.mark.parametrize("options", [{"flip": True}, {"crop": "random"}])
def test_only_training_images_are_changed(
    options: dict[str, Any], tensor_images: TensorImages
) -> None:
    with pytest.raises(ValueError, match="shuffle"):
        BatchLoader(tensor_images, 4, device=CPU, **options)


@pytest.mark.parametrize("name", FIXED_SIZE)
def test_images_in_memory_are_not_cropped(name: str) -> None:
    message = refusal(lambda: build(DataConfig, {"dataset": name, "crop": "random"}))
    assert message.startswith(f"--crop random contradicts --dataset {name}")
    assert build(DataConfig, {"dataset": name, "flip": True}).flip


def test_a_run_goes_on_with_the_same_flips_and_crops() -> None:
    before, now = DataConfig(dataset="folder"), DataConfig(dataset="folder", flip=True)
    assert differing_flags(before, now) == ["--flip True (it has False)"]
    now = DataConfig(dataset="folder", crop="random")
    assert differing_flags(before, now) == ["--crop random (it has centre)"]


def test_skipped_images_are_not_decoded(file_images: FileImages) -> None:
    (file_images.folder / "00.png").unlink()
    loader = BatchLoader(file_images, 4, device=CPU)
    assert list(chain(*epoch_numbers(loader, start=1))) == list(range(4, 23))


def test_there_are_no_more_workers_than_batches(file_images: FileImages) -> None:
    loader = BatchLoader(file_images, len(file_images), device=CPU, num_workers=1000)
    assert isinstance(loader.source, DecodedBatches)
    assert loader.source.num_workers == 1


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", [lambda content: content[:60], lambda _: b"junk", None])
def test_damaged_image(
    num_workers: int, damage: Callable[[bytes], bytes] | None, file_images: FileImages
) -> None:
    path = file_images.folder / "09.png"
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(content))
    loader = BatchLoader(file_images, 4, device=CPU, num_workers=num_workers)
    message = refusal(lambda: list(loader.epoch()))
    fault = "decoded: " if damage else "read: No such file or directory"
    assert message.startswith(f"image {path} cannot be {fault}")
    assert str(path) in refusal(lambda: pixel_variance(file_images))
    path.write_bytes(content)
    assert len(list(loader.epoch())) == 6


def test_killed_worker_is_one_line() -> None:
    loader = BatchLoader(Deadly(), 1, device=CPU, num_workers=1)
    assert refusal(lambda: list(loader.epoch())).startswith("--num_workers 1: ")


class Deadly(ImageSet):
    """A set that kills the process that reads it."""

    channels, image_size = 1, 4

    def __len__(self) -> int:
        return 1

    def cropped(self, _index: int, _place: Place | None = None) -> Tensor:
        os._exit(1)


def test_lmdb_in_threads_and_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_lsun("bedroom")(tmp_path, monkeypatch)
    image_set = open_dataset("lsun-bedroom", str(tmp_path), "train", 8)
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(image_set.__getitem__, TRAIN * 50))) == 500
    loader = BatchLoader(image_set, 3, device=CPU, num_workers=2)
    assert sorted(chain(*epoch_numbers(loader))) == TRAIN


def test_workers_end_with_the_process(tmp_path: Path) -> None:
    """Even while something holds the loader, and although workers ignore SIGTERM."""
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from datasets import BatchLoader\n"
        "from datasets.image_sets import FileImages\n"
        "images = FileImages(Path('.'), ['a.png', 'b.png', 'c.png'], 8)\n"
        "sys.kept = BatchLoader(images, 1, device=torch.device('cpu'), num_workers=2)\n"
        "sys.epoch = sys.kept.epoch()\n"
        "print(next(sys.epoch).shape)\n"
    )
    outcome = run_process(["-c", program], tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    assert "[1, 3, 8, 8]" in outcome.out


def test_12_bits_of_16(tmp_path: Path, script: Callable[..., Outcome]) -> None:
    """Grey levels of 12 bits become as bright as those of 8 bits."""
    random = np.random.default_rng(0)
    for number in range(12):
        levels = random.integers(0, 256, (20, 20)).astype(np.uint16)
        Image.fromarray(levels << 4).save(tmp_path / f"{number}.png")
        (tmp_path / "eight").mkdir(exist_ok=True)
        Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "eight" / f"{number}.png")
    folders = (tmp_path, tmp_path / "eight")
    deep, plain = (FileImages(folder, ["0.png"], 20) for folder in folders)
    assert int(deep[0].max()) == 15
    before = list(deep.identity())
    deep.bits = 12
    assert torch.equal(deep[0], plain[0])
    assert list(deep.identity()) != before
    (tmp_path / "eight").rename(tmp_path.parent / "eight")
    flags = ("--image_size", "20", "--num_workers", "0", "--batch_size", "4", "--max_steps", "1")
    small = ("--hidden_size", "8", "--num_residual_hidden", "4", "--device", "cpu")
    words = ("--data_folder", str(tmp_path), "--bits", "12", "--exp_name", "e", *flags, *small)
    trained = script("main.py", *words, "--output_folder", str(tmp_path.parent / "output"))
    assert trained.code == 0, trained.err
    assert "16 bits" not in trained.err
    test = ("test.py", "--model_name", "e/best.pt", "--device", "cpu")
    where = ("--output_folder", str(tmp_path.parent / "output"))
    for given in ((), ("--images", str(tmp_path / "0.png"))):
        assert script(*test, *where, *given).code == 0
    [whole] = (tmp_path.parent / "output").rglob("original/0.png")
    assert np.array(Image.open(whole)).max() > 200
    refused = script("main.py", "--bits", "12", "--device", "cpu", "--max_steps", "1")
    assert refused.code == 2
    assert "--bits 12 has no effect with --dataset fashion-mnist-sample" in refused.err
