"""Code files: the same pictures from them, their size, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from modules import VQGAN, VQVAE, ModelConfig
from modules.checkpoint import SETTINGS
from tests.conftest import Outcome
from tests.processes import run_ranks
from tests.scripts.test_cli import GOLDEN, TINY, error_line, train
from utils.codebook.codes import files
from utils.codebook.codes.coder import FREQUENCIES, Coder, nearest_frequencies
from utils.codebook.codes.files import DIGEST_SIZE, CodeFile, file_rate
from utils.codebook.codes.header import CodesInfo, Header, PicturesInfo, fingerprint
from utils.codebook.statistics import CodebookStatistics, entropy_bits
from utils.errors import UserError

Script = Callable[..., Outcome]
TESTED = ("--output_folder", "out", "--model_name", "e/best.pt")
RESULTS = Path("out/results/e/best/mnist")
DECODED = Path("out/results/e/best/mnist-codes")


def pictures(folder: Path, names: str = "*") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(names)}


def draw(shape: tuple[int, int, int, int], num_embedding: int, seed: int = 0) -> torch.Tensor:
    """Indices (n, H, W, m) of which low ones are frequent."""
    uniform = np.random.default_rng(seed).random(shape)
    return torch.from_numpy((num_embedding * uniform**3).astype(np.int64))


def info_of(indices: torch.Tensor, num_embedding: int, **known: Any) -> CodesInfo:
    n, height, width, slots = indices.shape
    shape = {"height": height, "width": width, "slots": slots, "num_embedding": num_embedding}
    sizes = {"image_size": 4 * height, "num_images": n, "batch_size": 3, "chunk_size": 600}
    return CodesInfo(**{**sizes, **shape, **known})


def write(
    path: Path, indices: torch.Tensor, num_embedding: int, num_ranks: int = 1, **known: Any
) -> Header:
    """A code file of indices (n, H, W, m), whose batches went to several spools in turn."""
    info = info_of(indices, num_embedding, **known)
    spools = [files.spool_path(path, number) for number in range(num_ranks)]
    parts: list[list[bytes]] = [[] for _ in spools]
    for start in range(0, info.num_images, info.batch_size):
        batch = range(start, min(start + info.batch_size, info.num_images))
        kept = indices[[position for position in batch if position not in info.left_out]]
        number = start // info.batch_size % num_ranks
        parts[number].append(kept.numpy().astype(info.dtype).tobytes())
    for spool, part in zip(spools, parts):
        spool.write_bytes(b"".join(part))
    try:
        return files.write_codes(path, info, spools)
    finally:
        for spool in spools:
            spool.unlink()


def write_pictures(
    path: Path,
    sizes: Sequence[tuple[int, int]],
    num_ranks: int = 1,
    left_out: Sequence[int] = (),
    chunk_codes: int = 20,
) -> dict[int, torch.Tensor]:
    """A code file of pictures of these heights and widths, f = 4, m = 2, K = 5; their indices."""
    info = PicturesInfo(
        num_images=len(sizes) + len(left_out),
        left_out=tuple(left_out),
        slots=2,
        num_embedding=5,
        downsampling=4,
        chunk_codes=chunk_codes,
        pictures=tuple((f"b/{n}", width, height) for n, (height, width) in enumerate(sizes)),
    )
    spools = [files.spool_path(path, number) for number in range(num_ranks)]
    parts: list[list[bytes]] = [[] for _ in spools]
    indices = {}
    for position, size in zip(info.positions, sizes):
        indices[position] = draw((1, *info.index_shape(*size)), 5, position)[0]
        parts[position % num_ranks].append(indices[position].numpy().astype(info.dtype).tobytes())
    for spool, part in zip(spools, parts):
        spool.write_bytes(b"".join(part))
    files.write_codes(path, info, spools)
    for spool in spools:
        spool.unlink()
    return indices


def read(path: Path, rank: int = 0, num_ranks: int = 1) -> dict[int, torch.Tensor]:
    """The indices (H, W, m) in a code file by the positions of their images."""
    return {
        int(position): image
        for batch, indices in CodeFile(path).batches(rank, num_ranks)
        for position, image in zip(batch.positions, indices)
    }


def assert_holds(path: Path, indices: torch.Tensor) -> None:
    found = read(path)
    assert list(found) == list(range(len(indices)))
    assert torch.equal(torch.stack(list(found.values())), indices)


# -------------------------------------------------------------------------------------- as a user


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--quantizer cvq",
        "--quantizer vq",
        "--interpolation_scale 2",
        "--split interval --interpolation_scale 3 --embedding_dim 3 --hidden_size 6",
        "--num_embedding 1",
        "--num_embedding 300 --split interval",
    ],
)
def test_the_same_pictures_from_codes(
    words: str, script: Script, mnist: Path, tmp_path: Path
) -> None:
    """Byte for byte, as without --save_codes, from nothing but the code file and the checkpoint."""
    assert train(script, mnist, *words.split()).code == 0
    results = tmp_path / RESULTS
    assert script("test.py", *TESTED, "--batch_size", "5").code == 0
    without = pictures(results / "rec")
    saved = script("test.py", *TESTED, "--batch_size", "5", "--save_codes")
    assert saved.code == 0, saved.err
    assert pictures(results / "rec") == without
    assert len(without) == 12
    assert f"{RESULTS / 'codes.looc'}" in saved.out
    assert not list(results.glob(".*"))

    size = (results / "codes.looc").stat().st_size
    rate = json.loads((results / "analysis.json").read_text())["rate"]
    assert rate["coded_bytes"] == size
    assert rate["coded_bits_per_pixel"] == 8 * size / (12 * 28**2)
    shown = f"bits per pixel, coded    {rate['coded_bits_per_pixel']:.3f}"
    assert shown in saved.out

    (results / "codes.looc").rename(tmp_path / "x.looc")
    for folder in (results, mnist):
        shutil.rmtree(folder)
    outcome = script("test.py", *TESTED, "--from_codes", "x.looc")
    assert outcome.code == 0, outcome.err
    decoded = results.with_name(f"{tmp_path.name}-x")
    assert pictures(decoded / "rec") == without
    assert json.loads((decoded / "analysis.json").read_text())["rate"] == rate
    assert shown in outcome.out
    assert "bit for bit" in outcome.out


def test_one_folder_per_set_of_images(script: Script, mnist: Path, tmp_path: Path) -> None:
    """Other images of the same name are refused; the same ones replace what scripts wrote."""
    train(script, mnist)
    results, decoded = tmp_path / RESULTS, tmp_path / DECODED
    evaluate = ("evaluation.py", "--metrics", "psnr", "--num_workers", "0", "--gt_path")
    assert script("test.py", *TESTED, "--save_codes").code == 0
    files = pictures(results, "*.*")
    outcome = script("test.py", *TESTED, "--from_codes", str(RESULTS / "codes.looc"))
    assert (outcome.code, pictures(results, "*.*")) == (0, files), outcome.err
    outcome = script(*evaluate, str(results / "original"), "--g_path", str(decoded / "rec"))
    assert outcome.code == 0, outcome.err
    assert "bits per pixel, coded" in outcome.out
    outcome = script("test.py", *TESTED, "--from_codes", "x.looc", "--skip_bad_images")
    assert "x.looc does not exist" in outcome.err

    for folder in (results, decoded):
        (folder / "notes.txt").touch()
    assert script(*evaluate, str(results / "original"), "--g_path", str(results / "rec")).code == 0
    outcome = script("test.py", *TESTED)
    before = "original, rec, reconstructions.png, usage.png, slots.png, codebook.png, codes.looc, "
    before += "analysis.json, report.html, metrics.json, metrics.csv, worst_psnr.png"
    assert f"replaced the results of an earlier run in {RESULTS}: {before}\n" in outcome.err
    there = {path.name for path in results.iterdir()}
    assert there == {*before.split(", ")[:6], "analysis.json", "report.html", "notes.txt"}
    assert (decoded / "metrics.json").is_file()

    moved = mnist.rename(tmp_path / "moved")
    message = error_line(script("test.py", *TESTED, "--data_folder", str(moved)))
    assert f"{RESULTS} has results of --dataset mnist --data_folder {mnist} --data_spl" in message
    assert f", not of --dataset mnist --data_folder {moved} --data_split test: rename" in message
    assert message.endswith("rename that folder, or choose another --output_folder")
    assert {path.name for path in results.iterdir()} == there


def test_flags_without_effect_and_a_file_as_output_folder(
    script: Script, mnist: Path, tmp_path: Path
) -> None:
    train(script, mnist)
    message = error_line(script("test.py", *TESTED, "--skip_bad_images"))
    memory = "--dataset mnist, whose images are in memory"
    assert message.endswith(f"--skip_bad_images has no effect with {memory}")
    (tmp_path / "file").touch()
    words = ("--model_name", str(tmp_path / "out/models/e/best.pt"), "--output_folder", "file")
    message = error_line(script("test.py", *words))
    assert message.startswith("test.py: error: --output_folder file/results/")
    assert message.endswith("cannot be created: Not a directory")


def test_the_order_of_a_header_is_that_of_older_files(tmp_path: Path) -> None:
    write(tmp_path / "a.looc", draw((5, 2, 2, 2), 5), 5)
    order = "fingerprint dataset image_size channels num_images left_out batch_size chunk_size "
    order += "height width slots num_embedding num_tables pixel_sum"
    content = (tmp_path / "a.looc").read_bytes().partition(b"\n")[2]
    (length,) = struct.unpack("<I", content[:4])
    assert list(json.loads(content[4 : 4 + length])) == order.split()


def test_images_left_out(script: Script, tmp_path: Path) -> None:
    """A batch without its damaged image, and a batch of damaged images alone."""
    random = np.random.default_rng(0)
    for number in range(10):
        path = tmp_path / f"pictures/{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(path)
    data = ("--dataset", "folder", "--data_folder", "pictures", "--image_size", "16")
    more = ("--num_workers", "0", "--output_folder", "out")
    trained = script("main.py", *data, *more, *TINY, "--max_steps", "1", "--exp_name", "e")
    assert trained.code == 0, trained.err
    (tmp_path / "pictures").rename(tmp_path / "all")
    shutil.copytree(tmp_path / "all", tmp_path / "pictures/test")
    for number in (1, 4, 5):
        (tmp_path / f"pictures/test/{number}.png").write_bytes(b"damaged")
    (tmp_path / "pictures/train").mkdir()
    shutil.copy(tmp_path / "all/0.png", tmp_path / "pictures/train")
    words = ("--skip_bad_images", "--batch_size", "2", "--save_codes")
    outcome = script("test.py", *data, *more, *TESTED[2:], *words)
    assert outcome.code == 0, outcome.err
    results = tmp_path / "out/results/e/best/pictures"
    before = pictures(results / "rec")
    assert sorted(before) == [f"{number:08d}.png" for number in (0, 2, 3, 6, 7, 8, 9)]
    assert script("test.py", *TESTED, "--from_codes", str(results / "codes.looc")).code == 0
    assert pictures(results.with_name("pictures-codes") / "rec") == before


def test_several_processes_write_and_read_the_same(
    script: Script, mnist: Path, tmp_path: Path
) -> None:
    train(script, mnist)
    path = tmp_path / RESULTS / "codes.looc"
    words = (*TESTED, "--batch_size", "3", "--device", "cpu")
    assert script("test.py", *words, "--save_codes").code == 0
    one, expected = path.read_bytes(), pictures(path.parent / "rec")
    ways = (("--save_codes",), RESULTS), (("--from_codes", str(path)), DECODED)
    for flags, folder in ways:
        outcomes = run_ranks(["test.py", *words, *flags], tmp_path)
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
        assert "".join(outcome.out for outcome in outcomes).count("bits per pixel, coded") == 1
        assert path.read_bytes() == one
        assert pictures(tmp_path / folder / "rec") == expected


def test_refusals_are_one_line(
    script: Script, mnist: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train(script, mnist)
    assert script("test.py", *TESTED, "--save_codes").code == 0
    path = tmp_path / RESULTS / "codes.looc"
    before = pictures(path.parent / "rec")

    def refused(*words: str, file: str = str(RESULTS / "codes.looc")) -> str:
        line = error_line(script("test.py", *TESTED, "--from_codes", file, *words))
        assert pictures(path.parent / "rec") == before
        return line

    assert "which has 16" in refused("--batch_size", "5")
    assert "--dataset cifar10 contradicts" in refused("--dataset", "cifar10")
    assert "--save_codes contradicts --from_codes" in refused("--save_codes")
    assert "code file absent does not exist" in refused(file="absent")
    assert "code file out is not a file" in refused(file="out")
    assert "is not a code file" in refused(file="out/models/e/best.pt")

    own = CodeFile(path).info.fingerprint[:16]
    train(script, mnist, "--overwrite", "--max_steps", "4")
    message = refused()
    assert "of another model than out/models/e/best.pt" in message
    assert own in message
    assert "that of the checkpoint is " in message

    monkeypatch.setitem(sys.modules, "constriction", None)
    assert "--from_codes needs constriction: pip install constriction" in refused()
    message = error_line(script("test.py", *TESTED, "--save_codes"))
    assert "--save_codes needs constriction: pip install constriction" in message
    assert script("test.py", *TESTED).code == 0


def test_the_fingerprint_is_of_what_decodes() -> None:
    torch.manual_seed(0)
    model = VQVAE(ModelConfig(hidden_size=8, num_residual_hidden=4, num_embedding=16))
    own = fingerprint(model)
    other = VQVAE(replace(model.config, split="interval"))
    weights = {name: value for name, value in model.state_dict().items() if name != SETTINGS}
    other.load_state_dict(weights, strict=False)
    assert fingerprint(other) != own
    with torch.no_grad():
        model.encoder.conv_1.weight.add_(1)
        assert fingerprint(model) == own
        model.quantizer.codebook[3, 1] += 1e-3
        assert fingerprint(model) != own


def test_the_fingerprint_is_of_the_groups_too() -> None:
    pytest.importorskip("diffusers")
    config = ModelConfig(model="vqgan", hidden_size=8, channel_multipliers="1,2", norm_groups=2)
    model, other = VQGAN(config), VQGAN(replace(config, norm_groups=4))
    other.load_state_dict(model.state_dict())
    assert fingerprint(model) != fingerprint(other)


# ---------------------------------------------------------------------------------- whole or not


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A code file of 7 images with chunks of one batch of 3."""
    path = tmp_path / "small.looc"
    write(path, draw((7, 2, 3, 2), 5), 5, chunk_size=3)
    return path


