"""Hostile image files: read as a viewer shows them, or refused by name; skipped on request."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import socket
import struct
import time
import zlib
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torch import Tensor

from datasets import BatchLoader, FileImages, ImageSet, TensorImages, open_dataset, pixel_variance
from datasets.folders import list_images
from datasets.image_sets import Place
from modules import VQVAE, ModelConfig
from tests.conftest import Outcome, refusal, run_process
from utils.checkpoints.checkpoint import save_checkpoint
from utils.errors import UserError
from utils.evaluation.pairs import Entry, read_header, read_image
from utils.image_files import SUFFIXES

CPU = torch.device("cpu")
Script = Callable[..., Outcome]
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
HALF_RED = (255, 127, 127)  # half transparent, over white


# ----------------------------------------------------------------------------- what is in the files


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def quarters(*corners: tuple[int, ...], mode: str = "RGB", side: int = 32) -> Image.Image:
    """Return a square whose quarters, left to right and down, have these colours."""
    image = Image.new(mode, (side, side))
    half = side // 2
    for number, colour in enumerate(corners):
        place = (number % 2 * half, number // 2 * half)
        image.paste(Image.new(mode, (half, half), colour), place)
    return image


def palette() -> Image.Image:
    """Return quarters with the palette's entries 0 … 3: red, green, blue, white."""
    image = Image.new("P", (32, 32))
    image.putpalette([*RED, *GREEN, *BLUE, *WHITE])
    image.paste(1, (16, 0, 32, 16))
    image.paste(2, (0, 16, 16, 32))
    image.paste(3, (16, 16, 32, 32))
    return image


def chunk(name: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def png(size: tuple[int, int], depth: int, kind: int, row: bytes, *chunks: bytes) -> bytes:
    """Return a handmade PNG whose rows are all the same."""
    header = struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * min(size[1], 100))
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


