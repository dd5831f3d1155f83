"""Files and command lines mutated at random: each ends in success or in one clear line.

LOOC_FUZZ is the number of cases of each kind. A case is a function of its kind and number alone:
`LOOC_FUZZ=1000 pytest "tests/robustness/test_fuzz.py::test_images[714]"` repeats one.
"""

from __future__ import annotations

import faulthandler
import hashlib
import io
import json
import os
import pickletools
import random
import resource
import runpy
import shutil
import signal
import socket
import struct
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, PngImagePlugin
from torch import Tensor

from datasets.config import DataConfig
from datasets.image_sets import TensorImages, decode
from datasets.splits import check_images
from modules import ModelConfig
from tests.conftest import HANGS, ROOT, write_mnist
from tests.unit.test_codes import write_pictures
from utils.checkpoints.checkpoint import read_checkpoint
from utils.codebook.codes.files import CodeFile
from utils.codebook.codes.header import CodesInfo, is_inside
from utils.errors import UserError
from utils.evaluation.pairs import Entry, read_header, read_image
from utils.flags.arguments import flag_fields, names, number_kind
from utils.flags.search import SearchConfig
from utils.logger import log
from utils.training.config import TrainConfig
from utils.training.losses import MeanSquaredError, QuantizerLoss
from utils.training.reconstruction import Reconstruction

COUNT = int(os.environ.get("LOOC_FUZZ", "60"))
SECONDS = 10  # of processor time; a case that takes more is a failure
MEMORY = 2**30  # bytes that a case may take besides what the process has
GOLDEN = Path(__file__).parents[1] / "golden"

Bytes = Callable[[random.Random, bytes], bytes]
cases = pytest.mark.parametrize("number", range(COUNT))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The models are too small for more, and the cases would wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder, removed at once: a thousand cases would fill the disk."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


class TooLong(BaseException):
    """Not an Exception: those that the code under test may catch are of another kind."""