SIZES = [(7, 9), (1, 1), (16, 30), (8, 8)]


@pytest.fixture
def pictured(tmp_path: Path) -> Path:
    """A code file of four whole pictures, the third alone in its chunk."""
    write_pictures(tmp_path / "pictures.looc", SIZES)
    return tmp_path / "pictures.looc"


@pytest.fixture(params=["small", "pictured"])
def each_kind(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_truncation_is_refused(each_kind: Path) -> None:
    whole = each_kind.read_bytes()
    for length in range(len(whole)):
        each_kind.write_bytes(whole[:length])
        refused(each_kind)
    each_kind.write_bytes(whole + b"\0")
    refused(each_kind)


def test_changed_bytes_are_refused(each_kind: Path) -> None:
    whole = each_kind.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(200):
        changed = bytearray(whole)
        changed[random.integers(len(whole))] ^= 1 << random.integers(8)
        each_kind.write_bytes(changed)
        refused(each_kind)


def resealed(path: Path, content: bytes) -> None:
    path.write_bytes(content + hashlib.sha256(content).digest())


def with_header(path: Path, changes: Mapping[str, Any]) -> None:
    """Change the header of a code file, and its checksum to match."""
    content = path.read_bytes()[:-DIGEST_SIZE]
    start = len(CodesInfo.magic) + 4
    (length,) = struct.unpack("<I", content[start - 4 : start])
    values = {**json.loads(content[start : start + length]), **changes}
    text = json.dumps(values).encode()
    packed = struct.pack("<I", len(text)) + text
    resealed(path, content[: start - 4] + packed + content[start + length :])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_images": 2**40},
        {"num_images": 2**70},
        {"num_images": 6, "left_out": [0, 1, 2, 3, 4, 5]},
        {"num_images": "7"},
        {"num_images": True},
        {"batch_size": 2**60},
        {"batch_size": 0},
        {"batch_size": 2},
        {"chunk_size": 4},
        {"chunk_size": 3 * 2**60},
        {"chunk_size": 6},
        {"num_embedding": 2**20},
        {"num_embedding": 2**40},
        {"num_embedding": 4},
        {"num_embedding": 6},
        {"height": 2048, "width": 2048, "slots": 2**20},
        {"height": 4},
        {"num_tables": 5},
        {"num_tables": 12, "num_embedding": 2**20},
        {"left_out": [7]},
        {"left_out": [-1]},
        {"left_out": [2, 1]},
        {"left_out": [1.0]},
        {"left_out": [[1]]},
        {"left_out": 3},
        {"left_out": [1]},
        {"fingerprint": None},
        {"more": 1},
    ],
    ids=str,
)
def test_forged_headers_are_refused(changes: dict[str, Any], small: Path) -> None:
    with_header(small, {})
    read(small)
    with_header(small, changes)
    refused(small)