COLOURS = quarters(RED, GREEN, BLUE, WHITE)
ALPHA = quarters((*RED, 255), (*RED, 128), (*BLUE, 0), (0, 0, 0, 255), mode="RGBA")
BLACK = Image.new("RGB", (32, 32))
# Name → content, and the colours of the quarters in a viewer.
SHOWN: dict[str, tuple[bytes, list[tuple[int, ...]]]] = {
    "cmyk.jpg": (encoded(COLOURS.convert("CMYK"), "JPEG", quality=95), [RED, GREEN, BLUE, WHITE]),
    "ycbcr.tif": (encoded(COLOURS.convert("YCbCr"), "TIFF"), [RED, GREEN, BLUE, WHITE]),
    "lab.tif": (encoded(COLOURS.convert("LAB"), "TIFF"), [RED, GREEN, BLUE, WHITE]),
    "grey.jpg": (
        encoded(quarters((0,), (50,), (150,), (255,), mode="L"), "JPEG", quality=95),
        [(0,) * 3, (50,) * 3, (150,) * 3, WHITE],
    ),
    "bits.png": (
        encoded(COLOURS.convert("1", dither=Image.Dither.NONE), "PNG"),
        [(0,) * 3, WHITE, (0,) * 3, WHITE],
    ),
    "rgba.png": (encoded(ALPHA, "PNG"), [RED, HALF_RED, WHITE, (0, 0, 0)]),
    "rgba.webp": (encoded(ALPHA, "WEBP", lossless=True), [RED, HALF_RED, WHITE, (0, 0, 0)]),
    "rgba.tif": (encoded(ALPHA, "TIFF"), [RED, HALF_RED, WHITE, (0, 0, 0)]),
    "grey-alpha.png": (
        encoded(quarters((80, 255), (80, 0), (0, 255), (0, 128), mode="LA"), "PNG"),
        [(80,) * 3, WHITE, (0,) * 3, (127,) * 3],
    ),
    "palette-key.png": (encoded(palette(), "PNG", transparency=2), [RED, GREEN, WHITE, WHITE]),
    "palette-alpha.png": (
        encoded(palette(), "PNG", transparency=b"\x80\x00"),
        [HALF_RED, WHITE, BLUE, WHITE],
    ),
    "palette.gif": (encoded(palette(), "GIF", transparency=1), [RED, WHITE, BLUE, WHITE]),
    "rgb-key.png": (encoded(COLOURS, "PNG", transparency=BLUE), [RED, GREEN, WHITE, WHITE]),
    "grey4-key.png": (
        png((32, 32), 4, 0, b"\x55" * 8 + b"\x66" * 8, chunk(b"tRNS", b"\0\5")),
        [WHITE, (102,) * 3] * 2,
    ),
    "animated.gif": (
        encoded(COLOURS, "GIF", save_all=True, append_images=[BLACK]),
        [RED, GREEN, BLUE, WHITE],
    ),
    "animated.webp": (
        encoded(COLOURS, "WEBP", save_all=True, append_images=[BLACK], lossless=True),
        [RED, GREEN, BLUE, WHITE],
    ),
    "animated.png": (
        encoded(COLOURS, "PNG", save_all=True, append_images=[BLACK]),
        [RED, GREEN, BLUE, WHITE],
    ),
    "wrong-name.gif": (encoded(COLOURS, "PNG"), [RED, GREEN, BLUE, WHITE]),
    "damaged-exif.jpg": (
        encoded(COLOURS, "JPEG", quality=95, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01"),
        [RED, GREEN, BLUE, WHITE],
    ),
}
if PIL.__version__.startswith("12.3"):  # this version cannot read its own file
    del SHOWN["ycbcr.tif"]
# EXIF orientations: the eight ways to hold a camera.
TURNED = {
    1: [RED, GREEN, BLUE, WHITE],
    2: [GREEN, RED, WHITE, BLUE],
    3: [WHITE, BLUE, GREEN, RED],
    4: [BLUE, WHITE, RED, GREEN],
    5: [RED, BLUE, GREEN, WHITE],
    6: [BLUE, RED, WHITE, GREEN],
    7: [WHITE, GREEN, BLUE, RED],
    8: [GREEN, WHITE, RED, BLUE],
}
KINDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "AVIF": "avif"}
for kind, suffix in KINDS.items():
    for number, colours in TURNED.items():
        content = encoded(COLOURS, kind, exif=orientation(number), quality=95)
        SHOWN[f"turned{number}.{suffix}"] = (content, list(colours))

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
# Name → content, and words of the refusal.
REFUSED = {
    "empty.png": (b"", "is empty"),
    "text.png": (b"no picture at all", "none of JPEG, PNG"),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "none of JPEG, PNG"),
    "truncated.jpg": (encoded(NOISE, "JPEG")[:1500], "truncated"),
    "truncated.png": (encoded(NOISE, "PNG")[:1500], "truncated"),
    "truncated.tif": (encoded(NOISE, "TIFF", compression="tiff_lzw")[:2000], ""),
    "damaged.tif": (encoded(NOISE, "TIFF", compression="tiff_adobe_deflate")[:60] + b"x" * 400, ""),
    "float.tif": (encoded(Image.new("F", (8, 8), 0.5), "TIFF"), "bits"),
    "bomb.png": (png((100_000, 100_000), 8, 2, b""), "10000000000 pixels) exceeds limit of 178956"),
    "row.png": (png((2**31 - 1, 1), 8, 0, b""), "2147483647 pixels"),
    "column.png": (png((1, 2**31 - 1), 8, 0, b""), "2147483647 pixels"),
    "bomb.bmp": (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, 1, 1, 24, *([0] * 6)),
        "2147483647 pixels",
    ),
    "bomb.tif": (
        b"II*\0\x08\0\0\0\x05\0"
        + b"".join(
            struct.pack("<HHII", tag, kind, 1, value)
            for tag, kind, value in (
                *((256, 4, 2**31 - 1), (257, 4, 1), (258, 3, 8)),
                *((262, 3, 1), (273, 4, 8)),
            )
        )
        + bytes(4),
        "2147483647 pixels",
    ),
    "nothing.png": (png((0, 5), 8, 0, b""), ""),
    "nothing.gif": (b"GIF89a" + bytes(7) + b",\0\0\0\0\0\0\0\0\0\x02\x02L\x01\0;", ""),
}


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def decode_file(path: Path, size: int = 32) -> Tensor:
    return FileImages(path.parent, [path.name], size)[0]


def evaluation_reads(path: Path) -> np.ndarray:
    """Read one image as evaluation.py does, in colour: (3, H, W)."""
    size, mode = read_header(path)
    pixels, _ = read_image(path, Entry(path.stem, {"original": path}, size, mode))
    return np.broadcast_to(pixels, (3, *pixels.shape[1:]))


