"""Whole pictures in and out: test.py --images and the code files that it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from datasets.pictures import find_pictures
from modules import VQGAN, VQVAE, ModelConfig
from tests.conftest import Outcome, refusal
from tests.processes import run_ranks
from utils.checkpoints.checkpoint import save_checkpoint
from utils.codebook import results as results_module
from utils.codebook.codes.files import CodeFile
from utils.images import padded, to_bytes, to_signed
from utils.logger import warn_once

Script = Callable[..., Outcome]
SIZES = {"a": (23, 17), "grey": (9, 40), "c/alpha": (16, 16), "dot": (1, 1), "turned": (7, 30)}
TEST = ("test.py", "--model_name", "m.pt", "--images", "a.jpg", "b")
FOLDER = Path("output/results/m/a-and-1-more-whole")


def noise(size: tuple[int, int], *channels: int, dtype: Any = np.uint8) -> Image.Image:
    width, height = size
    top = np.iinfo(dtype).max
    random = np.random.default_rng(width)
    return Image.fromarray(random.integers(top, size=(height, width, *channels), dtype=dtype))


def make_model(path: Path, **flags: Any) -> VQVAE | VQGAN:
    """Write a checkpoint of a small untrained model."""
    torch.manual_seed(0)
    settings = {"in_channels": 3, "hidden_size": 8, "num_embedding": 16, **flags}
    network = VQGAN if flags.get("model") == "vqgan" else VQVAE
    model = network(ModelConfig(**settings)).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, model, {})
    return model


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """a.jpg and b/, with every kind of picture, beside files that are none; and a model."""
    (tmp_path / "b/c").mkdir(parents=True)
    noise((23, 17), 3).save(tmp_path / "a.jpg")
    noise((9, 40), dtype=np.uint16).save(tmp_path / "b/grey.png")
    noise((16, 16), 4).save(tmp_path / "b/c/alpha.webp")
    noise((1, 1), 3).save(tmp_path / "b/dot.bmp")
    turn = Image.Exif()
    turn[ExifTags.Base.Orientation] = 6
    noise((30, 7), 3).save(tmp_path / "b/turned.JPG", exif=turn)
    (tmp_path / "b/notes.txt").write_text("no picture")
    make_model(tmp_path / "output/models/m.pt")
    return tmp_path


def error_line(outcome: Outcome) -> str:
    """The line of a refusal, below the progress bar."""
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    return outcome.err.strip().splitlines()[-1]


def read(folder: Path) -> dict[str, Image.Image]:
    """Pictures below a folder by name without suffix."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder).with_suffix("")): Image.open(path).copy() for path in files
    }


def pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def test_pictures_of_any_size_come_back_under_their_names(script: Script, pictures: Path) -> None:
    outcome = script(*TEST, "--save_codes")
    assert outcome.code == 0, outcome.err
    results = pictures / FOLDER
    originals, reconstructions = read(results / "original"), read(results / "rec")
    for found in (originals, reconstructions):
        assert {name: picture.size for name, picture in found.items()} == SIZES
    with Image.open(pictures / "b/grey.png") as grey:
        upper = (np.asarray(grey) >> 8).astype(np.uint8)
    assert (np.asarray(originals["grey"]) == upper[..., None]).all()
    with Image.open(pictures / "b/turned.JPG") as turned:
        upright = turned.transpose(Image.Transpose.ROTATE_270)
    assert (np.asarray(originals["turned"]) == np.asarray(upright)).all()

    model = make_model(pictures / "same.pt")
    for name, original in originals.items():
        image = pixels(original)[None]
        with torch.no_grad():
            whole = model.decode(model.encode(padded(to_signed(image), 4)))
        expected = to_bytes(whole)[0, :, : image.shape[2], : image.shape[3]]
        assert torch.equal(pixels(reconstructions[name]), expected), name

    codes = CodeFile(results / "codes.looc")
    num_pixels = sum(width * height for width, height in SIZES.values())
    rate = json.loads((results / "analysis.json").read_text())["rate"]
    size = (results / "codes.looc").stat().st_size
    assert rate["coded_bits_per_pixel"] == 8 * size / num_pixels
    slots = model.config.num_slots
    num_codes = slots * (6 * 5 + 3 * 10 + 4 * 4 + 1 + 2 * 8)
    assert codes.info.num_coded == 5
    assert rate["codes_per_image"] == num_codes / 5
    assert rate["nominal_bits_per_pixel"] == pytest.approx(4 * num_codes / num_pixels)

    shutil.copy(results / "codes.looc", pictures / "x.looc")
    shutil.rmtree(pictures / "b")
    outcome = script(*TEST[:3], "--from_codes", "x.looc")
    assert outcome.code == 0, outcome.err
    assert "bit for bit" in outcome.out
    decoded = read(pictures / f"output/results/m/{pictures.name}-x/rec")
    assert decoded.keys() == reconstructions.keys()
    assert all(decoded[name].tobytes() == reconstructions[name].tobytes() for name in decoded)

    outcome = script(
        *("evaluation.py", "--gt_path", f"{FOLDER}/original", "--g_path", f"{FOLDER}/rec"),
        *("--metrics", "l1", "psnr"),
    )
    assert outcome.code == 0, outcome.err
    assert json.loads((results / "metrics.json").read_text())["pairs"] == 5
    report = (results / "report.html").read_text()
    assert all(f"Image {name}: original" in report for name in SIZES)
    assert "whole, each in its own size" in report