def named(**changes: Any) -> dict[str, Any]:
    """The pictures of `pictured`, with these values in place of those of the first."""
    first = {"name": "b/0", "width": 9, "height": 7, **changes}
    rest = [(f"b/{n}", width, height) for n, (height, width) in enumerate(SIZES)][1:]
    return {"pictures": [[*first.values()], *rest]}


@pytest.mark.parametrize(
    "changes",
    [
        *({"num_images": 3}, {"num_images": 2**40}, {"num_images": 5}, {"left_out": [0]}),
        *({"num_tables": 3}, {"slots": 1}, {"slots": 4}, {"downsampling": 1}, {"downsampling": 0}),
        *({"num_embedding": 4}, {"num_embedding": 2**40}, {"pictures": []}, {"pictures": 7}),
        *({"pictures": [1, 2, 3, 4]}, {"pictures": [["a", 1]] * 4}, {"image_size": 8}),
        *({"chunk_codes": 0}, {"chunk_codes": 1}, {"chunk_codes": 2**40}),
        *(named(name=name) for name in ("../b", "/b", "b/../c", "", ".", "a//b", "a\0", "b/1", 3)),
        *(named(width=width) for width in (0, -4, 4, 13, 2.0, True, "9", 2**40, 2**70)),
    ],
    ids=str,
)
def test_forged_headers_of_pictures_are_refused(changes: dict[str, Any], pictured: Path) -> None:
    with_header(pictured, named())
    assert len(read(pictured)) == 4
    with_header(pictured, changes)
    refused(pictured)