def colours_of(pixels: Tensor | np.ndarray) -> np.ndarray:
    """Return the colours in the middles of the quarters: (3, H, W) → (4, 3)."""
    array, near, far = np.asarray(pixels).astype(int), 8, 24
    return np.stack([array[:, y, x] for y in (near, far) for x in (near, far)])


# ------------------------------------------------------------------------------------ what is shown


@pytest.mark.parametrize("name", SHOWN)
def test_as_a_viewer_shows_it(
    name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    content, expected = SHOWN[name]
    path = write(tmp_path / name, content)
    exact = content.startswith((b"\x89PNG", b"GIF")) or name == "rgba.tif"
    tolerance = 0 if exact else 24 if name == "lab.tif" else 6  # JPEG and conversions round
    for pixels in (decode_file(path), evaluation_reads(path)):
        assert pixels.shape == (3, 32, 32)
        assert abs(colours_of(pixels) - np.array(expected)).max() <= tolerance
    if name != "damaged-exif.jpg":  # Pillow warns of it, but not on the screen; see below
        assert not recwarn.list
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["turned6.jpg", "cmyk.jpg", "animated.png", "palette.gif"])
def test_decoded_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoders = []
    get = Image._getdecoder

    def counted(mode: str, decoder: str, *rest: Any) -> Any:
        decoders.append(decoder)
        return get(mode, decoder, *rest)

    monkeypatch.setattr(Image, "_getdecoder", counted)
    path = write(tmp_path / name, SHOWN[name][0])
    decode_file(path)
    assert len(decoders) == 1
    evaluation_reads(path)
    assert len(decoders) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [1, 3, 6, 8])
def test_a_turned_images_size_is_known_from_its_header(
    kind: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(
        tmp_path / "x.png", encoded(NOISE.crop((0, 0, 40, 20)), kind, exif=orientation(number))
    )
    expected = (20, 40) if number > 4 else (40, 20)
    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("it was decoded"))
        assert read_header(path) == (expected, "RGB")
    assert evaluation_reads(path).shape == (3, *expected[::-1])


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.fromarray(np.full((32, 32), 200 * 256 + 99, np.uint16)), "PNG"),
        encoded(Image.fromarray(np.full((32, 32), 200 * 256 + 99, np.uint16)), "TIFF"),
        encoded(Image.fromarray(np.full((32, 32), 200 * 256 + 99, np.int32)), "TIFF"),
        b"P5 32 32 65535\n" + struct.pack(">H", 200 * 256 + 99) * 1024,
        b"P6 32 32 65535\n" + struct.pack(">H", 200 * 256 + 99) * 3072,
        png((32, 32), 16, 2, struct.pack(">H", 200 * 256 + 99) * 96),
    ],
    ids=["png", "tiff", "tiff32", "pgm", "ppm", "colour-png"],
)
def test_more_than_8_bits(content: bytes, tmp_path: Path) -> None:
    """Training uses the upper 8 bits; evaluation refuses to compare them."""
    path = write(tmp_path / "deep.png", content)
    assert decode_file(path).unique().tolist() == [200]
    message = refusal(lambda: read_header(path))
    assert message == f"image {path} has more than 8 bits per channel"


def test_a_transparent_16_bit_level(tmp_path: Path) -> None:
    row = struct.pack(">H", 0x1234) * 16 + struct.pack(">H", 0x1235) * 16
    path = write(tmp_path / "x.png", png((32, 32), 16, 0, row, chunk(b"tRNS", b"\x12\x34")))
    assert colours_of(decode_file(path))[:2].tolist() == [[255] * 3, [0x12] * 3]


def test_levels_of_more_than_16_bits_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tif", encoded(Image.new("I", (8, 8), 70_000), "TIFF"))
    assert "more than 16 bits" in refusal(lambda: decode_file(path))


def test_a_long_thin_image(tmp_path: Path) -> None:
    path = write(tmp_path / "x.png", encoded(Image.new("RGB", (1, 60_000), RED), "PNG"))
    assert colours_of(decode_file(path)).tolist() == [list(RED)] * 4


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # on the screen it is not; see below
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content, words = REFUSED[name]
    path = write(tmp_path / name, content)
    for read in (decode_file, evaluation_reads):
        message = refusal(lambda read=read: read(path))  # type: ignore[misc]
        assert message.startswith(f"image {path} ")
        assert words in message
        assert message.count(name) == 1
    assert capfd.readouterr() == ("", "")


