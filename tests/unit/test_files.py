"""Files and folders appear complete or not at all; pictures keep their bytes."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.errors import UserError, one_line, unknown_name
from utils.files import inside, whole_file, whole_folder, writable_folder, write_json
from utils.images import (
    comparison,
    mean_squared_errors,
    psnr,
    save_comparison,
    save_picture,
    to_bytes,
    to_signed,
)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with suppress(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for content in ("old", "new"):
        with whole_folder(folder) as temporary:
            (temporary / content).touch()
    assert [path.name for path in folder.iterdir()] == ["new"]
    with suppress(RuntimeError), whole_folder(folder) as temporary:
        (temporary / "half").touch()
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output_folder .*file/x cannot be created"):
        writable_folder(tmp_path / "file" / "x", "--output_folder")
    with pytest.raises(UserError, match="cannot write"):
        write_json(tmp_path / "file" / "a.json", {})


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "", "a\udcff"])
def test_names_stay_inside_their_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--exp_name"):
        inside(tmp_path / "models", name, "--exp_name")
    assert inside(tmp_path, "a/b.pt", "--model_name") == tmp_path / "a/b.pt"


def test_bytes_survive_the_networks_range() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(to_signed(every)), every)
    assert torch.equal(to_signed(every)[[0, -1]], torch.tensor([-1.0, 1.0]))
    assert to_bytes(torch.tensor([-9.0, 0.0, 0.003, 0.004, 9.0])).tolist() == [
        0,
        128,
        128,
        128,
        255,
    ]


def test_reconstructions_are_rounded_not_truncated() -> None:
    assert to_bytes(to_signed(torch.tensor([99.6, 99.4]))).tolist() == [100, 99]


def test_psnr_by_closed_form() -> None:
    one, other = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 2.55)
    assert psnr(mean_squared_errors(one, other), 255).tolist() == pytest.approx([40, 40], rel=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_byte_and_jpeg_is_jpeg(channels: int, tmp_path: Path) -> None:
    image = torch.randint(256, (channels, 12, 8), dtype=torch.uint8)
    save_picture(tmp_path / "a.png", image)
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture)
    assert np.array_equal(pixels.reshape(12, 8, channels).transpose(2, 0, 1), image)
    save_picture(tmp_path / "a.jpg", image, jpeg_quality=75)
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.format == "JPEG"
        assert picture.size == (8, 12)


def test_originals_stand_above_their_reconstructions(tmp_path: Path) -> None:
    originals = torch.zeros(5, 1, 4, 4, dtype=torch.uint8)
    others = torch.full_like(originals, 200)
    picture = comparison(originals, others, columns=3)
    assert picture.shape == (1, 4 * 8, 3 * 8)
    assert [int(picture[0, row, 4]) for row in (4, 12, 20, 28)] == [0, 200, 0, 200]
    assert (picture[0, 16:, 16:] == 255).all()  # no sixth image
    save_comparison(tmp_path / "grid.png", originals, others)
    assert (tmp_path / "grid.png").exists()


def test_messages() -> None:
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError()) == "ValueError"
    assert unknown_name("--x", "zzz", ["abc", "def"]) == "--x zzz is unknown; choose from abc, def"
