"""The cache of decoded images: nothing decoded twice, nothing wrong, every error in one line."""

from __future__ import annotations

import errno
import multiprocessing
import os
import runpy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datasets import BatchLoader, FileImages, ImageSet, image_sets, open_dataset, split_validation
from datasets.cache import CachedImages, keep_decoded
from datasets.config import DataConfig
from datasets.image_sets import Place
from datasets.splits import open_training
from modules import VQVAE, ModelConfig
from tests.conftest import HANGS, ROOT, Outcome, refusal
from utils.checkpoints.checkpoint import Checkpoint
from utils.errors import UserError
from utils.flags.arguments import build
from utils.training.config import FREE_TO_CHANGE, TrainConfig
from utils.training.losses import MeanSquaredError, QuantizerLoss
from utils.training.reconstruction import Reconstruction

CPU = torch.device("cpu")
COUNT, SIZE = 12, 8


@pytest.fixture
def files(tmp_path: Path) -> FileImages:
    """Noise images of 24×16 pixels."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = random.integers(0, 256, (16, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return FileImages(folder, [path.name for path in folder.iterdir()], SIZE)


@pytest.fixture
def cached(files: FileImages, tmp_path: Path) -> CachedImages:
    return keep_decoded(files, tmp_path / "cache", "set")


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that this process has decoded."""
    names: list[str] = []
    decode = image_sets.decode

    def counted(
        source: Any, size: int, name: str, place: Place | None = None, bits: int = 16
    ) -> Tensor:
        names.append(Path(name).name)
        return decode(source, size, name, place, bits)

    monkeypatch.setattr(image_sets, "decode", counted)
    return names