def test_forged_contents_are_refused(each_kind: Path) -> None:
    """Bytes changed and the checksum made to match: the indices have checksums of their own."""
    whole = each_kind.read_bytes()[:-DIGEST_SIZE]
    (length,) = struct.unpack_from("<I", whole, len(CodesInfo.magic))
    expected, random, refusals = read(each_kind), np.random.default_rng(0), 0
    for _ in range(200):
        changed = bytearray(whole)
        place = random.integers(len(CodesInfo.magic) + 4 + length, len(whole))
        changed[place] ^= 1 << random.integers(8)
        resealed(each_kind, bytes(changed))
        try:
            found = read(each_kind)
            assert all(torch.equal(found[position], expected[position]) for position in expected)
        except UserError:
            refusals += 1
    assert refusals > 150


def test_a_header_nested_deeply(each_kind: Path) -> None:
    text = b"[" * 10**5
    resealed(each_kind, CodesInfo.magic + struct.pack("<I", len(text)) + text)
    refused(each_kind)


def test_nothing_is_left_of_a_file_that_cannot_be_written(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = small.read_bytes()

    def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "digest_of", full)
    with pytest.raises(UserError, match=r"small\.looc: No space left"):
        write(small, draw((7, 2, 3, 2), 5), 5)
    assert small.read_bytes() == before
    assert list(small.parent.iterdir()) == [small]