def test_memory_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_image: Image.Image) -> None:
        raise MemoryError

    path = write(tmp_path / "x.png", encoded(NOISE, "PNG"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    assert refusal(lambda: decode_file(path)) == (
        f"image {path} cannot be decoded: there is not enough memory for its pixels"
    )


def test_pillows_limit_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.png", encoded(NOISE, "PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 799)
    assert "1600 pixels" in refusal(lambda: decode_file(path))


def test_nothing_else_is_printed(tmp_path: Path) -> None:
    """In a separate process, with the warnings that Python shows by default."""
    for name, (content, _) in {**SHOWN, **REFUSED}.items():
        write(tmp_path / "set" / name, content)
    write(tmp_path / "set" / "large.png", encoded(Image.new("1", (12_000, 9_000)), "PNG"))
    program = (
        "import sys; from pathlib import Path; from datasets import FileImages\n"
        "from datasets.folders import list_images; from utils.errors import UserError\n"
        "images = FileImages(Path('set'), list_images(Path('set')), 8)\n"
        "for i in range(len(images)):\n"
        "    try: images[i]\n"
        "    except UserError: continue\n"
        "    sys.stdout.write(images.names[i] + ' ')"
    )
    end = run_process(["-c", program], tmp_path)
    assert (end.code, end.err) == (0, "")
    assert set(end.out.split()) == {*SHOWN, "large.png"}


# --------------------------------------------------------------- what only has the name of an image


def make_special_files(folder: Path) -> None:
    """Make entries named like images that would block for ever, or are not images."""
    os.mkfifo(folder / "pipe.png")
    (folder / "broken.png").symlink_to(folder / "nowhere.png")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "pipe-link.png").symlink_to(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(folder)  # an address is at most 108 bytes long
        server.bind("socket.png")
        os.chdir(here)


def test_special_files_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.png", encoded(NOISE, "PNG"))
    write(tmp_path / "folder" / "b.png", encoded(NOISE, "PNG"))
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    make_special_files(tmp_path)
    assert list_images(tmp_path) == ["a.png", "folder/b.png", "link.png"]


def test_a_pipe_that_is_asked_for_is_refused(tmp_path: Path) -> None:
    """CelebA's names come from a list."""
    os.mkfifo(tmp_path / "x.png")
    for read in (decode_file, evaluation_reads):
        message = refusal(lambda read=read: read(tmp_path / "x.png"))  # type: ignore[misc]
        assert "is not a regular file" in message


def test_listing_asks_nothing_about_ordinary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        write(tmp_path / f"{number}.png", b"")
    asked = []
    stat = Path.stat

    def counted(path: Path, **options: bool) -> os.stat_result:
        asked.append(path)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", counted)
    assert len(list_images(tmp_path)) == 5
    assert {path.suffix for path in asked}.isdisjoint(SUFFIXES)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "celeba", "imagenet", "folder"])
def test_a_data_folder_that_is_a_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("idx", "cifar", "celeba", "folders"):
        monkeypatch.setattr(f"datasets.{place}.fetch", lambda *_: pytest.fail("it was fetched"))
    file = write(tmp_path / "file", b"")
    message = refusal(lambda: open_dataset(name, str(file), "train"))
    assert message == f"--data_folder {file} is not a folder"
    below = file / "below"
    message = refusal(lambda: open_dataset(name, str(below), "train"))
    assert message == f"--data_folder {below}: {file} is not a folder"


# ------------------------------------------------------------------------------------- the loader


class Levels(ImageSet):
    """Write images with the grey level of their number; those in bad cannot be decoded."""

    channels, image_size = 1, 4

    def __init__(self, size: int, bad: tuple[int, ...] = ()) -> None:
        self.size = size
        self.bad = bad

    def __len__(self) -> int:
        return self.size

    def cropped(self, index: int, _place: Place | None = None) -> Tensor:
        if index in self.bad:
            raise UserError(f"image {index} cannot be decoded")
        return torch.full((1, 4, 4), index, dtype=torch.uint8)


def in_memory(size: int) -> TensorImages:
    images = Levels(size)
    return TensorImages(torch.stack([images[i] for i in range(size)]))