def everything(source: ImageSet, num_workers: int = 0) -> Tensor:
    return torch.cat(list(BatchLoader(source, 5, device=CPU, num_workers=num_workers).epoch()))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_is_decoded_twice(
    num_workers: int,
    files: FileImages,
    cached: CachedImages,
    decodes: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = torch.stack([files[i] for i in range(COUNT)])
    decodes.clear()
    assert torch.equal(everything(cached, num_workers), expected)
    assert num_workers or sorted(decodes) == files.names

    def forbidden(*_arguments: Any) -> Tensor:
        raise UserError("decoded twice")

    monkeypatch.setattr(image_sets, "decode", forbidden)  # in workers as well
    again = keep_decoded(files, cached.path.parent, "set")
    assert again.path == cached.path
    assert torch.equal(everything(again, num_workers), expected)
    assert torch.equal(everything(again), expected)  # stored by workers


def test_parts_of_a_set_share_its_cache(tmp_path: Path, decodes: list[str]) -> None:
    for number in range(20):
        Image.new("RGB", (16, 16), (number,) * 3).save(tmp_path / f"{number:02}.png")

    def opened() -> int:
        folder, cache = str(tmp_path), str(tmp_path / "cache")
        parts = split_validation(open_dataset("folder", folder, "train", 8, cache))
        return sum(len(everything(part)) for part in parts)

    assert opened() == opened() == len(decodes)
    (path,) = (tmp_path / "cache").iterdir()
    assert path.name.startswith("folder-train-8-")


def test_validation_and_training_take_the_same_images(
    cached: CachedImages, files: FileImages
) -> None:
    for ours, theirs in zip(split_validation(cached), split_validation(files)):
        assert [ours.name(i) for i in range(len(ours))] == [
            theirs.name(i) for i in range(len(theirs))
        ]


def test_a_changed_image_is_decoded_anew(
    files: FileImages, cached: CachedImages, decodes: list[str]
) -> None:
    everything(cached)
    decodes.clear()
    Image.new("RGB", (24, 16), "red").save(files.folder / "03.png")
    again = keep_decoded(files, cached.path.parent, "set")
    assert again.path != cached.path
    assert again[3][:, 0, 0].tolist() == [255, 0, 0]
    assert decodes == ["03.png"]
    os.utime(files.folder / "04.png", ns=(1, 1))
    assert keep_decoded(files, cached.path.parent, "set").path not in (cached.path, again.path)


@pytest.mark.parametrize("attribute", ["image_size", "names"])
def test_another_size_or_set_is_another_cache(
    attribute: str, files: FileImages, cached: CachedImages
) -> None:
    setattr(files, attribute, {"image_size": 4, "names": files.names[:-1]}[attribute])
    assert keep_decoded(files, cached.path.parent, "set").path != cached.path


def test_another_pillow_is_another_cache(
    files: FileImages, cached: CachedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.__version__", "1.1.7")
    assert keep_decoded(files, cached.path.parent, "set").path != cached.path


def test_lmdb(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    for name, colour in (("a", "red"), ("b", "blue")):
        path = tmp_path / f"church_outdoor_{'train' if name == 'a' else 'val'}_lmdb"
        path.mkdir()
        Image.new("RGB", (9, 8), colour).save(tmp_path / "x.png")
        with lmdb.open(str(path)) as database, database.begin(write=True) as transaction:
            transaction.put(name.encode(), (tmp_path / "x.png").read_bytes())
    cache = str(tmp_path / "cache")
    for _ in range(2):
        train = open_dataset("lsun-church", str(tmp_path), "train", 8, cache)
        test = open_dataset("lsun-church", str(tmp_path), "test", 8, cache)
        assert train[0][:, 0, 0].tolist() == [255, 0, 0]
        assert test[0][:, 0, 0].tolist() == [0, 0, 255]
    assert len(list((tmp_path / "cache").iterdir())) == 2


# --------------------------------------------------------------------------- kills, damage, rivals


@pytest.mark.parametrize("cut", [1, 3, 5, 100, 194])  # of 4 + 192 bytes
def test_a_record_that_was_cut_off_does_not_count(
    cut: int, cached: CachedImages, files: FileImages, decodes: list[str]
) -> None:
    cached[2], cached[3]
    decodes.clear()
    with cached.path.open("r+b") as file:  # as if killed after so many bytes
        file.seek(cached.offset(3) + cut)
        file.write(bytes(cached.record - cut))
    assert torch.equal(cached[3], files[3])
    assert torch.equal(cached[2], files[2])
    assert torch.equal(cached[3], files[3])
    assert decodes == ["03.png", "03.png", "02.png", "03.png"]  # all but the first by files[…]


def test_any_flipped_bit_is_noticed(cached: CachedImages, files: FileImages) -> None:
    expected = files[5]
    for byte in range(0, cached.record, 7):
        assert torch.equal(cached[5], expected)
        content = bytearray(cached.path.read_bytes())
        content[cached.offset(5) + byte] ^= 1 << byte % 8
        cached.path.write_bytes(content)
        assert torch.equal(cached[5], expected)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"junk" + content[4:],
        lambda content: bytes(len(content)),  # killed before the header was written
        lambda _: b"not ours",
    ],
)
def test_a_damaged_file_is_made_anew_in_one_line(
    damage: Callable[[bytes], bytes],
    cached: CachedImages,
    files: FileImages,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("utils.logger.log.propagate", True)
    expected = everything(cached)
    cached.path.write_bytes(damage(cached.path.read_bytes()))
    again = keep_decoded(files, cached.path.parent, "set")
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [f"{cached.path} is damaged or not an image cache; it is created again"]
    assert torch.equal(everything(again), expected)
    assert torch.equal(everything(again), expected)


def test_bad_images_are_never_stored(files: FileImages, tmp_path: Path) -> None:
    (files.folder / "07.png").write_bytes(b"junk")
    cached = keep_decoded(files, tmp_path / "cache", "set")
    for _ in range(2):
        assert "07.png" in refusal(lambda: cached[7])
        loader = BatchLoader(cached, 5, device=CPU, skip_bad=True)
        assert sum(len(batch) for batch in loader.epoch()) == COUNT - 1
    (files.folder / "07.png").unlink()
    assert "07.png" in refusal(lambda: keep_decoded(files, tmp_path / "cache", "set")[7])


def test_threads(cached: CachedImages, files: FileImages) -> None:
    expected = everything(files)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(cached.__getitem__, list(range(COUNT)) * 20))
    assert torch.equal(torch.stack(found), expected.repeat(20, 1, 1, 1))


def test_processes_at_once_and_one_killed(files: FileImages, tmp_path: Path) -> None:
    """Three processes create and fill one cache; one of them is killed while it writes."""
    context = multiprocessing.get_context("fork")
    at_work = context.Event()

    def fill(rounds: int) -> None:
        cached = keep_decoded(files, tmp_path / "cache", "set")
        for i in list(range(COUNT)) * rounds:
            cached.store(i, files[i])
            at_work.set()
            image = cached.stored(i)  # None while another process writes this record
            assert image is None or torch.equal(image, files[i])

    victim, *others = [context.Process(target=fill, args=(rounds,)) for rounds in (10**6, 20, 20)]
    for process in (victim, *others):
        process.start()
    assert at_work.wait(HANGS)
    victim.kill()
    for process in (victim, *others):
        process.join(HANGS)
    assert [process.exitcode for process in others] == [0, 0]
    (path,) = (tmp_path / "cache").iterdir()
    cached = keep_decoded(files, path.parent, "set")
    assert cached.path == path
    assert torch.equal(everything(cached), everything(files))


# --------------------------------------------------------------------------------------- refusals


def test_places_where_no_cache_can_be(files: FileImages, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(lambda: keep_decoded(files, tmp_path / "file", "set"))
    assert message.startswith(f"--image_cache: {tmp_path / 'file'}/set-")
    cached = keep_decoded(files, tmp_path / "cache", "set")
    cached.path.unlink()
    cached.path.mkdir()
    message = refusal(lambda: keep_decoded(files, tmp_path / "cache", "set"))
    assert message == f"--image_cache: {cached.path} cannot be created: Is a directory"


def test_full_disk(files: FileImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int, _offset: int, _size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        message = refusal(lambda: keep_decoded(files, tmp_path / "cache", "set"))
    assert "No space left on device; it needs 0.00 GB, " in message
    (path,) = (tmp_path / "cache").iterdir()
    assert path.stat().st_size == 0
    assert torch.equal(keep_decoded(files, tmp_path / "cache", "set")[0], files[0])


def test_space_is_reserved(cached: CachedImages) -> None:
    status = cached.path.stat()
    assert status.st_blocks * 512 >= status.st_size == len(cached.header) + COUNT * cached.record


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_cache_that_is_gone_is_no_bad_image(
    num_workers: int, skip_bad: bool, cached: CachedImages
) -> None:
    cached.path.unlink()
    loader = BatchLoader(cached, 5, device=CPU, num_workers=num_workers, skip_bad=skip_bad)
    message = refusal(lambda: list(loader.epoch()))
    assert message == f"--image_cache: {cached.path}: No such file or directory"
    assert not loader.bad_images


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"dataset": "folder", "crop": "random", "image_cache": "x"}, "--image_cache x"),
        ({"dataset": "mnist", "image_cache": "x"}, "--image_cache x"),
        ({"dataset": "folder", "image_cache": ""}, "--image_cache is empty"),
    ],
)
def test_contradictions(flags: dict[str, Any], words: str) -> None:
    message = refusal(lambda: build(DataConfig, flags))
    assert words in message
    assert ("--crop random" in message) == ("crop" in flags)