@contextmanager
def bounded() -> Iterator[None]:
    """Raise TooLong after SECONDS, refuse more than MEMORY, and turn warnings into failures."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TooLong(f"{SECONDS} s are over")

    before = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGPROF, stop)
    try:
        if sys.platform == "linux":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        faulthandler.dump_traceback_later(HANGS, exit=True)  # a hang outside of Python
        with warnings.catch_warnings(record=True) as caught:
            # utils.image_files and datasets.loader have asked for that, but pytest undoes it.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            warnings.filterwarnings("ignore", "This DataLoader will create")
            yield
        assert not caught, [str(warning.message) for warning in caught]
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
        resource.setrlimit(resource.RLIMIT_AS, before)


def assert_one_line(error: UserError, *words: str) -> None:
    message = str(error)
    assert message.isprintable(), repr(message)
    assert all(word in message for word in words), message


@cache
def loaded(script: str) -> dict[str, Any]:
    """Names that a script defines; its main is not run."""
    return runpy.run_path(str(ROOT / script), run_name=script.removesuffix(".py"))


# ------------------------------------------------------------------------------------------ bytes


def place(rng: random.Random, content: bytes) -> int:
    """A position; every fourth is in the first 100 bytes, where headers are."""
    end = rng.choice([100, len(content), len(content), len(content)])
    return rng.randrange(max(1, min(end, len(content))))


def block(rng: random.Random, content: bytes) -> tuple[int, int]:
    """Start and end of a block, mostly short."""
    start = place(rng, content)
    return start, start + rng.choice([1, 2, 4, 16, 256, len(content) // 3])


def flip_bits(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(min(len(content), rng.choice([1, 1, 2, 10, 100]))):
        changed[place(rng, content)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(rng: random.Random, content: bytes) -> bytes:
    start, end = block(rng, content)
    filling = rng.choice([b"\0", b"\xff", b"\x80", b"\n", rng.randbytes(1)])
    return content[:start] + filling * (end - start) + content[end:]


def truncate(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.choice([0, place(rng, content), max(0, len(content) - 1)])]


def remove(rng: random.Random, content: bytes) -> bytes:
    start, end = block(rng, content)
    return content[:start] + content[end:]


def duplicate(rng: random.Random, content: bytes) -> bytes:
    start, end = block(rng, content)
    return content[:end] + content[start:end] * rng.choice([1, 2, 50]) + content[end:]


def insert(rng: random.Random, content: bytes) -> bytes:
    start, end = block(rng, content)
    return content[:start] + rng.randbytes(end - start) + content[start:]


def swap(rng: random.Random, content: bytes) -> bytes:
    (a, b), (c, d) = sorted([block(rng, content), block(rng, content)])
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def append(rng: random.Random, content: bytes) -> bytes:
    return content + rng.choice([rng.randbytes(1000), content, b"\0" * 10_000, b"\n"])


BYTES: list[Bytes] = [flip_bits, overwrite, truncate, remove, duplicate, insert, swap, append]

# ----------------------------------------------------------------------------------------- images

NUMBERS = (0, 1, 2, 3, 7, 255, 256, 1000, 8192, 13_000, 2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG chunk with a correct checksum."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and content of each chunk."""
    found, at = [], 8
    while at + 8 <= len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        found.append((kind, png[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def join(found: Sequence[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in found)


def png_header(rng: random.Random, png: bytes) -> bytes:
    """Another width, height, bit depth, colour type or interlacing."""
    found = chunks(png)
    fields = list(struct.unpack(">IIBBBBB", found[0][1]))
    which = rng.randrange(7)
    fields[which] = rng.choice(NUMBERS if which < 2 else (0, 1, 2, 3, 4, 6, 8, 16, 255))
    return join([(b"IHDR", struct.pack(">IIBBBBB", *fields)), *found[1:]])


def png_order(rng: random.Random, png: bytes) -> bytes:
    """A chunk moved, repeated or left out."""
    found = chunks(png)
    moved = found.pop(rng.randrange(len(found)))
    for _ in range(rng.choice([0, 1, 1, 2])):
        found.insert(rng.randrange(len(found) + 1), moved)
    return join(found)


def png_content(rng: random.Random, png: bytes) -> bytes:
    """A chunk of other bytes under a correct checksum."""
    found = chunks(png)
    which = rng.randrange(len(found))
    kind, content = found[which]
    found[which] = (kind, rng.choice(BYTES)(rng, content))
    return join(found)


def png_pixels(rng: random.Random, png: bytes) -> bytes:
    """Other pixels, or too many or few of them, well compressed."""
    found = [(kind, content) for kind, content in chunks(png) if kind != b"IDAT"]
    pixels = zlib.decompress(b"".join(data for kind, data in chunks(png) if kind == b"IDAT"))
    return join([*found[:-1], (b"IDAT", zlib.compress(rng.choice(BYTES)(rng, pixels))), found[-1]])


def png_bomb(rng: random.Random, png: bytes) -> bytes:
    """Much in little: text, a colour profile or pixels of a single value."""
    found = chunks(png)
    zeros = zlib.compress(bytes(50_000_000), 1)
    kind, content = rng.choice(
        [(b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0"), (b"IDAT", b"")]
    )
    return join([found[0], (kind, content + zeros), *found[1:]])


def jpeg_header(rng: random.Random, jpeg: bytes) -> bytes:
    """Another size, precision, number of components or sampling."""
    at = max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2"))
    changed = bytearray(jpeg)
    if rng.random() < 0.5:
        side = min(2**16 - 1, rng.choice(NUMBERS))
        start = at + rng.choice([5, 7])
        changed[start : start + 2] = struct.pack(">H", side)
    else:
        changed[at + rng.choice([4, 9, 10, 11, 12])] = rng.randrange(256)
    return bytes(changed)


OWN: dict[str, list[Bytes]] = {
    ".png": [png_header, png_order, png_content, png_pixels, png_bomb],
    ".jpg": [jpeg_header],
}


def interlaced(pixels: np.ndarray) -> bytes:
    """An interlaced PNG of RGB pixels (H, W, 3), which Pillow does not write."""
    passes = [
        *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
        *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
    ]
    rows = [row for x, y, dx, dy in passes for row in pixels[y::dy, x::dx]]
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    size = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, 1)
    return join([(b"IHDR", size), (b"IDAT", data), (b"IEND", b"")])


@cache
def image_files() -> dict[str, bytes]:
    """Valid files of every format and many modes, by a name that ends in their suffix."""
    y, x = np.mgrid[:40, :48]
    pixels = np.stack([5 * x, 6 * y, 3 * (x + y) % 256], axis=2).astype(np.uint8)
    rgb = Image.fromarray(pixels)
    turned, text = Image.Exif(), PngImagePlugin.PngInfo()
    turned[ExifTags.Base.Orientation] = 6
    text.add_itxt("Title", "soft", zip=True)
    text.add_text("Author", "nobody", zip=True)
    palette, deep = rgb.quantize(200), Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "rgb.png": (rgb, {"pnginfo": text, "exif": turned, "icc_profile": bytes(200)}),
        "grey.png": (rgb.convert("L"), {"transparency": 3}),
        "16-bit.png": (deep, {}),
        "palette.png": (palette, {"transparency": bytes(range(200))}),
        "rgba.png": (Image.merge("RGBA", [*rgb.split(), rgb.getchannel(0)]), {}),
        "apng.png": (rgb, {"save_all": True, "append_images": [rgb.rotate(90)], "duration": 9}),
        "baseline.jpg": (rgb, {}),
        "progressive.jpg": (rgb, {"progressive": True}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "exif.jpg": (rgb, {"exif": turned}),
        "palette.gif": (palette, {"save_all": True, "append_images": [palette.rotate(90)]}),
        "rgba.webp": (rgb.convert("RGBA"), {"exif": turned}),
        "lossless.webp": (rgb, {"lossless": True}),
        "rgb.bmp": (rgb, {}),
        "palette.bmp": (palette, {}),
        "rgb.tif": (rgb, {}),
        "lzw.tif": (rgb, {"compression": "tiff_lzw"}),
        "jpeg.tif": (rgb, {"compression": "jpeg"}),
        "deflate.tiff": (deep, {"compression": "tiff_deflate"}),
        "rgb.ppm": (rgb, {}),
        "grey.pgm": (rgb.convert("L"), {}),
    }
    files = {"interlaced.png": interlaced(pixels)}
    formats = Image.registered_extensions()
    for name, (image, options) in made.items():
        buffer = io.BytesIO()
        image.save(buffer, format=formats[Path(name).suffix], **options)
        files[name] = buffer.getvalue()
    return files


def mutated_image(rng: random.Random) -> tuple[str, bytes]:
    """One of the files: PNG and JPEG oftener, its own mutations before those of any bytes."""
    files = image_files()
    kind = rng.choice([".png", ".png", ".jpg", ".jpg", ""])
    name = rng.choice([name for name in files if name.endswith(kind)])
    content = files[name]
    own = OWN.get(Path(name).suffix, [])
    if own and rng.random() < 0.5:
        content, further = rng.choice(own)(rng, content), rng.choice([0, 0, 1])
    else:
        further = rng.choice([1, 1, 1, 2, 5])
    for _ in range(further):
        content = rng.choice(BYTES)(rng, content)
    return name, content


def test_the_images_are_valid_before_they_are_mutated(folder: Path) -> None:
    for name, content in image_files().items():
        (folder / name).write_bytes(content)
        assert decode(folder / name, 32, name).float().std() > 20


@cases
def test_images(number: int, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(f"images-{number}")
    name, content = mutated_image(rng)
    path = folder / name
    path.write_bytes(content)
    with bounded():
        try:
            image = decode(path, 32, str(path))
            assert (image.shape, image.dtype) == ((3, 32, 32), torch.uint8)
        except UserError as error:
            assert_one_line(error, name)
        try:
            size, mode = read_header(path)
            pair = Entry("a", {"original": path}, size, mode)
            pixels, _ = read_image(path, pair)
            assert pixels.shape == (1 if mode == "L" else 3, size[1], size[0])
            assert pixels.dtype == np.uint8
        except UserError as error:
            assert_one_line(error, name)
    assert tuple(capfd.readouterr()) == ("", "")


# ------------------------------------------------------------------------------------ checkpoints

Place = tuple[Any, Any]  # a dictionary or list, and a key or an index of it


def tiny_words(data: Path, output: Path) -> list[str]:
    """A command line of main.py that takes a fraction of a second."""
    return [
        *("--dataset", "mnist", "--data_folder", str(data), "--output_folder", str(output)),
        *("--num_embedding", "8", "--hidden_size", "8", "--num_residual_hidden", "2"),
        *("--num_residual_layers", "1", "--batch_size", "12", "--device", "cpu"),
    ]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, a trained output/ and pairs of images in results/."""
    home = tmp_path_factory.mktemp("experiment")
    write_mnist(home / "data")
    words = [*tiny_words(home / "data", home / "output"), "--exp_name", "exp", "--max_steps", "4"]
    ended = run_script("main.py", words)
    assert ended.code == 0, ended.err
    for kind in ("original", "rec"):
        (home / "pairs" / kind).mkdir(parents=True)
        for name in ("rgb.png", "grey.png", "baseline.jpg"):
            (home / "pairs" / kind / name).write_bytes(image_files()[name])
        (home / "pairs" / kind / "bad.png").write_bytes(image_files()["rgb.png"][:300])
    for name in ODD_NAMES:
        shutil.copy(home / "output" / "models" / "exp" / "best.pt", home / "output/models" / name)
        shutil.copytree(home / "pairs" / "rec", home / name)
    (home / "file").write_text("text")
    return home


def rezip(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Write a zip file anew, each entry changed, its checksums correct."""
    with zipfile.ZipFile(path) as archive:
        entries = {item.filename: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def any_bytes(rng: random.Random, path: Path, _victim: Path) -> None:
    path.write_bytes(rng.choice(BYTES)(rng, path.read_bytes()))


def any_entry(rng: random.Random, path: Path, _victim: Path) -> None:
    """Bytes of one file in the zip, under a correct checksum."""
    with zipfile.ZipFile(path) as archive:
        chosen = rng.choice([*archive.namelist(), "data.pkl"])
    rezip(
        path,
        lambda name, content: rng.choice(BYTES)(rng, content) if name.endswith(chosen) else content,
    )


def any_opcode(rng: random.Random, path: Path, _victim: Path) -> None:
    """Opcodes of the pickle left out, repeated or in another order."""

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return content
        starts = [at for _, _, at in pickletools.genops(content) if at is not None]
        codes = [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)])]
        for _ in range(rng.choice([1, 2, 5])):
            code = codes.pop(rng.randrange(len(codes)))
            for _ in range(rng.choice([0, 1, 2])):
                codes.insert(rng.randrange(len(codes)), code)
        return b"".join(codes)

    rezip(path, change)


def exploit(rng: random.Random, path: Path, victim: Path) -> None:
    """A call that creates a file, anywhere in the pickle or in its stead."""
    call = rng.choice(
        [
            b"cos\nsystem\n(S'touch " + os.fsencode(victim) + b"'\ntR",
            b"c__builtin__\nopen\n(S'" + os.fsencode(victim) + b"'\nS'w'\ntR",
            b"cbuiltins\neval\n(S\"open('" + os.fsencode(victim) + b"', 'w')\"\ntR",
            b"(S'touch " + os.fsencode(victim) + b"'\nios\nsystem\n",
            b"ctorch\n_C._cuda_init\n(tR",
            b"cpathlib\nPath.touch\n(cpathlib\nPath\n(S'" + os.fsencode(victim) + b"'\ntRtR",
        ]
    )

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return content
        starts = [at for _, _, at in pickletools.genops(content) if at is not None]
        at = rng.choice([starts[1], starts[-1], rng.choice(starts[1:])])
        return content[:at] + call + rng.choice([b"", b"0"]) + content[at:]

    if rng.random() < 0.2:
        path.write_bytes(b"\x80\x02" + call + b".")  # no zip, as PyTorch wrote long ago
    else:
        rezip(path, change)


def places(value: Any) -> list[Place]:
    """Every entry of the dictionaries and lists in value, at any depth."""
    found: list[Place] = []
    pending, seen = [value], set()
    while pending:
        holder = pending.pop()
        if isinstance(holder, (dict, list)) and id(holder) not in seen:
            seen.add(id(holder))
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            found.extend((holder, key) for key in keys)
            pending.extend(holder[key] for key in keys)
    return found


def odd_value(rng: random.Random) -> Any:
    """A value that hardly fits anywhere."""
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    values = [
        *(
            None,
            True,
            False,
            -1,
            0,
            1,
            2,
            3,
            10**6,
            2**31,
            2**53,
            2**63 - 1,
            2**63,
            -(2**63),
            2**70,
        ),
        *(0.5, -0.0, 1e-320, 1e300, float("nan"), float("inf"), -float("inf"), 1j),
        *("", "closest", "a\nb", "\x1b[31m", "é" * 5000, "-1", "nan", "\udcff", b"bytes"),
        *([], {}, (), (1, 2), set(), [None], {"a": {"b": "c\nd"}}, OrderedDict(a=1), deep),
        *(torch.float32, torch.Size([1]), torch.tensor(1), torch.tensor(float("nan"))),
        *(torch.zeros(0), torch.zeros(3, 4), torch.tensor([1 + 2j]), torch.tensor([True])),
        torch.zeros(2, 2).to_sparse(),
    ]
    return rng.choice(values)


def odd_tensor(rng: random.Random, value: Tensor) -> Any:
    """A tensor that resembles the one given."""
    changes: list[Callable[[Tensor], Any]] = [
        lambda x: x.half(),
        lambda x: x.double(),
        lambda x: x.bfloat16(),
        lambda x: x.int(),
        lambda x: x.bool(),
        lambda x: x.to(torch.complex64),
        lambda x: x.float().to_sparse(),
        lambda x: x.flatten(),
        lambda x: x[None],
        lambda x: x[:0] if x.dim() else x,
        lambda x: x.new_zeros(2**20),
        lambda x: x.to("meta"),
        lambda x: x.transpose(0, -1) if x.dim() else x,
        lambda x: x.flatten()[:1].reshape([1] * x.dim()).expand(x.shape),
        lambda x: torch.nn.Parameter(x.float()),
        lambda x: x.float() * float("nan"),
        lambda x: x.float() + float("inf"),
        lambda x: x.float() * 1e30,
        lambda x: -x.float() - 1,
        lambda x: torch.zeros_like(x),
        lambda x: torch.full_like(x, 2**7 - 1),
        lambda x: x.flatten().flip(0).reshape(x.shape),
        lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
        lambda x: x.tolist(),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors are deprecated
        try:
            return rng.choice(changes)(value)
        except (RuntimeError, NotImplementedError):  # of a tensor that is odd already
            return None


def any_content(rng: random.Random, path: Path, _victim: Path) -> None:
    """Entries of the unpickled content dropped, renamed, exchanged, retyped or made absurd."""
    content = torch.load(path, weights_only=True)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 30])):
        # Few entries are not in the model's or the optimiser's state; each of them counts.
        top = rng.choice([content, content, *(v for v in content.values() if isinstance(v, dict))])
        found = places(top) or places(content)
        if not found:
            break
        holder, key = rng.choice(found)
        action = rng.choice(["drop", "rename", "exchange", "odd", "odd", "odd", "number"])
        value = holder[key]
        if action == "drop":
            del holder[key]
        elif action == "rename" and isinstance(holder, dict):
            holder[rng.choice([f"{key}x", "", "a\nb", 7, -1, None, 2**70])] = holder.pop(key)
        elif action == "exchange":
            other, other_key = rng.choice(found)
            if other_key in range(len(other)) if isinstance(other, list) else other_key in other:
                holder[key] = other[other_key]
        elif isinstance(value, Tensor) and rng.random() < 0.8:
            holder[key] = odd_tensor(rng, value)
        elif isinstance(value, (int, float)) and action == "number":
            holder[key] = rng.choice([-value, value + 1, value * 10**6, float(value), str(value)])
        else:
            holder[key] = odd_value(rng)
    torch.save(content, path)


CHECKPOINT = [any_bytes, any_entry, any_opcode, exploit, any_content, any_content, any_content]


def reconstruct(path: Path) -> None:
    """Open a checkpoint, then encode and decode an image."""
    model = read_checkpoint(path).model()
    image = torch.zeros(1, model.config.in_channels, 16, 16)
    with torch.no_grad():
        assert model.decode(model.encode(image)).shape == image.shape


def continue_training(path: Path, whole: Path, output: Path) -> None:
    """One more step of main.py after the checkpoint at path, which was made from that at whole."""
    script, stored = loaded("main.py"), read_checkpoint(whole)
    data = stored.group("data_config", DataConfig)
    config = replace(
        stored.group("train_config", TrainConfig),
        output_folder=str(output),
        resume=str(path),
        max_steps=None,
    )
    images = torch.zeros(24, 1, 28, 28, dtype=torch.uint8)
    sets = TensorImages(images), TensorImages(images[:4])
    losses = {"reconstruction": MeanSquaredError(0.1), "quantizer": QuantizerLoss()}
    task = Reconstruction(stored.model().train(), losses, config)
    settings = script["Settings"]({}, {}, data, config, stored.model_config, (), None)
    trainer = script["make_trainer"](task, *sets, settings)
    current = {**trainer.stored, "num_images": stored.content["num_images"]}
    check = partial(check_images, data=data, current=current)
    script["resume"](trainer, check)
    trainer.total_steps = trainer.step + 1
    trainer.fit()
    reconstruct(trainer.models / "last.pt")


@cases
def test_checkpoints(
    number: int, experiment: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(f"checkpoints-{number}")
    whole = experiment / "output" / "models" / "exp" / "last.pt"
    reference = [GOLDEN / "checkpoint_looc.pt", GOLDEN / "checkpoint_cvq.pt"]
    source, mutate = rng.choice([whole, whole, whole, *reference]), rng.choice(CHECKPOINT)
    path, victim = folder / "m.pt", folder / "victim"
    shutil.copy(source, path)
    mutate(rng, path, victim)
    capfd.readouterr()
    with bounded():
        try:
            reconstruct(path)
            if source == whole:
                continue_training(path, whole, folder / "output")
        except UserError as error:
            trained = (folder / "output" / "logs").exists()
            assert_one_line(error, *([] if trained else [str(path)]))
    assert not victim.exists()
    assert_nothing_half_written(folder / "output")
    streams = capfd.readouterr()
    assert "Traceback" not in streams.err + streams.out
    assert all("%|" in line for line in lines(streams.err)), streams.err


# ------------------------------------------------------------------------------------- code files


def any_header(rng: random.Random, content: bytes) -> bytes:
    """An odd value in the header or in a picture's entry, under a right checksum."""
    start = len(CodesInfo.magic) + 4
    (length,) = struct.unpack("<I", content[start - 4 : start])
    values = json.loads(content[start : start + length])
    holder: Any = values
    if "pictures" in values and rng.random() < 0.5:
        holder = rng.choice([values["pictures"], *values["pictures"]])
    key = rng.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
    odd = odd_value(rng)
    holder[key] = odd if isinstance(odd, (str, int, float, list, dict)) else repr(odd)
    text = json.dumps(values, default=repr).encode()
    whole = (
        content[: start - 4] + struct.pack("<I", len(text)) + text + content[start + length : -32]
    )
    return whole + hashlib.sha256(whole).digest()


def any_part(rng: random.Random, content: bytes) -> bytes:
    """Any bytes, under a right checksum."""
    whole = rng.choice(BYTES)(rng, content[:-32])
    return whole + hashlib.sha256(whole).digest()


@cases
def test_code_files(number: int, folder: Path) -> None:
    rng = random.Random(f"codes-{number}")
    path = folder / "c.looc"
    if rng.random() < 0.5:
        write_pictures(path, [(7, 9), (1, 1), (16, 30)])
    else:
        shutil.copy(GOLDEN / "codes_1.looc", path)
    mutate = rng.choice([rng.choice(BYTES), any_part, any_header, any_header])
    path.write_bytes(mutate(rng, path.read_bytes()))
    with bounded():
        try:
            codes = CodeFile(path)
            for batch, indices in codes.batches():
                assert indices.shape == (len(batch.positions), *batch.shape)
                assert all(is_inside(codes.info.name(int(place))) for place in batch.positions)
        except UserError as error:
            assert_one_line(error, str(path))


# ---------------------------------------------------------------------------------- command lines


class Ended:
    """End of a script: its code, and the text that it wrote."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def run_script(name: str, words: Sequence[str]) -> Ended:
    """Run a script in this process, its streams as strict as those of a terminal in UTF-8."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    saved, code = (sys.argv, sys.stdout, sys.stderr), 0
    sys.argv, sys.stdout, sys.stderr = [name, *words], out, err
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv, sys.stdout, sys.stderr = saved
        log.handlers.clear()
    written = []
    for stream in (out, err):
        stream.flush()
        written.append(stream.buffer.getvalue().decode())
    return Ended(code, *written)


def lines(text: str) -> list[str]:
    """The lines that are not empty; a progress bar has one for each of its states."""
    return [line for line in text.replace("\r", "\n").split("\n") if line.strip()]


ODD_WORDS = (
    *("", " ", "-", "--", "-1", "0", "1", "2", "3", "1e3", "0.5", "-0", "+1", "1_0", "0x10", "١"),
    *("nan", "inf", "-inf", "1e400", "1e-400", "9" * 30, "9" * 5000, "-" + "9" * 30, str(2**63)),
    *("None", "true", "é", "日本", "a\nb", "a\rb", "\x1b[31m", "\udcff", "%s", "{0}", "a b", "a,b"),
    *("x" * 300, ".", "..", "missing", "file", "file/below", "missing/deep", "data", "output"),
    *("/dev/null", "/proc/none", "loop", "~", "*", "cpu", "cuda:99999999999999999999", "cpu:7"),
    *("../exp", "exp", "exp/best.pt", "exp/last.pt", "closest", "random", "png", "l1", "psnr"),
    *(
        "-h",
        "--help",
        "-h=",
        "--=",
        "-x",
        "--unknown",
        "--unknown=3",
        "--num_emb",
        "--lr=",
        "--no-",
        "--a\nb=1",
    ),
)
ODD_NAMES = ("\udcff", "a\nb", "\x1b[31m", "-é %s")  # of files that exist, or could
# Too large to be computed, if not to be refused, or in need of a compiler.
NEVER = {"compile"}
FEW = {
    "num_residual_layers": ["0", "1", "2", "1025"],
    "num_embedding": ["1", "7", "64", str(2**20 + 1)],
    "embedding_dim": ["1", "2", "3", "4", "8", str(2**14)],
    "hidden_size": ["2", "7", "8", "16", str(2**14), str(2**14 + 1)],
    "num_residual_hidden": ["1", "5", str(2**14 + 1)],
    "batch_size": ["1", "5", "100", str(2**20)],
    "accumulate": ["1", "3", "13", str(2**20)],
    "num_workers": ["0", "1", "1025"],
    "image_size": ["4", "8", "28", "30", "8193"],
    "save_every": ["1", "2", "1m", "m", "-1"],
    "dataset": ["mnist", "folder", "fashion-mnist", "cifar10", "celeba", "lsun-church", "ffhq"],
    "data_folder": ["data", "pairs", "pairs/rec", "missing"],
    "images": ["pairs", "pairs/rec", "data", "file", "loop", *ODD_NAMES],
    "image_cache": ["new", "file", "file/below", *ODD_NAMES],
    "exp_name": ["exp", "new", "a/b", "../x", "exp/best.pt", *ODD_NAMES],
    "model_name": ["exp/best.pt", "exp/last.pt", "exp", "exp/none.pt", *ODD_NAMES],
    "resume": ["auto", "none", "output/models/exp/best.pt", "file"],
    "output_folder": ["output", "new", "file", "file/below", *ODD_NAMES],
    "gt_path": ["pairs/original", "pairs", "data"],
    "g_path": ["pairs/rec", "pairs/original", "file", *ODD_NAMES],
    "output": ["new", "file", "pairs", *ODD_NAMES],
    "lpips_weights": ["file", "missing", "output/models/exp/best.pt"],
    "inception_weights": ["file", "missing", "output/models/exp/best.pt"],
    "metrics": ["l1", "psnr", "ssim", "l1", "psnr", "fid", "lpips"],
}


def flag_groups(script: str) -> list[type]:
    """The dataclasses whose fields are the script's flags."""
    if script == "main.py":
        return [ModelConfig, DataConfig, TrainConfig, SearchConfig]
    if script == "test.py":
        return [loaded(script)["TestConfig"], ModelConfig, DataConfig, SearchConfig]
    return [loaded(script)["EvaluationConfig"]]


def random_flag(rng: random.Random, script: str) -> list[str]:
    """A flag with a value, mostly of the right kind, or a word that is none."""
    items = [item for group in flag_groups(script) for item in flag_fields(group)]
    item = rng.choice([item for item in items if item.name not in NEVER])
    flag = rng.choice(names(item))
    if item.type == "bool":
        value = rng.choice(["", "", "", "true"])
    elif item.name in FEW and rng.random() < 0.8:
        value = rng.choice(FEW[item.name])
    elif item.name in FEW:
        value = rng.choice([word for word in ODD_WORDS if not number_like(word)])
    elif item.metadata["choices"] and rng.random() < 0.8:
        value = rng.choice([*item.metadata["choices"]])
    elif number_kind(item.type) is not str and rng.random() < 0.8:
        value = rng.choice(["1", "2", "3", "7", "0"])
    else:
        value = rng.choice(ODD_WORDS)
    if item.type == "bool" and not value:
        return [rng.choice([flag, flag.replace("--", "--no-", 1)])]
    written = rng.choice(["two", "two", "two", "two", "joined", "cut", "alone", "word"])
    return {
        "two": [flag, value],
        "joined": [f"{flag}={value}"],
        "cut": [flag[: rng.randrange(2, len(flag) + 1)], value],
        "alone": [flag],
        "word": [rng.choice(ODD_WORDS)],
    }[written]


def number_like(word: str) -> bool:
    """Return whether the word is a number that a flag of FEW may accept, and then be slow."""
    try:
        return 1 <= float(word) < float("inf")
    except ValueError:
        return False


def command_line(rng: random.Random, script: str) -> list[str]:
    """A small valid command line with random flags in it; later ones count."""
    words = {
        "main.py": [*tiny_words(Path("data"), Path("output")), "--exp_name", "other"],
        "test.py": ["--model_name", "exp/best.pt", "--device", "cpu"],
        "evaluation.py": [
            *("--gt_path", "pairs/original", "-g_path", "pairs/rec", "--metrics", "l1", "psnr"),
            *("--num_workers", "0", "--device", "cpu", "--skip_bad_images"),
        ],
    }[script]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3, 6])):
        words += random_flag(rng, script)
    if rng.random() < 0.1:
        del words[rng.randrange(len(words))]
    return [*words, "--max_steps", "1"] if script == "main.py" else words