# ------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize(
    ("shape", "num_embedding"),
    [
        ((1, 1, 1, 1), 1),
        ((1, 2, 2, 3), 7),
        ((5, 1, 1, 4), 1),
        ((50, 3, 2, 4), 256),
        ((10, 4, 4, 2), 257),
        ((4, 2, 2, 1), 2**16 + 1),
        ((4, 2, 2, 3), 2**20),
    ],
)
def test_indices_come_back(
    shape: tuple[int, int, int, int], num_embedding: int, tmp_path: Path
) -> None:
    """From any number of processes' spools, in one chunk or many."""
    indices, written = draw(shape, num_embedding), set()
    indices.view(-1)[0] = num_embedding - 1  # the last codevector, and a few others
    for num_ranks in (1, 2, 3):
        write(tmp_path / "c", indices, num_embedding, num_ranks)
        assert_holds(tmp_path / "c", indices)
        written.add((tmp_path / "c").read_bytes())
    assert len(written) == 1


def test_pictures_come_back(tmp_path: Path) -> None:
    """Each in its shape, from any number of processes' spools, in one chunk or many."""
    path = tmp_path / "c"
    for codes in (2**22, 20):
        written = set()
        for num_ranks in (1, 2, 3):
            indices = write_pictures(path, SIZES, num_ranks, (0, 3), codes)
            written.add(path.read_bytes())
            found = read(path)
            assert list(found) == list(indices) == [1, 2, 4, 5]
            assert all(torch.equal(found[position], indices[position]) for position in found)
        assert len(written) == 1
        info = CodeFile(path).info
        assert (info.num_chunks, info.num_pixels) == (1 if codes > 20 else 3, 63 + 1 + 480 + 64)
        named = ["00000000", "b/0", "b/1", "00000003", "b/2", "b/3"]
        assert list(map(info.name, range(6))) == named
        shares = [read(path, rank, 2) for rank in range(2)]
        assert sorted(position for share in shares for position in share) == [1, 2, 4, 5]