def test_several_processes_write_the_same(script: Script, pictures: Path) -> None:
    assert script(*TEST, "--save_codes", "--device", "cpu").code == 0
    codes = (pictures / FOLDER / "codes.looc").read_bytes()
    expected = read(pictures / FOLDER / "rec")
    for words in ((*TEST, "--save_codes"), (*TEST[:3], "--from_codes", f"{FOLDER}/codes.looc")):
        outcomes = run_ranks([*words, "--device", "cpu"], pictures)
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
        assert (pictures / FOLDER / "codes.looc").read_bytes() == codes
        rec = FOLDER if "--images" in words else f"{FOLDER}-codes"
        found = read(pictures / rec / "rec")
        assert found.keys() == expected.keys()
        assert all(found[name].tobytes() == expected[name].tobytes() for name in found)


def test_a_vqgan_codes_whole_pictures(script: Script, pictures: Path) -> None:
    pytest.importorskip("diffusers")
    small = {"channel_multipliers": "1,1,2", "num_residual_layers": 1, "latent_channels": 4}
    make_model(pictures / "output/models/m.pt", model="vqgan", **small)
    outcome = script(*TEST, "--save_codes")
    assert outcome.code == 0, outcome.err
    expected = read(pictures / FOLDER / "rec")
    assert {name: picture.size for name, picture in expected.items()} == SIZES
    outcome = script(*TEST[:3], "--from_codes", f"{FOLDER}/codes.looc")
    assert "bit for bit" in outcome.out


def test_pictures_that_cannot_be_decoded(script: Script, pictures: Path) -> None:
    (pictures / "b/bad.png").write_bytes(b"damaged")
    message = error_line(script(*TEST))
    assert "image b/bad.png cannot be decoded" in message
    outcome = script(*TEST[:3], "--images", "b/notes.txt")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)  # no progress bar
    outcome = script(*TEST, "--skip_bad_images", "--save_codes")
    assert outcome.code == 0, outcome.err
    assert "skipped images           1" in outcome.out
    skipped = json.loads((pictures / FOLDER / "analysis.json").read_text())["skipped_images"]
    assert skipped == {"count": 1, "names": ["b/bad.png"]}
    expected = read(pictures / FOLDER / "rec")
    assert expected.keys() == SIZES.keys()
    assert script(*TEST[:3], "--from_codes", f"{FOLDER}/codes.looc").code == 0
    assert read(pictures / f"{FOLDER}-codes/rec").keys() == SIZES.keys()


def test_a_grey_model_takes_grey_pictures(script: Script, pictures: Path) -> None:
    make_model(pictures / "output/models/m.pt", in_channels=1)
    message = error_line(script(*TEST))
    assert message == (
        "test.py: error: image a.jpg has colours, and the model takes grey levels only"
    )
    assert script("test.py", "--model_name", "m.pt", "--images", "b/grey.png").code == 0
    with Image.open(pictures / "output/results/m/grey-whole/rec/grey.png") as picture:
        assert (picture.mode, picture.size) == ("L", (9, 40))
    make_model(pictures / "output/models/m.pt", in_channels=2)
    assert "the model takes 2" in error_line(script(*TEST))


def test_refusals_are_one_line(script: Script, pictures: Path, monkeypatch: Any) -> None:
    def refused(*words: str) -> str:
        line = error_line(script(*TEST, *words))
        assert not list((pictures / "output").rglob("*.png"))
        return line

    for flag, value in (("batch_size", "4"), ("image_size", "16"), ("dataset", "cifar10")):
        assert f"--{flag} has no effect with --images" in refused(f"--{flag}", value)
    assert "--images contradicts --from_codes" in refused("--from_codes", "x.looc")
    assert "--images absent does not exist" in refused("--images", "a.jpg", "absent")
    (pictures / "empty").mkdir()
    assert "--images empty holds no images" in refused("--images", "empty")
    assert "--images is empty" in refused("--images", "")

    def full(*_: object) -> torch.Tensor:
        raise MemoryError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(results_module, "code", full)
    assert "image a.jpg of 23×17: out of memory" in refused()


def test_names_of_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("d/x.png", "d/x.jpg", "d/y.v2.png", "d/.hidden.png", "e/f/y.v2.png", "plain"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    found = {
        name: str(path) for name, path in find_pictures(["d", "e", "d/x.png", "plain"]).items()
    }
    assert found == {
        **{"x.jpg": "d/x.jpg", "x.png": "d/x.png", "y.v2": "d/y.v2.png"},
        **{"f/y.v2": "e/f/y.v2.png", "plain": "plain"},
    }
    assert refusal(lambda: find_pictures(["d", "e/f"])) == (
        "--images: d/y.v2.png and e/f/y.v2.png have one name; give the folder above"
    )


def test_what_a_folder_holds_and_is_not_used_is_told(script: Script, pictures: Path) -> None:
    dark = np.full((8, 8), 4095, np.uint16)
    (pictures / "c").mkdir()
    Image.fromarray(dark).save(pictures / "c/dark.png")
    warn_once.cache_clear()
    outcome = script(*TEST[:3], "--images", "b", "c")
    assert outcome.code == 0, outcome.err
    assert "--images b: 4 images; left out: 1 .txt" in outcome.err
    assert "c: all images of 16 bits that were looked at (1) use only their lower 12" in outcome.err


def test_other_pictures_do_not_replace_results(script: Script, pictures: Path) -> None:
    (pictures / "c").mkdir()
    noise((5, 5), 3).save(pictures / "c/a.jpg")
    assert script(*TEST[:3], "--images", "a.jpg").code == 0
    assert script(*TEST[:3], "--images", "./a.jpg").code == 0
    message = error_line(script(*TEST[:3], "--images", "c/a.jpg"))
    assert str(pictures / "c/a.jpg") in message
    assert str(pictures / "a.jpg") in message