def taken(loader: BatchLoader, epoch: int = 0, start: int = 0) -> list[list[int]]:
    """Return the positions batch by batch; check that each image is that of its position."""
    found = []
    for positions, images in loader.numbered(epoch, start):
        assert (positions.dtype, positions.device) == (torch.int64, CPU)
        assert (images.dtype, images.shape) == (torch.uint8, (len(positions), 1, 4, 4))
        assert images[:, 0, 0, 0].tolist() == positions.tolist()
        found.append(positions.tolist())
    return found


@pytest.mark.parametrize("images", [in_memory(22), Levels(22)], ids=["memory", "decoded"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_in_training_ranks_share_every_batch(images: ImageSet, num_ranks: int) -> None:
    """The last batch has one image: most ranks have none, and make the step too."""

    def loader(rank: int, num_ranks: int) -> BatchLoader:
        return BatchLoader(
            images, 7, device=CPU, shuffle=True, seed=1, rank=rank, num_ranks=num_ranks
        )

    whole = taken(loader(0, 1), epoch=2)
    assert sorted(chain(*whole)) == list(range(22))
    for start in (0, 2):
        shares = [taken(loader(rank, num_ranks), 2, start) for rank in range(num_ranks)]
        assert {len(share) for share in shares} == {4 - start}
        for number, batch in enumerate(whole[start:]):
            assert sorted(chain(*(share[number] for share in shares))) == sorted(batch)
            sizes = [len(share[number]) for share in shares]
            assert max(sizes) - min(sizes) <= 1
    assert len(loader(num_ranks - 1, num_ranks)) == 4


@pytest.mark.parametrize("images", [in_memory(22), Levels(22)], ids=["memory", "decoded"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_in_testing_whole_batches_are_dealt_out(images: ImageSet, num_ranks: int) -> None:
    loaders = [
        BatchLoader(images, 7, device=CPU, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    whole = [list(range(i, min(i + 7, 22))) for i in range(0, 22, 7)]
    for rank, loader in enumerate(loaders):
        assert taken(loader) == whole[rank::num_ranks]
        assert len(loader) == 4
        assert [len(batch) for batch in loader.epoch()] == [len(b) for b in whole[rank::num_ranks]]


def test_a_rank_is_one_of_the_ranks() -> None:
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank {rank} is not one of 2"):
            BatchLoader(Levels(3), 1, device=CPU, rank=rank, num_ranks=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_left_out_and_noted(num_workers: int) -> None:
    bad = (1, 4, 5, 6, 7, 9)
    loader = BatchLoader(Levels(10, bad), 4, device=CPU, num_workers=num_workers, skip_bad=True)
    assert taken(loader) == [[0, 2, 3], [8]]
    assert loader.bad_images == {i: f"image {i} cannot be decoded" for i in bad}
    training = BatchLoader(
        Levels(10, bad), 4, device=CPU, num_workers=num_workers, skip_bad=True, shuffle=True
    )
    batches = taken(training)
    assert len(batches) == 3
    assert sorted(chain(*batches)) == [0, 2, 3, 8]
    assert training.bad_images == loader.bad_images


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_of_bad_images(num_workers: int) -> None:
    """In training an empty batch is a step without images; elsewhere it is left out."""
    options = {"device": CPU, "num_workers": num_workers, "skip_bad": True}
    everything = Levels(3, (0, 1, 2))
    assert taken(BatchLoader(everything, 2, **options, shuffle=True)) == [[], []]  # type: ignore[arg-type]
    assert taken(BatchLoader(everything, 2, **options)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_first_bad_image_ends_the_epoch(num_workers: int) -> None:
    loader = BatchLoader(Levels(9, (4, 7)), 3, device=CPU, num_workers=num_workers)
    assert refusal(lambda: taken(loader)) == "image 4 cannot be decoded"
    assert loader.bad_images == {}


def test_workers_leave_signals_to_the_main_process() -> None:
    loader = BatchLoader(Levels(50), 1, device=CPU, num_workers=1)
    batches = loader.numbered()
    next(batches)
    workers = {int(pid) for pid in children_of(os.getpid()) if is_worker(pid)}
    assert len(workers) == 1
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker, number)
    time.sleep(0.2)
    assert len(list(batches)) == 49
    assert workers <= {int(pid) for pid in children_of(os.getpid())}


def children_of(parent: int) -> list[str]:
    return Path(f"/proc/{parent}/task/{parent}/children").read_text().split()


def is_worker(pid: str) -> bool:
    """Return whether a process was forked from this one, and is not a helper of multiprocessing."""
    here, there = (Path(f"/proc/{name}/cmdline").read_bytes() for name in ("self", pid))
    return here == there


@pytest.mark.parametrize("bad", [(), (0,), (2, 3)])
def test_variance_of_the_readable(bad: tuple[int, ...]) -> None:
    levels = np.array([i for i in range(6) if i not in bad]) / 255
    assert pixel_variance(Levels(6, bad), skip_bad=True) == pytest.approx(np.var(levels), rel=1e-9)


def test_variance_of_nothing() -> None:
    assert refusal(lambda: pixel_variance(Levels(3, (0, 1, 2)), skip_bad=True)) == (
        "none of the 3 images of --data_folder can be decoded"
    )
    assert refusal(lambda: pixel_variance(Levels(3, (1,)))) == "image 1 cannot be decoded"


def test_bad_records_of_lmdb(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    path = tmp_path / "church_outdoor_val_lmdb"
    path.mkdir()
    with lmdb.open(str(path)) as database, database.begin(write=True) as transaction:
        for key, content in ((b"a", encoded(NOISE, "WEBP")), (b"b", b"junk"), (b"c", b"")):
            transaction.put(key, content)
    images = open_dataset("lsun-church", str(tmp_path), "test", 8)
    loader = BatchLoader(images, 3, device=CPU, skip_bad=True)
    assert [positions.tolist() for positions, _ in loader.numbered()] == [[0]]
    assert [images.name(position) for position in loader.bad_images] == [
        *(f"b in {path}", f"c in {path}"),
    ]


# ------------------------------------------------------------------------------------- the scripts


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A test set of six images, of which 1 and 4 cannot be decoded, and a model for them."""
    folder = tmp_path / "pictures"
    for number in range(6):
        write(folder / "test" / f"{number}.png", encoded(NOISE.rotate(60 * number), "PNG"))
    write(folder / "train" / "0.png", encoded(NOISE, "PNG"))
    for number in (1, 4):
        write(folder / "test" / f"{number}.png", b"junk")
    torch.manual_seed(0)
    config = ModelConfig(in_channels=3, hidden_size=8, num_residual_hidden=4, num_embedding=16)
    path = tmp_path / "output" / "models" / "m.pt"
    path.parent.mkdir(parents=True)
    save_checkpoint(path, VQVAE(config), {"data_config": {"dataset": "folder"}})
    return folder


TEST = (
    *("--model_name", "m.pt", "--data_folder", "pictures", "--data_split", "test"),
    *("--image_size", "16", "--batch_size", "2", "--device", "cpu", "--num_workers", "0"),
)


@pytest.mark.usefixtures("pictures")
def test_test_names_pictures_by_their_position(script: Script, tmp_path: Path) -> None:
    outcome = script("test.py", *TEST, "--skip_bad_images")
    assert outcome.code == 0, outcome.err
    results = tmp_path / "output" / "results" / "m" / "pictures"
    expected = [f"0000000{number}.png" for number in (0, 2, 3, 5)]
    for kind in ("original", "rec"):
        assert sorted(path.name for path in (results / kind).iterdir()) == expected
    analysis = json.loads((results / "analysis.json").read_text())
    assert analysis["skipped_images"] == {
        "count": 2,
        "names": ["pictures/test/1.png", "pictures/test/4.png"],
    }
    assert analysis["codebook"]["images"] == 4
    lines = [line.split() for line in outcome.out.splitlines()]
    assert ["images", "4"] in lines
    assert ["skipped", "images", "2"] in lines


def test_test_says_nothing_of_none(script: Script, pictures: Path, tmp_path: Path) -> None:
    for number in (1, 4):
        (pictures / "test" / f"{number}.png").unlink()
    outcome = script("test.py", *TEST, "--skip_bad_images")
    assert outcome.code == 0, outcome.err
    assert "skipped" not in outcome.out
    analysis = json.loads((tmp_path / "output/results/m/pictures/analysis.json").read_text())
    assert analysis["skipped_images"] == {"count": 0, "names": []}


def test_test_without_a_readable_image(script: Script, pictures: Path, tmp_path: Path) -> None:
    for number in range(6):
        write(pictures / "test" / f"{number}.png", b"junk")
    outcome = script("test.py", *TEST, "--skip_bad_images")
    assert outcome.code == 2
    assert "none of the 6 images of --data_folder can be decoded" in outcome.err
    assert "Traceback" not in outcome.err
    left = (tmp_path / "output" / "results").rglob("*")
    assert [path for path in left if path.is_file()] == []


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[str, ...]:
    """Five pairs; c cannot be decoded, and d has an original of 16 bits."""
    noise = np.random.default_rng(1).integers(0, 256, (10, 16, 16), dtype=np.uint8)
    for number, name in enumerate("abcde"):
        for folder, index in (("x", number), ("y", number + 5)):
            image = encoded(Image.fromarray(noise[index]), "PNG")
            write(tmp_path / folder / f"{name}.png", image)
    path = tmp_path / "y" / "c.png"
    path.write_bytes(path.read_bytes()[:150])
    deep = Image.fromarray(np.full((16, 16), 1000, np.uint16))
    write(tmp_path / "x" / "d.png", encoded(deep, "PNG"))
    return ("--gt_path", "x", "--g_path", "y", "--metrics", "l1", "psnr", "--output", "out")


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("batch_size", ["1", "5"])
def test_evaluation_leaves_bad_pairs_out(
    workers: str, batch_size: str, pairs: tuple[str, ...], script: Script, tmp_path: Path
) -> None:
    flags = ("--skip_bad_images", "--num_workers", workers, "--batch_size", batch_size)
    outcome = script("evaluation.py", *pairs, *flags)
    assert outcome.code == 0, outcome.err
    assert outcome.err == "skipped 2 of 5 pairs, which cannot be decoded: c, d\n"
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(record["skipped"]) == ["c", "d"]
    assert record["skipped"]["c"].startswith("image y/c.png cannot be decoded: ")
    assert record["skipped"]["d"] == "image x/d.png has more than 8 bits per channel"
    assert record["pairs"] == record["metrics"]["l1"]["n"] == 3
    with (tmp_path / "out" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["a", "b", "e"]
    l1 = [float(row["l1"]) for row in rows]
    assert record["metrics"]["l1"]["mean"] == pytest.approx(np.mean(l1))


def test_evaluation_does_not_leave_out_by_itself(pairs: tuple[str, ...], script: Script) -> None:
    outcome = script("evaluation.py", *pairs, "--num_workers", "0")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "image x/d.png has more than 8 bits" in outcome.err


def test_evaluation_records_that_nothing_was_left_out(
    pairs: tuple[str, ...], script: Script, tmp_path: Path
) -> None:
    assert script("evaluation.py", *pairs, "--num_test", "2", "--num_workers", "0").code == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["skipped"] == {}


def test_evaluation_of_no_pair(pairs: tuple[str, ...], script: Script, tmp_path: Path) -> None:
    for content in (encoded(NOISE, "PNG")[:200], b"junk"):  # damage after the header, and in it
        for name in "abcde":
            write(tmp_path / "x" / f"{name}.png", encoded(NOISE, "PNG"))
            write(tmp_path / "y" / f"{name}.png", content)
        outcome = script("evaluation.py", *pairs, "--skip_bad_images", "--num_workers", "0")
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1
        assert "none of the 5 pairs can be measured; image y/a.png" in outcome.err
        assert not list((tmp_path / "out").rglob("metrics*"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "y" / "a.png").unlink(), "--g_path lacks 1 of 5 (a)"),
        (
            lambda folder: write(folder / "y" / "a.png", encoded(NOISE, "PNG")),
            "1 of 5 pairs differ in size: a (16×16 and 40×40)",
        ),
    ],
)
def test_evaluation_still_refuses(
    spoil: Callable[[Path], object],
    words: str,
    pairs: tuple[str, ...],
    script: Script,
    tmp_path: Path,
) -> None:
    """A pair of different names or sizes is not a bad image."""
    spoil(tmp_path)
    outcome = script("evaluation.py", *pairs, "--skip_bad_images", "--num_workers", "0")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert words in outcome.err


def test_evaluation_passes_by_pipes(pairs: tuple[str, ...], script: Script, tmp_path: Path) -> None:
    for folder in ("x", "y"):
        make_special_files(tmp_path / folder)
    outcome = script("evaluation.py", *pairs, "--skip_bad_images", "--num_workers", "0")
    assert outcome.code == 0, outcome.err