def test_a_file_of_the_first_version_opens() -> None:
    """Written by commit fee66e7."""
    found = read(GOLDEN / "codes_1.looc")
    assert list(found) == [0, 1, 2, 3, 5, 6]
    expected = draw((7, 2, 3, 2), 5)
    assert all(torch.equal(image, expected[position]) for position, image in found.items())


def test_chunks_are_dealt_out(small: Path) -> None:
    shares = [read(small, rank, 2) for rank in range(2)]
    assert [sorted(share) for share in shares] == [[0, 1, 2, 6], [3, 4, 5]]
    assert len(list(CodeFile(small).batches())) == 3


def test_one_image_left(tmp_path: Path) -> None:
    indices = draw((8, 1, 2, 1), 4)
    write(tmp_path / "c", indices, 4, left_out=(0, 1, 2, 3, 4, 5, 7), batch_size=2)
    found = read(tmp_path / "c")
    assert list(found) == [6]
    assert torch.equal(found[6], indices[6])


def test_tables_of_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are fewer tables if one for every place or slot would be too many."""
    indices = draw((2000, 1, 2, 3), 4)
    indices[..., 1] = 3 - indices[..., 1]
    indices[:, :, 1] = (indices[:, :, 1] + 2) % 4
    found = []
    for largest in (24, 23, 11):
        monkeypatch.setattr(files, "LARGEST_TABLES", largest)
        found.append(write(tmp_path / "c", indices, 4).num_tables)
        assert_holds(tmp_path / "c", indices)
    assert found == [6, 3, 1]


def test_the_words_are_those_of_every_version() -> None:
    """A code file has to be readable for years: these words shall never change."""
    tables = np.array([[9, 0, 20, 123], [1, 1, 0, 40]], dtype=np.uint8)
    indices = np.array([3, 1, 0, 3, 2, 0, 1, 2])
    words = Coder(tables).encode(indices)
    assert words.tolist() == WORDS
    assert Coder(tables).decode(words, 8).tolist() == indices.tolist()
    assert FREQUENCIES[[0, 3, 4, 9, 20, 40, 123]].tolist() == [0, 3, 4, 10, 64, 2048, 7 * 2**29]


WORDS = [768, 131067, 16785152, 3718145226]


def test_frequencies() -> None:
    counts: NDArray[Any] = np.array([*range(200), *np.geomspace(200, 3e9, 50).astype(np.int64)])
    nearest = FREQUENCIES[nearest_frequencies(counts)]
    assert ((nearest == 0) == (counts == 0)).all()
    assert (abs(nearest - counts) <= counts / 8).all()
    assert (nearest[:8] == counts[:8]).all()


# ------------------------------------------------------------------------------------------- rate


def test_the_file_is_as_small_as_the_entropy_says(tmp_path: Path) -> None:
    """Independent codes of one distribution: one table, and no more than 2 % beside it."""
    indices = draw((2000, 4, 4, 4), 64)
    statistics = CodebookStatistics(64)
    statistics.add(indices)
    info = write(tmp_path / "c", indices, 64)
    assert info.num_tables == 1
    rate = file_rate(tmp_path / "c", info)
    entropy = statistics.rate(16 * 16).entropy_bits_per_pixel or 0
    assert 0 < entropy < rate["coded_bits_per_pixel"] < 1.02 * entropy


def test_slots_and_places_that_differ_have_tables_of_their_own(tmp_path: Path) -> None:
    """The file is then smaller than one table's entropy, by what is known of slot or place."""
    same = draw((3000, 2, 2, 4), 32)
    by_slot = (same + 8 * torch.arange(4)) % 32
    by_place = (same + 2 * torch.arange(16).view(2, 2, 4)) % 32
    for indices, num_tables in ((same, 1), (by_slot, 4), (by_place, 16)):
        info = write(tmp_path / "c", indices, 32)
        assert info.num_tables == num_tables
        assert_holds(tmp_path / "c", indices)
        ideal = entropy_bits(torch.bincount(same.flatten())) * same.numel() / 8
        assert (tmp_path / "c").stat().st_size < 1.02 * ideal + 32 * num_tables