def assert_nothing_half_written(folder: Path) -> None:
    """Checkpoints open, records parse, and nothing temporary is left."""
    for path in folder.rglob("*"):
        assert not path.name.endswith(".tmp"), path
        assert not path.name.endswith(".old"), path
        if path.suffix == ".pt" and path.is_file():
            reconstruct(path)
        if path.suffix == ".json":
            json.loads(path.read_text())


def no_network(*_arguments: Any, **_options: Any) -> Any:
    raise OSError("no network here")


@cases
def test_command_lines(
    number: int,
    experiment: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rng = random.Random(f"commands-{number}")
    script = rng.choice(["main.py", "main.py", "test.py", "evaluation.py"])
    words = command_line(rng, script)
    home = folder / "home"  # a command may write beside it
    shutil.copytree(experiment, home)
    (home / "loop").symlink_to("loop")
    monkeypatch.chdir(home)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr("datasets.idx.DEBIAN", folder / "none")  # 10,000 images take too long
    monkeypatch.setenv("TORCH_HOME", str(folder / "hub"))
    capfd.readouterr()
    with bounded():
        ended = run_script(script, words)
    assert tuple(capfd.readouterr()) == ("", ""), words
    assert "Traceback" not in ended.out + ended.err, words
    assert ended.code in (0, 2), (words, ended.code)
    errors = [line for line in lines(ended.err) if line.startswith(f"{script}: error: ")]
    if ended.code == 2:
        assert errors == lines(ended.err)[-1:], (words, ended.err)
        assert errors[0].isprintable(), (words, errors)
    else:
        assert not errors, (words, ended.err)
    assert_nothing_half_written(folder)
    models = home / "output" / "models" / "exp"
    if "--overwrite" not in words:
        assert (models / "best.pt").exists(), words
        assert (models / "last.pt").exists(), words