def test_a_run_may_go_on_with_another_cache() -> None:
    assert "image_cache" in FREE_TO_CHANGE


def test_main(script: Callable[..., Outcome], files: FileImages, tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "main.py"))
    folder, cache = str(files.folder), str(tmp_path / "cache")
    data = DataConfig("folder", folder, 8, num_workers=0, image_cache=cache, flip=True)
    config = TrainConfig(output_folder=str(tmp_path / "output"), exp_name="x")
    settings = main["Settings"]({}, {}, data, config, ModelConfig(), (), None)
    sets = open_training(data, "split")
    losses = {"reconstruction": MeanSquaredError(0.1), "quantizer": QuantizerLoss()}
    task = Reconstruction(VQVAE(settings.model), losses, config)
    trainer = main["make_trainer"](task, *sets, settings)
    assert (trainer.train_loader.flip, trainer.validation_loader.flip) == (True, False)
    (path,) = (tmp_path / "cache").iterdir()
    assert path.name.startswith("folder-train-8-")

    data = DataConfig("folder", folder, 8, num_workers=0, crop="random")
    trainer = main["make_trainer"](task, *sets, replace(settings, data=data))
    loaders = trainer.train_loader, trainer.validation_loader
    assert [loader.crop for loader in loaders] == ["random", "centre"]

    flags = ("--dataset", "folder", "--data_folder", folder, "--device", "cpu")
    outcome = script("main.py", *flags, "--image_cache", str(path / "below"))
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert f"--image_cache: {path}" in outcome.err


def test_testing_neither_flips_nor_crops_and_caches_when_told_to() -> None:
    data_of = runpy.run_path(str(ROOT / "test.py"))["data_of"]

    def tested(stored: dict[str, Any], **flags: Any) -> DataConfig:
        content = {"data_config": asdict(DataConfig(dataset="folder", **stored))}
        found = data_of(Checkpoint(Path("x.pt"), content, ModelConfig(), {}), flags)
        assert isinstance(found, DataConfig)
        return found

    plain = DataConfig(dataset="folder")
    assert tested({"flip": True, "crop": "random"}) == plain
    assert tested({"flip": True, "image_cache": "a"}) == plain
    assert tested({"crop": "random"}, image_cache="b", flip=False).image_cache == "b"
    assert tested({"crop": "random"}, dataset="mnist") == DataConfig(dataset="mnist")
    for name, value in (("flip", True), ("crop", "random")):
        message = refusal(lambda: tested({}, **{name: value}))  # noqa: B023
        assert message == f"--{name} has no effect on test images"
